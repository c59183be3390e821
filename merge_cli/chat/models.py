"""Opening models to talk to, and checking what can be checked before any weights are fetched.

A model with an adapter (`base+adapter`) is merged into a temporary folder first, by the engine, so
that what answers is what a merge of the two would publish.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_cli.chat.conversation import Conversation
from merge_cli.checkpoint.class_config import refuse_code
from merge_cli.checkpoint.config import text_config
from merge_cli.engine.merge import execute
from merge_cli.errors import UsageError
from merge_cli.evaluation.guards import memory_errors
from merge_cli.evaluation.live import LiveModel, load, load_tokenizer
from merge_cli.options import MergeOptions, OnProgress, ignore_progress
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source, fetch_weights
from merge_cli.system.libraries import require

_USUAL = 4096  # tokens of context that are used at most (evaluation.live)
_SMALLER = "Try --dtype bfloat16, --max-memory, or a smaller --max-tokens."


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded: as in `evaluation.live.load`."""

    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None


@dataclass(frozen=True)
class OpenedModel:
    """A model whose headers and tokenizer have been read, and not yet its weights."""

    source: Source
    tokenizer: Any

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def has_template(self) -> bool:
        """Whether its tokenizer can write conversations."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def conversation(
        self, *, template: bool, system: str = "", live: LiveModel | None = None
    ) -> Conversation:
        """An empty conversation with it.

        Args:
            template: whether to use the chat template, if it has one.
            live: the loaded model. Without it the context is what the config says, and tokens are
                not looked for among the embeddings.
        """
        return Conversation(
            self.label,
            self.tokenizer,
            context=live.max_length if live else _context(self.source.config),
            entries=live.entries if live else None,
            template=template and self.has_template,
            system=system,
        )


def open_models(names: Sequence[str]) -> list[OpenedModel]:
    """Open models by their headers and load their tokenizers.

    Args:
        names: folders or Hub ids, each with `+adapter` if need be, all different.

    Raises:
        UsageError: a model is named twice.
        SourceError: a model that cannot be used, or one that needs its own code.
    """
    if len(set(names)) < len(names):
        raise UsageError("a model is compared with itself", where=names[0])
    require("torch", "running a model")
    folder = Path.cwd()
    opened = []
    for name in names:
        source = open_source(parse_reference(name, folder), folder)
        refuse_code(source.config, source.label)
        opened.append(OpenedModel(source, load_tokenizer(source)))
    return opened


@contextmanager
def loaded(
    models: Sequence[OpenedModel],
    options: LoadOptions,
    on_progress: OnProgress = ignore_progress,
) -> Iterator[list[LiveModel]]:
    """Fetch and load the weights of opened models, and free them at the end.

    Raises:
        SourceError, ResourceError: as `evaluation.live.load` does.
    """
    with ExitStack() as stack:
        live = []
        for model in models:
            source = _without_adapter(model.source, stack, on_progress)
            fetch_weights(source, source.header_bytes)
            with memory_errors(model.label, _SMALLER):
                net = load(
                    source,
                    device=options.device,
                    dtype=options.dtype,
                    memory=options.memory,
                )
            stack.callback(net.close)
            live.append(net)
        yield live


def _context(config: Mapping[str, Any]) -> int:
    """The context that a config names; what it leaves to its class is taken as the usual one."""
    text = text_config(config)
    lengths = [text.get(key) for key in ("max_position_embeddings", "n_positions")]
    return min([_USUAL, *(length for length in lengths if isinstance(length, int) and length > 0)])


def _without_adapter(source: Source, stack: ExitStack, on_progress: OnProgress) -> Source:
    """The source itself, or the folder that it and its adapter are merged into."""
    if source.adapter is None:
        return source
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="merge-cli-chat-")))
    plan = make_plan(load_recipe({"merge_method": "passthrough", "models": [source.label]}))
    options = MergeOptions(overwrite=True, statistics=False, model_card=False)
    merged = execute(
        plan, folder / "model", options, on_progress=on_progress, finish=lambda *outcome: None
    )
    return replace(open_source(ModelRef(str(merged)), folder), label=source.label)
