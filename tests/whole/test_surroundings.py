"""No home, no cache, nothing writable but OUT, no more threads: the work is done all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_cli.engine.pool import Pool
from merge_cli.errors import ResourceError
from merge_cli.evaluation import cache
from merge_cli.evaluation.result import Cost, Metric, TaskResult
from merge_cli.kernels.compiled import kernel as kernel_module
from merge_cli.system import caches, notices
from merge_cli.system import machine as home
from tests.support.command import cli
from tests.support.tiny import Family


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is said once."""
    found: list[str] = []
    monkeypatch.setattr(notices, "_given", {})
    notices.send_notices(found.append)
    yield found
    notices.send_notices(None)


def homeless(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", _unknown)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))


def _unknown(number: int) -> None:
    raise KeyError(number)


def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    homeless(monkeypatch, tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MERGE_CLI_CACHE", raising=False)
    own = tmp_path / f"merge-cli-{os.getuid()}"
    assert caches.cache_folder() == own / ".cache" / "merge-cli"
    assert own.stat().st_mode & 0o77 == 0
    home.settle_home()
    assert os.environ["HOME"] == str(own)
    assert said == [f"there is no home folder: caches are kept in {own}. Set HOME to choose one."]


@pytest.mark.parametrize("trap", ["link", "open to others", "file", "nothing can be written"])
def test_a_stand_in_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    """Whoever else may write there could have us believe their results."""
    homeless(monkeypatch, tmp_path)
    own = tmp_path / f"merge-cli-{os.getuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir()
        own.symlink_to(tmp_path / "elsewhere")
    elif trap == "file":
        own.touch()
    elif trap == "open to others":
        own.mkdir()
        own.chmod(0o777)
    else:
        monkeypatch.setattr("tempfile.gettempdir", _nowhere)
    assert home.home_folder() == Path("/nonexistent")


def _nowhere() -> str:
    raise FileNotFoundError(2, "No usable temporary directory found")


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "file" / "cache"))
    metric = Metric("loss", "nats", "lower", [1.0], [1.0])
    for key in ("aa", "bb"):
        cache.keep(key, TaskResult("t", "loss", {"loss": metric}, [], Cost()))
        assert cache.find(key, "t") is None
    assert len(said) == 1
    assert "Set MERGE_CLI_CACHE" in said[0]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("cannot cache function 'f': no locator available"),
     OSError(28, "No space left on device"), EOFError("Ran out of input")],
)  # fmt: skip
def test_loops_that_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, said: list[str], error: Exception
) -> None:
    import numba

    real = numba.njit

    def unkept(*given: Any, cache: bool = False, **options: Any) -> Callable[..., Any]:
        if cache:
            raise error
        return real(*given, **options)

    monkeypatch.setattr(numba, "njit", unkept)
    for _ in range(2):
        twice = kernel_module.kernel("int64(int64)")(lambda x: 2 * x)
        assert twice(21) == 42
    assert said == [kernel_module._UNKEPT]
    assert "NUMBA_CACHE_DIR" in said[0]


def test_another_error_of_numba_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(numba, "njit", broken)
    with pytest.raises(RuntimeError, match="something else"):
        kernel_module.kernel("int64(int64)")(lambda x: x).load()


def limit_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) >= most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)


class _NoLane:
    def __init__(self) -> None:
        self.clock = self

    def measure(self, work: Callable[[], object]) -> None:
        work()

    def active(self) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def close(self) -> None:
        pass


def test_fewer_threads_than_wanted(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    limit_threads(monkeypatch, 2)
    with Pool(lambda number: _NoLane(), 5) as pool:  # type: ignore[arg-type,return-value]
        assert pool.map(lambda x: x * x, range(20)) == [x * x for x in range(20)]
        assert pool.threads == 2
    assert said == ["only 2 threads could be started"]


def test_no_thread_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_threads(monkeypatch, 0)
    with pytest.raises(ResourceError, match="no thread can be started"):
        Pool(lambda number: _NoLane(), 3).__enter__()  # type: ignore[arg-type,return-value]


SEALED = """
mount --bind {place} {place} && : > {place}/nobody && mount --bind {place}/nobody /etc/passwd &&
mount -o remount,bind,ro / && cd / && ! touch {parent}/x 2>/dev/null && exec "$@"
"""


def sealed(place: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command where the whole file system but `place` can only be read."""
    enter = SEALED.format(place=place, parent=place.parent)
    bare = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    bare["NUMBA_CACHE_DIR"] = "/nonexistent"
    bare["PYTHONPATH"] = str(Path(home.__file__).parents[1])
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", enter, "sh", *map(str, command)],
        capture_output=True, text=True, timeout=300, env=bare,
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The only folder that `sealed` can write to."""
    found = tmp_path / "results"
    found.mkdir()
    if not shutil.which("unshare") or sealed(found, "true").returncode:
        pytest.skip("no mounts may be made here")
    return found


def test_nothing_can_be_written_but_out(family: Family, tmp_path: Path, place: Path) -> None:
    recipe = family.recipe("soup", base=False)
    done = sealed(place, sys.executable, "-m", "merge_cli", "run", recipe, place / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiling the loops of this method") == 1
    here = cli("run", recipe, tmp_path / "out")
    assert here.returncode == 0, here.stderr
    same = [(p / "out" / "model.safetensors").read_bytes() for p in (place, tmp_path)]
    assert same[0] == same[1]


def test_an_evaluation_without_any_cache(zoo: Path, place: Path) -> None:
    data = place / "data.jsonl"
    data.write_text('{"text": "a few words"}\n')
    done = sealed(
        place, sys.executable, "-m", "merge_cli", "evaluate", zoo / "base", "--data", data, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("results are not kept") == 1
    assert '"loss"' in done.stdout
