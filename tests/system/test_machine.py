"""What a process may use: fake /proc and /sys trees, as containers and batch systems show them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_cli.system.machine import free_memory, library_threads, torch_threads, usable_cores

GB = 10**9
NOBODY: dict[str, str] = {}  # an environment without a batch system


class Tree:
    """A root folder with /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, available: int = 64 * GB) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable: {available // 1024} kB\n")

    def write(self, path: str, text: str | int) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")

    def version_2(self, path: str, mounted: str = "/", mount: str = "/sys/fs/cgroup") -> None:
        self.write("proc/self/cgroup", f"0::{path}")
        line = f"30 23 0:26 {mounted} {mount} ro,nosuid - cgroup2 cgroup rw,nsdelegate"
        self.write("proc/self/mountinfo", f"29 1 8:1 / / rw - ext4 /dev/sda rw\n{line}")

    def version_1(self, path: str, mounted: str = "/") -> None:
        self.write("proc/self/cgroup", f"9:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/x")
        lines = [
            f"33 31 0:30 {mounted} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
            f"35 31 0:32 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
            "38 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        ]
        self.write("proc/self/mountinfo", "\n".join(lines))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    return Tree(tmp_path)


def test_without_limits_the_machine_is_ours(tree: Tree) -> None:
    tree.version_2("/")
    tree.write("sys/fs/cgroup/cpu.max", "max 100000")
    tree.write("sys/fs/cgroup/memory.max", "max")
    tree.write("sys/fs/cgroup/memory.current", 3 * GB)
    assert usable_cores(tree.root, NOBODY) == 64
    assert free_memory(tree.root) == 64 * GB // 1024 * 1024


def test_no_proc_at_all(tmp_path: Path) -> None:
    """As on macOS: what is installed."""
    assert usable_cores(tmp_path, NOBODY) >= 1
    assert free_memory(tmp_path) > 10**8


@pytest.mark.parametrize(("quota", "cores"), [(50_000, 1), (400_000, 4), (250_000, 3), (1, 1)])
def test_version_2_quota(tree: Tree, quota: int, cores: int) -> None:
    tree.version_2("/")
    tree.write("sys/fs/cgroup/cpu.max", f"{quota} 100000")
    assert usable_cores(tree.root, NOBODY) == cores


def test_version_2_groups_above_bind_too(tree: Tree) -> None:
    """SLURM limits the job, and its steps and tasks are groups below without a limit."""
    tree.version_2("/slurm/job_7/step_0/task_0")
    for path in ("", "slurm/", "slurm/job_7/", "slurm/job_7/step_0/", "slurm/job_7/step_0/task_0/"):
        limited = path == "slurm/job_7/"
        tree.write(f"sys/fs/cgroup/{path}cpu.max", f"{'600000' if limited else 'max'} 100000")
        tree.write(f"sys/fs/cgroup/{path}memory.max", 8 * GB if limited else "max")
        tree.write(f"sys/fs/cgroup/{path}memory.current", 5 * GB)
        tree.write(f"sys/fs/cgroup/{path}memory.stat", "anon 1\nfile 9\ninactive_file 1000000000")
    assert usable_cores(tree.root, NOBODY) == 6
    assert free_memory(tree.root) == 4 * GB


def test_version_2_high_counts_as_a_limit(tree: Tree) -> None:
    tree.version_2("/")
    tree.write("sys/fs/cgroup/memory.max", 8 * GB)
    tree.write("sys/fs/cgroup/memory.high", 6 * GB)
    tree.write("sys/fs/cgroup/memory.current", 5 * GB)
    tree.write("sys/fs/cgroup/memory.stat", f"anon 3\nactive_file {GB}\ninactive_file {GB}")
    assert free_memory(tree.root) == 3 * GB


def test_version_1(tree: Tree) -> None:
    tree.version_1("/docker/abc")
    for controller in ("cpu,cpuacct", "memory"):
        tree.write(f"sys/fs/cgroup/{controller}/docker/abc/tasks", "1")
    tree.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "150000")
    tree.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000")
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1")
    tree.write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", 4 * GB)
    tree.write("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", 3 * GB)
    stat = f"cache 5\ninactive_file 1\ntotal_inactive_file {GB}\ntotal_active_file {GB}"
    tree.write("sys/fs/cgroup/memory/docker/abc/memory.stat", stat)
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 2**63 - 4096)
    tree.write("sys/fs/cgroup/memory/memory.usage_in_bytes", 50 * GB)
    assert usable_cores(tree.root, NOBODY) == 2
    assert free_memory(tree.root) == 3 * GB


def test_version_1_inside_a_container(tree: Tree) -> None:
    """The path is the host's, and what is mounted is our own group alone."""
    tree.version_1("/docker/abc", mounted="/docker/abc")
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000")
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 2**63 - 4096)
    tree.write("sys/fs/cgroup/memory/memory.usage_in_bytes", GB)
    # A limit of a group above, which cannot be seen.
    tree.write("sys/fs/cgroup/memory/memory.stat", f"hierarchical_memory_limit {2 * GB}")
    assert usable_cores(tree.root, NOBODY) == 3
    assert free_memory(tree.root) == GB


def test_a_path_that_is_not_mounted(tree: Tree) -> None:
    """Another namespace's path: what is mounted is what binds."""
    tree.version_2("/../../kubepods/pod1")
    tree.write("sys/fs/cgroup/cpu.max", "200000 100000")
    assert usable_cores(tree.root, NOBODY) == 2


def test_a_mount_with_a_space(tree: Tree) -> None:
    tree.version_2("/", mount="/sys/fs/my\\040groups")
    tree.write("sys/fs/my groups/cpu.max", "200000 100000")
    assert usable_cores(tree.root, NOBODY) == 2


@pytest.mark.parametrize("text", ["", "max", "x y", "-1 100000", "100000 0", "1 2 3"])
def test_files_that_say_nothing(tree: Tree, text: str) -> None:
    tree.version_2("/")
    tree.write("sys/fs/cgroup/cpu.max", text)
    tree.write("sys/fs/cgroup/memory.max", text)
    tree.write("sys/fs/cgroup/memory.current", text)
    assert usable_cores(tree.root, NOBODY) == 64
    assert free_memory(tree.root) > 63 * GB


def test_more_used_than_allowed(tree: Tree) -> None:
    tree.version_2("/")
    tree.write("sys/fs/cgroup/memory.max", GB)
    tree.write("sys/fs/cgroup/memory.current", 2 * GB)
    assert free_memory(tree.root) == 0


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "8"}, 8),
        ({"SLURM_CPUS_ON_NODE": "16"}, 16),
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "32"}, 8),
        ({"SLURM_CPUS_PER_TASK": "many"}, 64),
        ({"SLURM_CPUS_PER_TASK": "0"}, 64),
        ({"SLURM_CPUS_PER_TASK": "128"}, 64),
        ({"SLURM_CPUS_PER_TASK": "9" * 5000}, 64),
        ({"OMP_NUM_THREADS": "1"}, 64),  # says what libraries do, and torchrun sets it to 1
    ],
)
def test_batch_systems(tree: Tree, environment: dict[str, str], cores: int) -> None:
    assert usable_cores(tree.root, environment) == cores


def test_the_environment_has_the_last_word_on_libraries(tree: Tree) -> None:
    tree.version_2("/")
    tree.write("sys/fs/cgroup/cpu.max", "200000 100000")
    assert library_threads(tree.root, NOBODY) == 2
    assert library_threads(tree.root, {"OMP_NUM_THREADS": "6,2"}) is None
    assert library_threads(tree.root, {"MKL_NUM_THREADS": "6"}) is None
    assert library_threads(tree.root, {"OMP_NUM_THREADS": "auto"}) == 2


def test_torch_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr("merge_cli.system.machine.usable_cores", lambda *_: 3)
    torch.set_num_threads(8)
    try:
        with torch_threads():
            assert torch.get_num_threads() == 3
        with torch_threads(10**30):  # more than the system may have
            assert torch.get_num_threads() == max(1024, os.cpu_count() or 1)
        with torch_threads(5):
            assert torch.get_num_threads() == 5
        assert torch.get_num_threads() == 8
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        with torch_threads():
            assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)
