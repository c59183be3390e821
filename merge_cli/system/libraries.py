"""Libraries that are large, and may be missing or broken: torch and transformers.

A merge on a CPU needs neither. What does need one asks for it here first, so that a container
without it, or a CUDA build that cannot be loaded, ends in one sentence that says what to install.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from merge_cli.errors import ResourceError

_INSTALL = {
    "torch": "pip install torch --index-url https://download.pytorch.org/whl/cpu",
    "transformers": "pip install transformers",
}


def library_version(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes as long as all of `--help`

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def unavailable(*names: str) -> str:
    """Why one of these cannot be imported; empty where all can."""
    for name in names:
        try:
            import_module(name)
        except (ImportError, OSError):
            state = "cannot be imported" if library_version(name) else "is not installed"
            return f"{name} {state}"
    return ""


def require(name: str, purpose: str) -> ModuleType:
    """Import torch or transformers.

    Args:
        purpose: what needs it: "evaluating a model".

    Raises:
        ResourceError: it cannot be imported; with what to install.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        raise missing(name, purpose, error) from error


def missing(name: str, purpose: str, error: Exception | None = None) -> ResourceError:
    """What it means that a library cannot be imported.

    Args:
        error: an ImportError; or an OSError, where a shared object of it cannot be loaded; None
            where it is not installed.
    """
    command = _INSTALL.get(name, f"pip install {name}")
    if error is None or library_version(name) is None:
        message = f"{purpose} needs {name}, which is not installed"
        return ResourceError(message, hint=f"Install it: {command}.")
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    message = f"{purpose} needs {name}, which cannot be imported here ({reason})"
    return ResourceError(message, hint=f"Install a build for this machine: {command}.")
