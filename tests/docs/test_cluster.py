"""docs/cluster.md: its batch script and its manifest; and the table of docs/scaling.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.documents import blocks
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The batch script, with commands that note how they are called."""
    (text,) = [block for block in blocks("bash", PAGE) if "#SBATCH" in block]
    path = tmp_path / "merge.sh"
    path.write_text(text, encoding="utf-8")
    commands = {
        "merge-cli": 'echo "$@" > merge.called; trap "exit 130" TERM; '
        "for i in $(seq $LONG); do sleep 0.05; done; exit $CODE",
        "scontrol": 'echo "$@" > scontrol.called',
        "hostname": "echo first",
        "srun": 'echo "$@" > srun.called; exec sleep 60',
        # Two calls until the second node has joined.
        "ray": 'if [ "$1" = status ]; then echo Active:; echo " 1 node_a"; '
        '[ -e asked ] && echo " 1 node_b"; touch asked; '
        'else echo "$@" > ray.called; exec sleep 60; fi',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        command.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    return path


def start(script: Path, *, long: int, code: int) -> subprocess.Popen[bytes]:
    path = f"{script.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    settings = {"SLURM_SUBMIT_DIR": str(script.parent), "SLURM_JOB_ID": "7", "PATH": path}
    settings |= {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "16"}
    settings |= {"LONG": str(long), "CODE": str(code)}
    return subprocess.Popen(
        ["bash", str(script), "r.yaml", "out/x"],
        env={**os.environ, **settings},
        start_new_session=True,
    )


def end(job: subprocess.Popen[bytes]) -> None:
    """End the workers, as SLURM ends what a job leaves behind."""
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.mark.parametrize("code", [0, 4])
def test_the_batch_script_ends_as_the_merge_does(script: Path, code: int) -> None:
    job = start(script, long=1, code=code)
    assert job.wait(30) == code
    end(job)
    folder = script.parent
    assert (folder / "merge.called").read_text() == "run r.yaml out/x --ray auto\n"
    called = (folder / "ray.called").read_text()
    assert called == "start --head --port=6379 --num-cpus=16 --disable-usage-stats --block\n"
    workers = (folder / "srun.called").read_text()
    assert workers.startswith("--nodes=1 --ntasks-per-node=1 --exclude=first ray start")
    assert "--address=first:6379 --num-cpus=16 --block" in workers
    assert not (folder / "scontrol.called").exists()


def test_a_job_that_is_stopped_is_queued_again(script: Path) -> None:
    job = start(script, long=600, code=0)
    until = time.monotonic() + 30
    while not (script.parent / "merge.called").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 130
    end(job)
    assert (script.parent / "scontrol.called").read_text() == "requeue 7\n"


def test_the_manifest_gives_every_pod_the_storage() -> None:
    (text,) = blocks("yaml", PAGE)
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    (folder,) = {
        mount["mountPath"] for pod in pods for mount in pod["containers"][0]["volumeMounts"]
    }
    recipe, out = job["spec"]["entrypoint"].split()[2:4]
    for path in (recipe, out, *(one["value"] for one in pods[0]["containers"][0]["env"])):
        assert path.startswith(f"{folder}/")
    claims = {pod["volumes"][0]["persistentVolumeClaim"]["claimName"] for pod in pods}
    assert len(claims) == 1
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1


@pytest.mark.parametrize(("column", "shared"), [(0, "5,3"), (1, "20,10"), (2, "100,50")])
def test_the_table_of_nodes_is_what_the_script_prints(column: int, shared: str) -> None:
    (command,) = [block for block in blocks("bash", SCALING) if "plan_nodes" in block]
    words = [shared if word == "20,10" else word for word in command.split()[1:]]
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], check=True, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    lines = done.stdout.splitlines()[2:]
    assert len(lines) == 6
    for line in lines:
        method, nodes, minutes, limit = (cell.strip() for cell in line.strip("|").split("|"))
        (row,) = [x for x in SCALING.splitlines() if x.startswith(f"| {method} | {nodes} | ")]
        assert row.strip("|").split("|")[2 + column].strip() == f"{minutes}, {limit}"
