"""The command line as its users meet it: start-up, exit codes, streams, mergekit's flags."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import merge_cli
from merge_cli.cli import app
from merge_cli.cli.mergekit_flags import NO_EFFECT, device_of, shard_bytes
from merge_cli.errors import UsageError
from merge_cli.planning.planner import load_recipe
from merge_cli.system.machine import parse_size, show_seconds, show_size
from tests.support.command import cli, failed
from tests.support.tiny import Family, llama_config, llama_family, write_model


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["methods"],
        ["methods", "ties"],
        ["--version"],
        ["analyze", "--help"],
        ["init", "--help"],
        ["push", "--help"],
    ],
)
def test_starts_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom merge_cli.cli import main\nsys.argv = ['merge-cli', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_bad_recipe_is_answered_without_torch(family: Family) -> None:
    recipe = family.recipe("ties", parameters={"densty": 1})
    code = (
        "import sys\nfrom merge_cli.cli import main\nsys.argv = ['x', 'run', sys.argv[1], 'out']\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, timeout=60
    )
    failed(done, 2, "parameters.densty: ties has no such parameter. Did you mean 'density'?")


def test_run_says_where_the_result_is(family: Family, tmp_path: Path) -> None:
    cli("run", family.recipe("ties"), tmp_path / "first")  # which may have to compile, and says so
    done = cli("run", family.recipe("ties"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out" / "merge_report.html") in done.stdout
    assert done.stderr == ""  # a small merge has nothing to say in a log


def test_json_goes_to_stdout_alone(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("soup", base=False, parameters={"int8_mask": True})
    done = cli("run", recipe, tmp_path / "out", "--json")
    report = json.loads(done.stdout)
    assert report["output"]["parameters"] == sum(t.numel() for t in family.base.values())
    assert "int8_mask: has no effect" in done.stderr
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report


@pytest.mark.parametrize("ending", [SystemExit(0), SystemExit(None), GeneratorExit("odd")])
def test_what_ends_the_program_is_no_success(
    monkeypatch: pytest.MonkeyPatch, ending: BaseException
) -> None:
    """Code that is not ours may call sys.exit where nobody expects it."""

    def end() -> None:
        raise ending

    monkeypatch.setattr("merge_cli.console.Screen", end)
    result = CliRunner().invoke(app, ["plan", "recipe.yaml"])
    assert isinstance(result.exception, RuntimeError)
    assert repr(ending) in str(result.exception)


def test_quiet(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("soup", base=False)
    done = cli("run", recipe, tmp_path / "out", "--quiet", "--allow-crimes")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    failed(cli("run", recipe, tmp_path / "out", "--quiet"), 2, "exists already")


def test_recipe_from_standard_input(family: Family, tmp_path: Path) -> None:
    text = family.recipe("soup", base=False).read_text()
    done = cli("run", "-", tmp_path / "out", input=text, cwd=family.folder)
    assert done.returncode == 0, done.stderr
    bad = cli("run", "-", tmp_path / "x", input="merge_method: soop\n", cwd=family.folder)
    failed(bad, 2, "<stdin>:1:1: merge_method: unknown merge method 'soop'")


def test_plan_and_dry_run(family: Family, tmp_path: Path) -> None:
    models = [{"weight": [{"filter": "mlp", "value": 0.25}, {"value": [0, 1]}]}, None, None]
    recipe = family.recipe("ties", models=models, parameters={"density": 0.5})
    shown = cli("plan", recipe).stdout
    assert "ties of a, b, c on base" in shown
    assert "density 0.5 0.5 0.5" in shown
    assert cli("run", recipe, "--dry-run").stdout == shown
    assert not (tmp_path / "out").exists()
    every = cli("plan", recipe, "--all").stdout
    assert all(name in every for name in family.base)
    data = json.loads(cli("plan", recipe, "--json").stdout)
    weight = {t["name"]: t["parameters"]["weight"][0] for t in data["tensors"]}
    assert weight["model.layers.1.mlp.up_proj.weight"] == 0.25
    assert weight["model.layers.3.self_attn.q_proj.weight"] == 1.0
    assert weight["model.norm.weight"] == 0.0


def test_dry_run_says_what_the_run_would_refuse(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("soup", base=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    failed(cli("run", recipe, tmp_path / "out", "--dry-run"), 2, "exists already")
    assert cli("run", recipe, tmp_path / "new" / "out", "--dry-run").returncode == 0
    assert not (tmp_path / "new").exists()


def test_many_problems_leave_the_first_in_sight(family: Family, tmp_path: Path) -> None:
    other = llama_family(tmp_path / "wide", layers=8)
    config = {**llama_config(layers=8), "hidden_size": 32}
    wide = {name: torch.cat([t, t], dim=-1) for name, t in other.base.items()}
    write_model(tmp_path / "wide" / "x", wide, config)
    recipe = family.write(f"merge_method: soup\nmodels: [a, {tmp_path}/wide/x]\n")
    done = cli("plan", recipe)
    failed(done, 3, "num_hidden_layers: a 4", "hidden_size: a 16", " more\n")
    assert len(done.stderr.splitlines()) < 20


def test_a_mistyped_folder(family: Family) -> None:
    (family.folder / "japanese").mkdir()
    recipe = family.write("merge_method: soup\nmodels: [a, ./japanes]\n")
    failed(cli("plan", recipe), 3, "no such folder", "Did you mean './japanese'?")


def test_plan_joins_layers_that_are_treated_alike(family: Family) -> None:
    shown = cli("plan", family.recipe("soup", base=False)).stdout
    assert "model.layers.0 … 3" in shown
    assert "model.layers.2" not in shown


def test_mergekit_flags_are_answered(family: Family, tmp_path: Path) -> None:
    valued = ["write_threads", "lora_merge_cache", "lora_merge_dtype"]
    names = {name: f"--{name.replace('_', '-')}" for name in NO_EFFECT if name != "verbose"}
    flags = [x for name, flag in names.items() for x in ([flag, "2"] if name in valued else [flag])]
    recipe = family.recipe("dare_ties", parameters={"density": 0.5})
    done = cli("run", recipe, tmp_path / "out", *flags, "--copy-tokenizer", "--random-seed", "7",
               "--out-shard-size", "1K", "--num-threads", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for flag in names.values():
        assert f"{flag} has no effect:" in done.stderr
    assert "as mergekit does: 1 kB of bytes" in done.stderr
    assert "seed: 7" in (tmp_path / "out" / "merge_recipe.yaml").read_text()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 10


# mergekit-yaml 0.1.5's flags, as its --help lists them; True: with a negative form.
MERGEKIT_YAML = {
    "allow-crimes": True, "unsafe-truncate-embeddings": True, "trust-remote-code": True,
    "transformers-cache": "CACHE", "lora-merge-cache": "x", "lora-merge-dtype": "float32",
    "random-seed": "3", "quiet": True, "cuda": True, "device": "cpu", "low-cpu-memory": True,
    "lazy-unpickle": True, "read-to-gpu": True, "multi-gpu": True, "num-threads": "1",
    "gpu-rich": False, "async-write": True, "write-threads": "2", "out-shard-size": "1M",
    "copy-tokenizer": True, "clone-tensors": True, "write-model-card": True,
    "safe-serialization": True,
}  # fmt: skip


def test_every_flag_of_mergekit_yaml_is_taken(family: Family, tmp_path: Path) -> None:
    recipe = str(family.recipe("soup", base=False))
    cuda = ("cuda", "gpu-rich")  # refused where there is none, as it should be
    given = [["-v"], ["-j", "1"]]
    for name, kind in MERGEKIT_YAML.items():
        if isinstance(kind, str):
            given.append([f"--{name}", kind.replace("CACHE", str(tmp_path / "cache"))])
            continue
        given += [[f"--{name}"]] if name not in cuda else []
        given += [[f"--no-{name}"]] if kind else []
    for flags in given:
        out = tmp_path / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_CACHE", "elsewhere")  # and put back
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "elsewhere")
            done = CliRunner().invoke(app, ["run", recipe, str(out), "--threads", "1", *flags])
        assert done.exit_code == 0, (flags, done.output)
        card = (out / "README.md").exists()
        assert card == (flags != ["--no-write-model-card"])
        shutil.rmtree(out)


def test_devices_by_mergekits_flags() -> None:
    assert device_of("auto", None, None, None) == "auto"
    assert device_of("auto", False, None, None) == "cpu"
    assert device_of("cuda", False, None, None) == "cuda"
    assert device_of("auto", True, None, None) == device_of("cuda", None, True, None) == "cuda"
    assert device_of("auto", True, None, False) == "cuda:0"
    with pytest.raises(UsageError, match="contradict"):
        device_of("cpu", None, True, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "r.yaml"], "missing argument OUT"),
        (["run", "nowhere.yaml", "out"], "no such recipe"),
        (["run", "r.yaml", "out", "--shard-size", "5 apples"], "'5 apples' is not a size"),
        (["run", "r.yaml", "out", "--max-memory", "10MB"], "this merge at least"),
        (["run", "r.yaml", "out", "--device", "tpu"], "unknown device 'tpu'"),
        (["run", "r.yaml", "out", "--threads", "0"], "--threads"),
        (["methods", "tise"], "Did you mean 'ties'?"),
        (["runn"], "No such command"),
        (["merg", "r.yaml", "out"], "Did you mean 'run'?"),
    ],
)
def test_usage_errors(family: Family, arguments: list[str], words: str) -> None:
    family.recipe("soup", base=False).rename(family.folder / "r.yaml")
    failed(cli(*arguments, cwd=family.folder), 2, words)
    assert not (family.folder / "out").exists()


def test_methods() -> None:
    listed = cli("methods").stdout
    for name in ("soup", "linear", "task_arithmetic", "ties", "dare_ties", "slerp", "passthrough"):
        assert name in listed
    data = json.loads(cli("methods", "dare_linear", "--json").stdout)
    assert data["name"] == "dare"
    density = next(p for p in data["parameters"] if p["name"] == "density")
    assert density["allowed"] == "a number of at least 0 (above 1 counts as 1)"


def test_completion_is_offered() -> None:
    assert "--install-completion" in cli("--help").stdout


def test_warnings_of_the_recipe_are_shown(family: Family, tmp_path: Path) -> None:
    done = cli("run", family.recipe("ties", parameters={"gamma": 0.1}), tmp_path / "out")
    assert done.returncode == 0
    assert "parameters.gamma: has no effect in ties." in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5e9),
        ("512MiB", 2**29),
        ("1.5G", 1.5e9),
        ("100", 100),
        ("2 kb", 2000),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text, "--x") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1XB", "1e9"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text, "--x")


def test_mergekit_shard_sizes() -> None:
    assert shard_bytes("5B")[0] == 5_000_000_000
    assert shard_bytes("1.5B")[0] == 1_500_000_000
    assert shard_bytes("5GB") == (5_000_000_000, "")


def test_shown_sizes_and_times() -> None:
    assert [show_size(n) for n in (999, 9_961_472, 1e12)] == ["999 B", "9.96 MB", "1 TB"]
    assert [show_seconds(s) for s in (0.42, 12, 200, 7500)] == ["0.4 s", "12 s", "3 min 20 s",
                                                                "2 h 5 min"]  # fmt: skip


def test_facade_is_exact() -> None:
    """What `import merge_cli` offers: sorted, complete, and all of it there."""
    public = [name for name in dir(merge_cli) if not name.startswith("_")]
    assert public == merge_cli.__all__
    assert (Path(merge_cli.__file__).parent / "py.typed").is_file()
    assert merge_cli.__all__ == sorted(merge_cli.__all__)
    assert set(merge_cli.__all__) == set(merge_cli._HOMES)
    for name in merge_cli.__all__:
        assert getattr(merge_cli, name) is not None
    assert merge_cli.load_recipe is load_recipe
    with pytest.raises(AttributeError):
        _ = merge_cli.nothing


def test_facade_costs_nothing() -> None:
    code = "import sys, merge_cli; assert not {'torch', 'yaml', 'rich', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def completed(words: str, number: int, shell: str = "bash") -> tuple[list[str], set[str]]:
    """What a shell is offered for the last word, and which heavy modules that took."""
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'yaml'}\n"
        "atexit.register(lambda: print(heavy & set(sys.modules) or '', file=sys.stderr))\n"
        "from merge_cli.cli import main\nsys.argv = ['merge-cli']\nmain()\n"
    )
    ours = {"_MERGE_CLI_COMPLETE": f"complete_{shell}", "COMP_WORDS": words,
            "COMP_CWORD": str(number), "_TYPER_COMPLETE_ARGS": words}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, **ours},
    )  # fmt: skip
    return done.stdout.split("\n"), set(done.stderr.split()) - {""}


def test_shells_complete_methods() -> None:
    from merge_cli.methods.registry import method_names

    ties = [name for name in method_names() if name.startswith("ti")]
    found, heavy = completed("merge-cli methods ti", 2)
    assert [line for line in found if line] == ties
    assert not heavy - {"{'yaml'}"}  # nothing that would keep a shell waiting
    found, _ = completed("merge-cli init --method ", 3)
    assert [line for line in found if line] == method_names()
    found, _ = completed("merge-cli methods dare_t", 2, "zsh")
    assert "dare_ties" in found[0]
    assert "TIES" in found[0]


@pytest.mark.parametrize("words", ["merge-cli run conf", "merge-cli evaluate zo"])
def test_shells_complete_recipes_and_models_as_files(words: str) -> None:
    """Nothing is offered, and then shells offer files: zsh is told so, bash does by default."""
    assert completed(words, 2, "zsh")[0][0] == "_files"
    assert not any(completed(words, 2)[0])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown(shell: str) -> None:
    # Otherwise typer asks which shell has started it, and the argument means nothing.
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = cli("--show-completion", shell, env=env)
    assert done.returncode == 0, done.stderr
    assert f"complete_{shell}" in done.stdout


def test_every_method_has_its_example() -> None:
    """Ours, all of them; the tests of recipes run them."""
    for method in json.loads(cli("methods", "--json").stdout):
        name = method["name"]
        shown = json.loads(cli("methods", name, "--json").stdout)["example"]
        assert shown is not None, name
        assert f"\nmerge_method: {name}\n" in shown
    done = cli("methods", "ties")
    assert "Example (configs/ties.yaml)" in done.stdout
    assert "  base_model: ../zoo/base\n" in done.stdout
