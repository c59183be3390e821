"""Commands for processes of our own: this Python, this package, and no folder that a user is in.

`python -m` and `python -c` look for modules in the working directory first. That may be the folder
of a model, where a file called `torch.py` would be run. The child gets the parent's path instead.
"""

from __future__ import annotations

import sys


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as `__main__`, with this process's `sys.path`."""
    path = [entry for entry in sys.path if entry]  # "" is the working directory
    code = f"import sys; sys.path[:] = {path!r}; import runpy; "
    code += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code, *arguments]
