"""Libraries that may be missing: what is said of them."""

from __future__ import annotations

import sys

import pytest

from merge_cli.errors import ResourceError
from merge_cli.system.libraries import library_version, require, unavailable


def test_what_is_there_is_imported() -> None:
    assert require("json", "reading") is sys.modules["json"]
    assert unavailable("json", "math") == ""
    assert library_version("numpy")
    assert library_version("no-such-package") is None


def test_what_is_not_installed_is_named_with_a_command() -> None:
    with pytest.raises(ResourceError) as error:
        require("no_such_package", "this test")
    assert str(error.value) == (
        "this test needs no_such_package, which is not installed — "
        "Install it: pip install no_such_package."
    )
    assert unavailable("json", "no_such_package") == "no_such_package is not installed"


def test_what_is_installed_and_broken_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise OSError(f"lib{name}.so: cannot open shared object file\nand more")

    monkeypatch.setattr("merge_cli.system.libraries.import_module", broken)
    with pytest.raises(ResourceError, match=r"cannot be imported here \(libtorch.so: .* file\)"):
        require("torch", "running a model")
    assert unavailable("torch") == "torch cannot be imported"
