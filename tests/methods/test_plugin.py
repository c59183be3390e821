"""Methods from other packages: declared like ours, found by entry point, refused when broken."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from merge_cli.errors import UsageError
from merge_cli.methods.foreign import ForeignFunction
from merge_cli.methods.parameters import Density, PerModel, each
from merge_cli.methods.registry import merge_method, method_of
from tests.support.command import cli, failed
from tests.support.paths import ROOT
from tests.support.tiny import Family, read_model

PLUGIN = '''
"""A plugin."""
from merge_cli import merge_method
from merge_cli.methods.parameters import PerModel, each


@merge_method("strongest", paper="nobody, 2026")
def strongest(base, deltas, *, weight: PerModel[float] = each(1.0), lambda_: float = 1.0):
    """Take the largest change of each element.

    Args:
        weight: scales each model's change.
        lambda_: scale of the whole change.
    """
    best = deltas[0] * weight[0]
    for delta, w in zip(deltas[1:], weight[1:]):
        best = best.where(best.abs() >= (delta * w).abs(), delta * w)
    return base + lambda_ * best
'''


def install(folder: Path, code: str) -> None:
    """A package with an entry point, as pip would leave it, for commands that are run there."""
    (folder / "strongest.py").write_text(code)
    info = folder / "strongest_merge-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strongest-merge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[merge_cli.methods]\nstrongest = strongest\n")


def test_a_method_from_another_package(family: Family, tmp_path: Path) -> None:
    install(tmp_path, PLUGIN)
    recipe = family.recipe("strongest", parameters={"lambda": 0.5})
    done = cli("run", recipe, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged = read_model(tmp_path / "out")
    name = "model.norm.weight"
    base = family.base[name].float()
    deltas = [model[name].float() - base for model in family.models]
    best = max(deltas, key=lambda d: float(d[5].abs()))[5]
    assert float(merged[name][5]) == pytest.approx(float(base[5] + 0.5 * best), abs=0.01)
    assert "Take the largest change" in cli("methods", "strongest", cwd=tmp_path).stdout
    bad = family.recipe("strongest", parameters={"lamda": 0.5})
    done = cli("run", bad, tmp_path / "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "strongest has no such parameter. Did you mean 'lambda'?" in done.stderr


def test_the_page_on_writing_methods(family: Family, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "writing_a_method.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    install(tmp_path, code)
    for method in ("clipped_sum", "equal_sum"):
        recipe = family.recipe(method, models=[{"weight": 0.5}, {"weight": 0.5}])
        done = cli("run", recipe, tmp_path / method, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_keywords_of_earlier_versions_are_read_with_a_note() -> None:
    def norms(tensor: Any, survey: Any, *, weight: Any, **_: Any) -> None:
        return None

    def unscaled(weight: list[float]) -> bool:
        return weight[0] == 1.0

    with pytest.warns(DeprecationWarning, match="'former': the keyword") as notes:

        @merge_method(
            "former",
            prepare=norms,
            prepare_uses=("weight",),
            copies=unscaled,
            any_array=True,
            listed=False,
        )
        def former(models: Any, prepared: Any, *, weight: PerModel[float] = each(1.0)) -> Any:
            """Declared as before 0.2.

            Args:
                weight: some.
            """

    assert [str(note.message).partition("keyword ")[2] for note in notes] == [
        "'prepare' is called tensor_pass",
        "'prepare_uses' follows from signatures and can be left out",
        "'copies' is called is_identity",
        "'any_array' is called supports_numpy",
    ]
    method = method_of(former)
    assert inspect.unwrap(method.tensor_pass or former) is norms
    assert inspect.unwrap(method.is_identity or former) is unscaled
    assert method.supports_numpy
    assert method.cache_key_parameters == ("weight",)


def test_a_broken_plugin_is_named(family: Family, tmp_path: Path) -> None:
    install(tmp_path, "import nothing_of_that_name\n")
    done = cli("methods", cwd=tmp_path)
    assert done.returncode == 2
    assert "package 'strongest-merge' failed to load" in done.stderr
    assert "Traceback" not in done.stderr


EXITS = '''
import sys
from merge_cli import merge_method


def at(place):
    if place == "{place}":
        sys.exit({code})


def check(weight):
    at("plan")
    return ""


def look(tensor, model, **_):
    at("tensor")


at("import")


@merge_method("strongest", check=check, tensor_pass=look)
def strongest(models, prepared, *, weight: float = 1.0):
    """Take the first.

    Args:
        weight: nothing.
    """
    at("merge")
    return models[0]
'''


@pytest.mark.parametrize("code", [0, 3, None, "'a text'"])
@pytest.mark.parametrize("place", ["import", "plan", "tensor", "merge"])
def test_a_plugin_that_ends_the_program(
    family: Family, tmp_path: Path, place: str, code: object
) -> None:
    """Whatever its exit code is, it has not merged."""
    install(tmp_path, EXITS.format(place=place, code=code))
    recipe = family.recipe("strongest", base=False)
    done = cli("run", recipe, tmp_path / "out", cwd=tmp_path)
    failed(done, 2, "SystemExit", "strongest")
    assert not (tmp_path / "out").exists()


def test_functions_of_other_packages_go_to_other_processes() -> None:
    def local() -> None:
        raise SystemExit(0)

    with pytest.raises(UsageError, match="'mine' ends the program.*local"):
        ForeignFunction(local, "mine")()
    guarded = ForeignFunction(install, "mine")
    assert pickle.loads(pickle.dumps(guarded)) == guarded
    assert inspect.signature(guarded) == inspect.signature(install)


def test_signatures_are_checked_when_declared() -> None:
    with pytest.raises(TypeError, match="needs a default and a line under Args"):

        @merge_method("undocumented")
        def undocumented(models: Any, *, weight: PerModel[float] = each(1.0)) -> None:
            """No arguments are explained."""

    with pytest.raises(TypeError, match="the engine supplies"):

        @merge_method("unknown_operand")
        def unknown_operand(gradients: Any) -> None:
            """Wants what no engine has."""

    with pytest.raises(TypeError, match="cannot hold"):

        @merge_method("odd_type")
        def odd_type(models: Any, *, weight: dict[str, float] | None = None) -> None:
            """Odd.

            Args:
                weight: odd.
            """

    with pytest.raises(TypeError, match="no keyword 'tensor_past'"):
        merge_method("misspelt", tensor_past=None)(lambda models: models[0])

    with pytest.raises(TypeError, match="already defined"):

        @merge_method("ties")
        def another(models: Any, *, density: PerModel[Density] = each(1.0)) -> None:
            """Takes a name that is taken.

            Args:
                density: some.
            """
