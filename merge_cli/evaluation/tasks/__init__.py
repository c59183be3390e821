"""The kinds of tasks, by the name that an evaluation file uses."""

from __future__ import annotations

from merge_cli.evaluation.task import Task
from merge_cli.evaluation.tasks.exact_match import ExactMatch
from merge_cli.evaluation.tasks.harness import Harness
from merge_cli.evaluation.tasks.kl import KL
from merge_cli.evaluation.tasks.loss import LossTask
from merge_cli.evaluation.tasks.multiple_choice import MultipleChoice
from merge_cli.evaluation.tasks.python import PythonTask

KINDS: dict[str, type[Task]] = {
    task.kind: task for task in (LossTask, KL, MultipleChoice, ExactMatch, Harness, PythonTask)
}
