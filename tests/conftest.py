"""Fixtures shared by all tests: a tiny family of models, written straight to safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")

from tests.support.paths import ROOT  # noqa: E402  # after their asserts are registered
from tests.support.tiny import Family, llama_family  # noqa: E402  # after their asserts are registered

# Nothing in the tests may look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several tests run at once: torch's threads would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = (
    "tests.support.compiled",
    "tests.support.hub_server",
    "tests.support.ray_nodes",
    "tests.support.stores",
    "tests.support.coverage_summary",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "write the golden files again instead of comparing with them"
    parser.addoption("--rewrite-golden", action="store_true", help=what)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """A base and three fine-tunes in bfloat16, of a few thousand parameters."""
    return llama_family(tmp_path)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The family of five million parameters, trained on real text."""
    folder = ROOT / "zoo"
    assert (folder / "base" / "model.safetensors").exists(), "the family belongs to the repository"
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """CUDA tests skip where there is no device."""
    wanted = [item for item in items if item.get_closest_marker("cuda")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
