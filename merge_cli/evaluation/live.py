"""A model that is loaded and can be asked: net, tokenizer, and how it was decided to run them.

A model's tokenizer alone, without its weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from merge_cli.checkpoint.class_config import refuse_code
from merge_cli.checkpoint.dtypes import width_of
from merge_cli.engine.device import choose_device, free_memory
from merge_cli.errors import MergeCliError, ResourceError, SourceError
from merge_cli.evaluation.fingerprints import refuse_adapter
from merge_cli.evaluation.result import Cost
from merge_cli.evaluation.spec import DTYPES
from merge_cli.sources.source import Source
from merge_cli.system.machine import show_size

_USUAL_CONTEXT = 4096  # where nothing is asked for: a model's own may be more than memory holds
_ROOM = 0.8  # of the free memory for weights; activations and logits take the rest


@dataclass
class LiveModel:
    """A loaded causal language model.

    Attributes:
        label: as the user named it.
        net, tokenizer: transformers' objects; the net is in evaluation mode.
        device, dtype: as words, each with its reason.
        max_length: tokens of context that are used.
        batch_tokens: tokens of a batch, padding included.
        seed: of row samples.
        cost: grows with every forward pass.
        teachers: models that tasks compare with, kept for the next time; None closes them.
    """

    label: str
    net: Any
    tokenizer: Any
    device: str
    dtype: str
    max_length: int
    batch_tokens: int
    seed: int = 0
    cost: Cost = Cost()
    teachers: dict[str, LiveModel] | None = None
    _folder: Any = field(default=None, repr=False)  # of offloaded weights

    @property
    def vocabulary(self) -> int:
        """Logits for each token."""
        head = self.net.get_output_embeddings()
        return int(head.weight.shape[0] if head is not None else self.net.config.vocab_size)

    @property
    def entries(self) -> int:
        """Tokens that it can read and predict: ids from here on would end in an index error."""
        return min(int(self.net.get_input_embeddings().weight.shape[0]), self.vocabulary)

    @property
    def place(self) -> str:
        """The device that inputs go to."""
        return str(self.net.device)

    @property
    def offloaded(self) -> bool:
        """Whether some of its weights are read layer by layer."""
        return self._folder is not None

    def close(self) -> None:
        """Let go of the weights, in memory and in the offload folder."""
        self.net = None
        for teacher in (self.teachers or {}).values():
            teacher.close()
        self.teachers = None
        if self._folder is not None:
            self._folder.cleanup()

    def logits(self, ids: Any, mask: Any) -> Any:
        """Logits [batch, length, vocabulary] of token ids and attention mask [batch, length]."""
        import torch

        where = self.net.device
        with torch.inference_mode():
            result = self.net(
                input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False
            ).logits
        self.count(int(mask.sum()), 1)
        return result

    def count(self, tokens: int, passes: int) -> None:
        """Add to the cost."""
        cost = self.cost
        self.cost = Cost(cost.seconds, cost.tokens + tokens, cost.forward_passes + passes)


def load(
    source: Source,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_length: int | None = None,
    batch_tokens: int = 8192,
    seed: int = 0,
    memory: int | None = None,
    incomplete: bool = False,
) -> LiveModel:
    """Load an opened source, whose weights are on disk, with transformers.

    Args:
        device: auto, cpu, cuda or cuda:N.
        dtype: of the computation; auto is float32 on a CPU and the stored one on a GPU.
        max_length: at most the model's own context; by default that, and at most 4,096.
        memory: bytes that the weights may take, instead of what is free. What does not fit is
            read from disk layer by layer, as accelerate does it.
        incomplete: weights may be missing, because every one will be replaced.

    Raises:
        SourceError: transformers cannot load it as a causal language model.
        ResourceError: the device is not there, or accelerate is needed and missing.
    """
    refuse_adapter(source)
    refuse_code(source.config, source.label)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = choose_device(device)
    where = f"cuda:{chosen.indexes[0]}" if chosen.indexes else "cpu"
    kind, why = choose_dtype(source, chosen.kind, dtype)
    dtype_words = f"{kind} ({why})"
    width = torch.empty((), dtype=getattr(torch, kind)).element_size()
    needed = sum(ref.nbytes // width_of(ref.dtype) for ref in source.tensors.values()) * width
    room = memory if memory is not None else int(free_memory(chosen.kind, chosen.indexes) * _ROOM)
    device_words = f"{chosen.name} ({chosen.reason})"
    options: dict[str, Any] = {"dtype": getattr(torch, kind)}
    folder = None
    if needed > room:
        _need_accelerate(source.label, needed, room)
        folder = TemporaryDirectory(prefix="merge-cli-offload-")
        options |= {
            "device_map": "auto",
            "offload_folder": folder.name,
            "max_memory": _shares(chosen.indexes, room),
        }
        device_words += (
            f"; {show_size(needed)} of weights and room for {show_size(room)}: "
            "the rest is read layer by layer"
        )
    with quiet_libraries():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source.root), trust_remote_code=False)
            net, about = AutoModelForCausalLM.from_pretrained(
                str(source.root), trust_remote_code=False, output_loading_info=True, **options
            )
        except Exception as error:  # a config can break transformers in any way it likes
            raise _cannot_load(source, error) from error
    if not incomplete:
        _refuse_made_up(source, about)
    net.eval()
    if folder is None:
        net.to(where)
    return LiveModel(
        source.label,
        net,
        tokenizer,
        device_words,
        dtype_words,
        context_of(net.config, max_length),
        batch_tokens,
        seed,
        _folder=folder,
    )


def context_of(config: Any, wanted: int | None) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = int(
        getattr(text, "max_position_embeddings", 0) or getattr(text, "n_positions", 0) or 2048
    )
    return min(wanted or _USUAL_CONTEXT, own)


def _cannot_load(source: Source, error: Exception) -> MergeCliError:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        hint = "Try --dtype bfloat16, --max-memory, or --device cpu."
        return ResourceError("its weights do not fit into memory", where=source.label, hint=hint)
    said = str(error).strip() or type(error).__name__
    message, hint = f"transformers cannot load it: {said.splitlines()[0]}", ""
    if "trust_remote_code" in said:
        message = "it needs code of its own, and nothing from a checkpoint is executed"
        hint = "Evaluate it with a program that you trust to run its code."
    return SourceError(message, model=source.label, hint=hint)


def _refuse_made_up(source: Source, about: Mapping[str, Any]) -> None:
    """transformers fills what it does not find with random numbers."""
    missing = sorted(map(str, about.get("missing_keys", ())))
    missing += sorted(str(item[0]) for item in about.get("mismatched_keys", ()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        message = f"its weights lack what the architecture needs: {missing[0]}{more}"
        hint = "Is it a language model, and complete?"
        raise SourceError(message, model=source.label, tensor=missing[0], hint=hint)


def choose_dtype(source: Source, device: str, wanted: str) -> tuple[str, str]:
    """What to compute in, and why: `auto` is exact on a CPU, and as stored on a GPU."""
    if wanted != "auto":
        return wanted, "asked for"
    if device == "cpu":
        return "float32", "on a CPU"
    found = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    stored = str(found).removeprefix("torch.")
    return (stored, "as stored") if stored in DTYPES else ("float32", f"stored as {stored}")


def _shares(indexes: tuple[int, ...], room: int) -> dict[int | str, int]:
    if not indexes:
        return {"cpu": room}
    shares: dict[int | str, int] = {i: room // len(indexes) for i in indexes}
    return {**shares, "cpu": int(free_memory("cpu", ()) * _ROOM)}


def _need_accelerate(label: str, needed: int, room: int) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        message = (
            f"needs {show_size(needed)} for its weights, and there is room for {show_size(room)}"
        )
        hint = "pip install accelerate: it will be read layer by layer. Or use --dtype bfloat16."
        raise ResourceError(message, where=label, hint=hint) from None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Loading without transformers' own bars and advice: this tool has its own."""
    import transformers

    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def memory_errors(label: str, hint: str) -> Iterator[None]:
    """Say in our own words that memory ran out, on the host or on the device."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and (
            type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error)
        ):
            raise
        raise ResourceError("memory ran out", where=label, hint=hint) from error


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of an opened source; nothing of the checkpoint is executed.

    Raises:
        SourceError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with quiet_libraries():
        try:
            return AutoTokenizer.from_pretrained(str(source.root), trust_remote_code=False)
        except Exception as error:  # the package tokenizers raises nothing more special
            said = str(error).strip().splitlines() or [type(error).__name__]
            message = f"its tokenizer cannot be loaded: {said[0]}"
            hint = "The text is read with it."
            raise SourceError(message, model=source.label, hint=hint) from error
