"""What the passes over an adapter write into: a model with what is applied of the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import Problem


@dataclass
class ModelDraft:
    """A model's tensors, and what has become of them.

    Attributes:
        label: the model with its adapter, for messages.
        fingerprint: of the adapter's weights.
        touched: names of tensors that the adapter has replaced or updated.
        changes: keys of the model's config that follow.
    """

    tensors: dict[str, Tensor]
    label: str
    fingerprint: str
    touched: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def untied(self) -> bool:
        """Whether the adapter has separated the head from the embedding."""
        return "tie_word_embeddings" in self.changes

    def refuse(self, name: str, why: str, hint: str = "") -> None:
        """A tensor or module that cannot be used as it is."""
        self.problems.append(Problem(f"{self.label}: {why}", name, hint=hint))
