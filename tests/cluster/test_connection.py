"""Addresses that are none, clusters that are not there, and what no cluster can share."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import yaml

import merge_cli
from merge_cli.cluster.connection import connected
from merge_cli.cluster.node import Probe, look
from merge_cli.errors import ResourceError, UsageError
from merge_cli.options import MergeOptions
from tests.support.command import cli, failed
from tests.support.merges import write_recipe
from tests.support.tiny import Family


@pytest.fixture
def closed_port() -> str:
    """An address where nobody answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listening.getsockname()[1]}"


def test_nobody_answers(family: Family, tmp_path: Path, closed_port: str) -> None:
    """At once, with exit code 4, and nothing is left behind."""
    recipe, out = write_recipe(family, "soup"), tmp_path / "runs" / "out"
    done = cli("run", recipe, out, "--ray", closed_port)
    failed(done, 4, f"no Ray cluster answers at '{closed_port}'", "ray start --head")
    assert not out.parent.exists()
    failed(cli("run", recipe, out, "--ray", closed_port, "--dry-run"), 4, "no Ray cluster answers")


def test_the_recipe_may_name_the_engine(
    family: Family, tmp_path: Path, closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before a model is opened: it does not matter here that the second one is missing."""
    pytest.importorskip("ray")
    recipe, out = tmp_path / "ray.yaml", tmp_path / "runs" / "out"
    models = [str(family.folder / "a"), str(tmp_path / "missing")]
    recipe.write_text(yaml.safe_dump({"merge_method": "soup", "models": models, "engine": "ray"}))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    failed(cli("run", recipe, out), 4, "no Ray cluster answers at '127.0.0.1:1'")
    failed(cli("run", recipe, out, "--ray", closed_port), 4, f"answers at '{closed_port}'")
    with pytest.raises(ResourceError, match="no Ray cluster answers"):
        merge_cli.merge(recipe, out)
    assert not out.parent.exists()
    failed(cli("plan", recipe), 3, "missing")  # needs no cluster
    recipe.write_text(recipe.read_text().replace("engine: ray", "engine: local"))
    failed(cli("run", recipe, out), 3, "missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: soup\nmodels: [a, b]\nengine: rya\n", "recipe.yaml:3:9: engine: must be"),
        (
            "merge_method: linear\nmodels: [a, b]\noutput: adapter\nengine: ray\n",
            "recipe.yaml:4:9: engine: adapters are small",
        ),
        (
            "name: one\nmerge_method: soup\nmodels: [a, b]\nengine: ray\n---\n"
            "merge_method: soup\nmodels: [one, b]\n",
            "recipe.yaml:4:1: engine: all documents of a file are merged in one place",
        ),
    ],
)
def test_an_engine_in_the_wrong_place(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    failed(cli("plan", recipe), 2, message)


def test_auto_is_the_address_of_the_environment(
    closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", closed_port)
    with pytest.raises(ResourceError, match=closed_port), connected("auto"):
        pass


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            "auto",
            ConnectionError("Could not find any running Ray instance. Please specify --address."),
            "no Ray cluster runs on this machine, and RAY_ADDRESS names none",
        ),
        (
            "local",
            Exception("The current node timed out during startup."),
            "no Ray cluster can be started here: The current node timed out",
        ),
        ("auto", RuntimeError("Version mismatch"), "can be reached at 'auto': Version mismatch"),
    ],
)
def test_ray_refuses(
    address: str, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own words may be of flags that are not ours, and its exceptions are of any class."""
    ray = pytest.importorskip("ray")

    def init(**_: object) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ResourceError, match=message):
        connected(address).__enter__()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head", "'head' is no address of a Ray cluster"),
        ("head:ray", "'head:ray' is no address"),
        ("127.0.0.1:99999999", "no Ray cluster answers"),
        ("ray://head:10001", "is for Ray's client"),
    ],
)
def test_no_address(address: str, message: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises((UsageError, ResourceError), match=message), connected(address):
        pass


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match=r"pip install 'merge-cli\[ray\]'"), connected("auto"):
        pass


def test_devices_have_no_numbers_on_a_cluster(family: Family, tmp_path: Path) -> None:
    options = MergeOptions(ray="127.0.0.1:1", device="cuda:0")
    with pytest.raises(UsageError, match="Ray numbers the devices"):
        merge_cli.merge(write_recipe(family, "soup"), tmp_path / "out", options=options)


def test_a_probe(tmp_path: Path) -> None:
    path = tmp_path / "probe"
    path.write_bytes(b"driver" + bytes(8))
    assert look(Probe(path, b"driver", 10, b"node")) == ""
    assert path.read_bytes() == b"driver" + bytes(4) + b"node"
    assert "something else" in look(Probe(path, b"others", 10, b"node"))
    assert "does not see" in look(Probe(tmp_path / "no" / "probe", b"driver", 10, b"node"))
    assert "cannot write" in look(Probe(tmp_path, b"driver", 10, b"node"))
