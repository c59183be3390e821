"""The task `kl`: the divergence of a model's predictions from a teacher's."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import SourceError
from merge_cli.evaluation.fingerprints import source_fingerprint
from merge_cli.evaluation.forward import Example, Window, add_up, forward, require_finite
from merge_cli.evaluation.live import LiveModel, load, load_tokenizer
from merge_cli.evaluation.result import Cost, Metric, TaskResult
from merge_cli.evaluation.task import DataTask, OnProgress
from merge_cli.evaluation.tasks.loss import text_windows, window_notes
from merge_cli.evaluation.teachers import KeptPredictions, Teacher
from merge_cli.recipe.forms import Text
from merge_cli.recipe.reference import parse_reference
from merge_cli.recipe.sections import option
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source, fetch_weights

# examples [n], divergence [n], whether the likeliest token is the same [n]
Compared = tuple[Any, Any, Any]


@dataclass(frozen=True, kw_only=True)
class KL(DataTask):
    """KL(teacher ‖ model) in nats per token, over the whole vocabulary or `top_k` and the rest.

    Over the whole vocabulary both models are loaded. With `top_k` the teacher's predictions are
    cached on disk for all models and runs, and shared with `dam`; all other tokens together are one
    bin, so that the number is a lower bound.
    """

    kind = "kl"
    metrics = ("kl", "agreement")
    version = 3

    teacher: str = option(help="the model to imitate: a folder or a Hub id", form=Text(line=True))
    folder: Path = option(Path(), "where the teacher's relative path starts")
    stride: int | None = option(None, "as for loss", least=1)
    top_k: int | None = option(
        None, "keep the teacher's likeliest tokens on disk, not the teacher in memory", least=1
    )

    not_in_identity = DataTask.not_in_identity | {"teacher", "folder"}

    def models(self) -> tuple[Source, ...]:
        return (self._source(),)

    def data_digest(self) -> str:
        source = self._source()
        fetch_weights(source, source.header_bytes)
        return f"{super().data_digest()} {source_fingerprint(source)}"

    def score(self, live: LiveModel, on_progress: OnProgress) -> TaskResult:
        length = live.max_length
        if self.top_k is None:
            with self._loaded_teacher(live) as teacher:
                length = min(length, teacher.max_length)
                rows, encoded, items = text_windows(self, live, self.stride, length)
                nats, agree = _sums(_full_divergence(live, teacher, items, on_progress), len(rows))
                live.count(teacher.cost.tokens, teacher.cost.forward_passes)
        else:
            rows, encoded, items = text_windows(self, live, self.stride)
            nats, agree = _sums(self._binned(live, items, on_progress), len(rows))
        tokens = [float(max(0, len(row.ids) - row.first)) for row in encoded]
        metrics = {
            "kl": Metric("kl", "nats per token", "lower", nats, tokens),
            "agreement": Metric("agreement", "of tokens", "higher", agree, tokens),
        }
        examples = [
            {"line": row.line, "kl": nat, "agree": int(same), "tokens": int(token)}
            for row, nat, same, token in zip(rows, nats, agree, tokens, strict=True)
        ]
        notes = window_notes(encoded, length)
        return TaskResult(self.name, self.kind, metrics, examples, notes=notes)

    def check(self, live: LiveModel) -> None:
        text_windows(self, live, self.stride)

    def _source(self) -> Source:
        return open_source(parse_reference(self.teacher, self.folder), self.folder)

    def _binned(
        self, live: LiveModel, windows: Sequence[Window], on_progress: OnProgress
    ) -> Iterator[Compared]:
        """Over the teacher's likeliest tokens, and one bin for all others."""
        import torch

        source = self._source()
        fetch_weights(source, source.header_bytes)
        text_config = source.config.get("text_config") or source.config
        size = text_config.get("vocab_size", live.vocabulary)
        self._refuse_other_vocabulary(live, load_tokenizer(source), int(size))
        dtype = live.dtype.partition(" ")[0]
        teacher = Teacher(source, source_fingerprint(source), live.input_device, dtype)
        examples = [Example(array("q", window.ids), window.first) for window in windows]
        settings = KeptPredictions(self.top_k, 1.0, "float32")
        predictions = teacher.predictions(examples, settings, lambda *_: None)
        teacher.close()
        live.count(teacher.tokens, teacher.passes)
        numbers = {id(window): i for i, window in enumerate(windows)}
        for batch in forward(live, windows, on_progress):
            parts = [predictions.of(numbers[id(window)]) for window in batch.windows]
            ids = torch.cat([values for values, _, _ in parts]).long().to(batch.logits.device)
            p = torch.cat([values for _, values, _ in parts]).to(batch.logits.device)
            log_q = batch.logits.log_softmax(-1)
            divergence = (p.exp() * (p - log_q.gather(-1, ids))).sum(-1)
            if parts[0][2] is not None:
                tail = torch.cat([values for _, _, values in parts]).to(p.device)
                other_mass = log_q.scatter(-1, ids, float("-inf")).logsumexp(-1)
                # A tail of no mass adds nothing, whatever its logarithm.
                divergence += torch.where(tail.isfinite(), tail.exp() * (tail - other_mass), 0.0)
            require_finite(divergence, live.label)  # the teacher's part is finite, or not kept
            same = log_q.argmax(-1) == ids.gather(-1, p.argmax(-1, keepdim=True))[:, 0]
            yield batch.examples, divergence, same

    @contextmanager
    def _loaded_teacher(self, live: LiveModel) -> Iterator[LiveModel]:
        """The teacher, loaded."""
        loaded = live.teachers
        if loaded is not None and self.teacher in loaded:
            loaded[self.teacher].cost = Cost()
            yield loaded[self.teacher]
            return
        teacher = load(
            self._source(),
            device=live.input_device,
            dtype=live.dtype.partition(" ")[0],
            max_length=live.max_length,
            batch_tokens=live.batch_tokens,
            seed=live.seed,
        )
        try:
            self._refuse_other_vocabulary(live, teacher.tokenizer, teacher.vocabulary)
            yield teacher
            if loaded is not None:
                loaded[self.teacher] = teacher
        finally:
            if loaded is None or self.teacher not in loaded:
                teacher.close()

    def _refuse_other_vocabulary(self, live: LiveModel, tokenizer: Any, size: int) -> None:
        if size == live.vocabulary and tokenizer.get_vocab() == live.tokenizer.get_vocab():
            return
        message = f"the teacher {self.teacher} has another vocabulary ({size:,} "
        message += f"entries against {live.vocabulary:,}): their predictions do not compare"
        hint = "Use a loss, with its bits per byte."
        raise SourceError(message, model=live.label, hint=hint)


def _full_divergence(
    live: LiveModel, teacher: LiveModel, items: Sequence[Window], on_progress: OnProgress
) -> Iterator[Compared]:
    """Over the whole vocabulary: both models run through the same windows in the same batches."""
    import torch

    pairs = zip(
        forward(live, items, on_progress), forward(teacher, items, lambda *_: None), strict=True
    )
    for batch, teacher_batch in pairs:
        q = batch.logits.log_softmax(-1)
        p = teacher_batch.logits.to(q.device).log_softmax(-1)
        divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        if not bool(divergence.isfinite().all()):
            require_finite(teacher_batch.logits, teacher.label)
            require_finite(divergence, live.label)
        yield batch.examples, divergence, q.argmax(-1) == p.argmax(-1)


def _sums(compared: Iterator[Compared], count: int) -> tuple[list[float], list[float]]:
    """Nats and agreements of each example."""
    import torch

    nats, agree = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    for examples, divergence, same in compared:
        nats += add_up(divergence, examples, count)
        agree += add_up(same, examples, count)
    return nats.tolist(), agree.tolist()
