"""Divergence from a teacher: how far a model's predictions are from those it should keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from merge_cli.checkpoint.source import fetch_weights, open_source
from merge_cli.errors import SourceError
from merge_cli.evaluation.digest import model_digest
from merge_cli.evaluation.forward import add_up, forward
from merge_cli.evaluation.live import LiveModel, load
from merge_cli.evaluation.result import Cost, Metric, TaskResult
from merge_cli.evaluation.task import DataTask, Tell, option
from merge_cli.evaluation.tasks.loss import text_windows
from merge_cli.recipe.reference import parse_reference


@dataclass(frozen=True, kw_only=True)
class KL(DataTask):
    """KL(teacher ‖ model) over the whole vocabulary, in nats per token; both models are loaded."""

    kind = "kl"
    metrics = ("kl", "agreement")
    version = 2

    teacher: str = option(help="the model to imitate: a folder or a Hub id")
    folder: Path = option(Path(), "where the teacher's relative path starts")
    stride: int | None = option(None, "as for loss", least=1)

    unshared = DataTask.unshared | {"teacher", "folder"}

    def data_digest(self) -> str:
        source = open_source(parse_reference(self.teacher, self.folder), self.folder)
        fetch_weights(source, source.header_bytes)
        return f"{super().data_digest()} {model_digest(source.root)}"

    def score(self, live: LiveModel, tell: Tell) -> TaskResult:
        import torch

        with self._teacher(live) as teacher:
            length = min(live.max_length, teacher.max_length)
            rows, encoded, items = text_windows(self, live, self.stride, length)
            nats = torch.zeros(len(rows), dtype=torch.float64)
            agree = torch.zeros(len(rows), dtype=torch.float64)
            # Both run through the same windows in the same batches.
            pairs = zip(
                forward(live, items, tell), forward(teacher, items, lambda *_: None), strict=True
            )
            for ours, theirs in pairs:
                q = ours.logits.log_softmax(-1)
                p = theirs.logits.to(q.device).log_softmax(-1)
                divergence = torch.nn.functional.kl_div(
                    q, p, log_target=True, reduction="none"
                ).sum(-1)
                nats += add_up(divergence, ours.examples, len(rows))
                same = q.argmax(-1) == p.argmax(-1)
                agree += add_up(same, ours.examples, len(rows))
            live.count(teacher.cost.tokens, teacher.cost.forward_passes)
        tokens = [float(max(0, len(row.ids) - row.first)) for row in encoded]
        metrics = {
            "kl": Metric("kl", "nats per token", "lower", nats.tolist(), tokens),
            "agreement": Metric("agreement", "of tokens", "higher", agree.tolist(), tokens),
        }
        examples = [
            {"line": row.line, "kl": float(nat), "agree": int(same), "tokens": int(token)}
            for row, nat, same, token in zip(rows, nats, agree, tokens, strict=True)
        ]
        return TaskResult(self.name, self.kind, metrics, examples)

    @contextmanager
    def _teacher(self, live: LiveModel) -> Iterator[LiveModel]:
        known = live.teachers
        if known is not None and self.teacher in known:
            known[self.teacher].cost = Cost()
            yield known[self.teacher]
            return
        source = open_source(parse_reference(self.teacher, self.folder), self.folder)
        teacher = load(
            source,
            device=live.place,
            dtype=live.dtype.partition(" ")[0],
            max_length=live.max_length,
            batch_tokens=live.batch_tokens,
            seed=live.seed,
        )
        try:
            if teacher.vocabulary != live.vocabulary or (
                teacher.tokenizer.get_vocab() != live.tokenizer.get_vocab()
            ):
                what = f"the teacher {self.teacher} has another vocabulary ({teacher.vocabulary:,} "
                what += f"entries against {live.vocabulary:,}): their predictions do not compare"
                hint = "Use a loss, with its bits per byte."
                raise SourceError(what, model=live.label, hint=hint)
            yield teacher
            if known is not None:
                known[self.teacher] = teacher
        finally:
            if known is None or self.teacher not in known:
                teacher.close()
