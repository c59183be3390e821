"""A student put together from a plan: net, coefficients, sources, hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.dam.coefficients import Coefficients
from merge_cli.dam.models import TargetParameter, load_student, parameter_count, stored_tensors
from merge_cli.dam.optimizers import CoefficientOptimizer
from merge_cli.dam.sources import Sources
from merge_cli.dam.student import MergedParameter, Student
from merge_cli.engine.memory import keep_freed_memory, return_freed_memory
from merge_cli.engine.parameter_slices import find_parameter_slices
from merge_cli.engine.residency import SourceResidency
from merge_cli.planning.plan import Plan
from merge_cli.recipe.training import Training

# Bytes of a student up to which freed memory is kept: a third of a small one's time went into
# getting the same pages from the system again and again.
_SMALL = 1 << 28


def initial_coefficients(
    targets: Sequence[TargetParameter], training: Training, seed: int, device: Any, dtype: Any
) -> dict[str, Coefficients]:
    """Every target's coefficients at the start; those that are not learned stay like this."""
    import torch

    wide = dtype if dtype == torch.float64 else torch.float32
    return {
        target.name: Coefficients(
            target.name, target.layout, len(target.task.operands), training, seed, device, wide
        )
        for target in targets
    }


def assemble(
    plan: Plan,
    targets: Sequence[TargetParameter],
    training: Training,
    residency: SourceResidency,
    device: str,
    dtype: Any,
) -> Student:
    """The student, its parameters holding the merge with the coefficients at the start.

    Args:
        dtype: torch's, of the net; coefficients and projections are float32, or float64 with it.
    """
    if 4 * parameter_count(targets) < _SMALL:
        keep_freed_memory()
    else:
        return_freed_memory()
    net = load_student(plan, device, dtype)
    slices = find_parameter_slices(plan, net)
    coefficients = initial_coefficients(targets, training, plan.recipe.seed, device, dtype)
    wide = next(iter(coefficients.values())).raw.dtype
    sources = Sources(
        stored_tensors(plan, targets),
        residency,
        device,
        wide,
        with_base=training.form == "task_vector",
    )
    merged_parameters = [
        MergedParameter(
            slices[target.name].parameter, slices[target.name].index, target.name, target.trained
        )
        for target in targets
        if target.held
    ]
    student = Student(
        net,
        merged_parameters,
        coefficients,
        sources,
        form=training.form,
        optimizer=CoefficientOptimizer(training),
        penalties=training.regularize,
        penalize=training.penalize,
    )
    if training.checkpointing:
        net.train()  # transformers checkpoints in training mode alone; dropout is 0 in the config
        enable_checkpointing(net)
    student.write_all()
    return student


def enable_checkpointing(net: Any) -> None:
    """Non-reentrant: a reentrant one would run hooks before a gradient is complete."""
    settings = {"use_reentrant": False}
    if hasattr(net, "activation_checkpointing_enable"):  # its name since transformers 5.20
        net.activation_checkpointing_enable(settings)
    else:
        net.gradient_checkpointing_enable(settings)
