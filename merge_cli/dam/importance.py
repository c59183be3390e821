"""Where to begin: each source's coefficients as its share of the importance, before any training.

A Fisher merge (Matena and Raffel, arXiv:2111.09832) weights every element of every source by how
much the likelihood of that source's own data hangs on it. Added up over what one coefficient
covers, the same importances are coefficients:

    c_i = F_i / sum of F_j        F_i = mean over examples of the squared gradient of the
                                        log-likelihood, each source's mean over all of them being 1

They sum to 1, so they mean the same to both forms of the merge. One model is in memory: the student
becomes each source in turn. What is held are sums by coefficient, not by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from merge_cli.dam.data import Dataset
from merge_cli.dam.distributed import World
from merge_cli.dam.forward import Forward, LossSums
from merge_cli.dam.heldout import BatchItem, batch_of
from merge_cli.dam.losses import DistillationLoss
from merge_cli.dam.student import Student
from merge_cli.data.sequences import within
from merge_cli.errors import Interrupted

FISHER = "fisher"  # as `start` and as a merge without training
TOKENS = 4096  # of each source's train rows
_EPSILON = 1e-6  # where no source's likelihood hangs on anything, all count alike
_LIKELIHOOD = DistillationLoss({"cross_entropy": 1.0})


def has_importances(datasets: Sequence[Dataset], sources: int) -> bool:
    """Whether every source has data of its own to be asked about."""
    return {dataset.source for dataset in datasets} == set(range(sources))


def fisher_shares(
    student: Student,
    forward: Forward,
    datasets: Sequence[Dataset],
    world: World,
    *,
    on_progress: Callable[[int, int, str], None],
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Each source's share of the importance of what a coefficient covers.

    The student holds the last source afterwards. Processes divide the examples.

    Args:
        datasets: one for each source.
        on_progress: called with tokens done, tokens in all, and whose they are.

    Returns:
        [sources, *layout.inner] by the name of each tensor that is learned.

    Raises:
        Interrupted: `stopping` says so.
    """
    import torch

    ordered = sorted(datasets, key=lambda dataset: dataset.source)
    examples = [within(dataset.train, TOKENS) for dataset in ordered]
    total = sum(len(example.ids) for rows in examples for example in rows)
    done, sums = 0, []
    for dataset, rows in zip(ordered, examples, strict=True):
        on_progress(min(done, total), total, dataset.name)
        alone = [float(other is dataset) for other in ordered]
        student.write_mixture(0.0, alone)
        with student.summing_squares() as squares:
            for example in rows[world.rank :: world.size]:
                if world.size == 1 and stopping():
                    message = "stopped while importances were measured"
                    raise Interrupted(message, hint="The same command continues.")
                batch = batch_of([BatchItem(example, None, 1.0)])
                forward.loss(batch, _LIKELIHOOD, LossSums()).backward()
                done += len(example.ids) * world.size
                on_progress(min(done, total), total, dataset.name)
        world.add_up(list(squares.values()), gradients=False)
        sums.append(squares)
    elements = sum(
        student.coefficients[name].layout.rows * student.coefficients[name].layout.columns
        for name in student.trained
    )
    means = [
        sum(float(part.double().sum()) for part in of_source.values()) / elements
        for of_source in sums
    ]
    shares = {}
    for name in student.trained:
        layout = student.coefficients[name].layout
        covered = layout.rows * layout.columns / (layout.inner[0] * layout.inner[1])
        scaled = torch.stack(
            [
                squares[name] / covered / (mean or 1.0) + _EPSILON
                for squares, mean in zip(sums, means, strict=True)
            ]
        )
        shares[name] = scaled / scaled.sum(0)
    return shares
