"""Loading a model with transformers to run it: net, tokenizer, device, dtype, memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from merge_cli.checkpoint.class_config import refuse_code
from merge_cli.checkpoint.dtypes import width_of
from merge_cli.engine.device import choose_device, free_memory
from merge_cli.errors import MergeCliError, ResourceError, SourceError
from merge_cli.evaluation.adapted import apply_adapter
from merge_cli.evaluation.guards import quiet_libraries
from merge_cli.evaluation.result import Cost
from merge_cli.evaluation.spec import DTYPES
from merge_cli.planning.equal_tensors import compare
from merge_cli.planning.plan import Plan
from merge_cli.sources.source import Source, fetch_weights, require_safetensors
from merge_cli.system.libraries import require
from merge_cli.system.machine import show_size

_USUAL_CONTEXT = 4096  # default: a model's maximum may not fit into memory
_MEMORY_SHARE = 0.8  # of the free memory for weights; activations and logits take the rest


@dataclass
class LiveModel:
    """A loaded causal language model.

    Attributes:
        label: as the user named it.
        net, tokenizer: transformers' objects; the net is in evaluation mode.
        device, dtype: as text, each with its reason.
        max_length: tokens of context that are used.
        batch_tokens: tokens of a batch, padding included.
        seed: of row samples.
        cost: grows with every forward pass.
        teachers: loaded models that tasks compare with; None does not keep them.
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
        """Number of tokens that it can read and predict; higher ids have no embedding."""
        return min(int(self.net.get_input_embeddings().weight.shape[0]), self.vocabulary)

    @property
    def input_device(self) -> str:
        """The device for inputs: of a model whose weights are all read layer by layer the CPU."""
        device = str(self.net.device)
        return "cpu" if device == "meta" else device

    @property
    def offloaded(self) -> bool:
        """Whether some weights are read layer by layer."""
        return self._folder is not None

    def close(self) -> None:
        """Free the weights, in memory and in the offload folder."""
        self.net = None
        for teacher in (self.teachers or {}).values():
            teacher.close()
        self.teachers = None
        if self._folder is not None:
            self._folder.cleanup()

    def logits(self, ids: Any, mask: Any) -> Any:
        """Logits [batch, length, vocabulary] of token ids and attention mask [batch, length]."""
        import torch

        device = self.input_device
        with torch.inference_mode():
            logits = self.net(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).logits
        self.count(int(mask.sum()), 1)
        return logits

    def count(self, tokens: int, passes: int) -> None:
        """Add to the cost."""
        cost = self.cost
        self.cost = Cost(cost.seconds, cost.tokens + tokens, cost.forward_passes + passes)


def fetch_everything(plan: Plan) -> None:
    """Models of the Hub, whole: transformers loads them.

    Raises:
        SourceError: tensors that would stop the merge after hours of learning from these models.
    """
    for source in plan.sources:
        fetch_weights(source, source.header_bytes)
    compare(plan.compared)


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
        max_length: at most the model's context; default: that, but at most 4,096.
        memory: bytes that the weights may take, instead of what is free. What does not fit is
            read from disk layer by layer, by accelerate.
        incomplete: weights may be missing, because all will be replaced.

    Raises:
        SourceError: transformers cannot load it as a causal language model.
        ResourceError: there is no such device; torch, transformers, or accelerate where it is
            needed, cannot be imported.
    """
    require_safetensors(source)
    refuse_code(source.config, source.label)
    torch = require("torch", "running a model")
    require("transformers", "running a model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    devices = choose_device(device)
    device_name = f"cuda:{devices.indexes[0]}" if devices.indexes else "cpu"
    dtype_name, dtype_reason = choose_dtype(source, devices.kind, dtype)
    dtype_words = f"{dtype_name} ({dtype_reason})"
    width = torch.empty((), dtype=getattr(torch, dtype_name)).element_size()
    weight_bytes = sum(ref.nbytes // width_of(ref.dtype) for ref in source.tensors.values()) * width
    memory_limit = (
        memory
        if memory is not None
        else int(free_memory(devices.kind, devices.indexes) * _MEMORY_SHARE)
    )
    device_words = f"{devices.name} ({devices.reason})"
    options: dict[str, Any] = {"dtype": getattr(torch, dtype_name)}
    options |= _decoding(source)
    folder = None
    if weight_bytes > memory_limit:
        _need_accelerate(source.label, weight_bytes, memory_limit)
        folder = TemporaryDirectory(prefix="merge-cli-offload-")
        options |= {
            "device_map": "auto",
            "offload_folder": folder.name,
            "max_memory": _shares(devices.indexes, memory_limit),
        }
        device_words += (
            f"; {show_size(weight_bytes)} of weights and room for {show_size(memory_limit)}: "
            "the rest is read layer by layer"
        )
    with quiet_libraries():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source.root), trust_remote_code=False)
            net, loading_info = AutoModelForCausalLM.from_pretrained(
                str(source.root), trust_remote_code=False, output_loading_info=True, **options
            )
        except Exception as error:  # a config can make transformers raise anything
            raise _cannot_load(source, error) from error
    if not incomplete:
        _refuse_missing_weights(source, loading_info)
    net.eval()
    if source.adapter is not None:
        if folder is not None:
            hint = "Merge the two into a folder first: `merge_method: passthrough`, one model."
            message = "an adapter is applied in memory, and the model does not fit there"
            raise ResourceError(message, where=source.label, hint=hint)
        apply_adapter(net, source)
    if folder is None:
        net.to(device_name)
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


def _decoding(source: Source) -> dict[str, Any]:
    """How transformers is asked to decode weights of compressed-tensors whose activations are not
    quantised: the model is the same. By itself it decodes them to bfloat16, whatever the rest is.
    """
    about = source.quantization.get("quantization_config")
    if not isinstance(about, dict) or about.get("quant_method") != "compressed-tensors":
        return {}
    groups = about.get("config_groups")
    weights_only = isinstance(groups, dict) and not any(
        isinstance(group, dict) and group.get("input_activations") for group in groups.values()
    )
    if not weights_only:
        return {}
    from transformers import CompressedTensorsConfig

    named = inspect.signature(CompressedTensorsConfig.__init__).parameters
    asked = {"dequantize": True} if "dequantize" in named else {"run_compressed": False}
    return {"quantization_config": CompressedTensorsConfig(**asked)}


def context_of(config: Any, requested: int | None) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_length = int(
        getattr(text, "max_position_embeddings", 0) or getattr(text, "n_positions", 0) or 2048
    )
    return min(requested or _USUAL_CONTEXT, model_length)


def _cannot_load(source: Source, error: Exception) -> MergeCliError:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        hint = "Try --dtype bfloat16, --max-memory, or --device cpu."
        return ResourceError("its weights do not fit into memory", where=source.label, hint=hint)
    reason = str(error).strip() or type(error).__name__
    message, hint = f"transformers cannot load it: {reason.splitlines()[0]}", ""
    if "trust_remote_code" in reason:
        message = "it needs its own code, and no code of a checkpoint is executed"
        hint = "Evaluate it with a program that you trust to run its code."
    return SourceError(message, model=source.label, hint=hint)


def _refuse_missing_weights(source: Source, loading_info: Mapping[str, Any]) -> None:
    """Refuse missing weights, which transformers replaces by random numbers."""
    missing = sorted(map(str, loading_info.get("missing_keys", ())))
    missing += sorted(str(key[0]) for key in loading_info.get("mismatched_keys", ()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        message = f"its weights lack what the architecture needs: {missing[0]}{more}"
        hint = "Is it a language model, and complete?"
        raise SourceError(message, model=source.label, tensor=missing[0], hint=hint)


def choose_dtype(source: Source, device: str, requested: str) -> tuple[str, str]:
    """The dtype of the computation and why: `auto` is float32 on a CPU, as stored on a GPU."""
    if requested != "auto":
        return requested, "requested"
    if device == "cpu":
        return "float32", "on a CPU"
    config_dtype = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    stored = str(config_dtype).removeprefix("torch.")
    return (stored, "as stored") if stored in DTYPES else ("float32", f"stored as {stored}")


def _shares(indexes: tuple[int, ...], limit: int) -> dict[int | str, int]:
    if not indexes:
        return {"cpu": limit}
    shares: dict[int | str, int] = {i: limit // len(indexes) for i in indexes}
    return {**shares, "cpu": int(free_memory("cpu", ()) * _MEMORY_SHARE)}


def _need_accelerate(label: str, needed: int, limit: int) -> None:
    try:
        import accelerate  # noqa: F401  # is it there?
    except ImportError:
        message = (
            f"needs {show_size(needed)} for its weights, and there is room for {show_size(limit)}"
        )
        hint = "pip install accelerate: it will be read layer by layer. Or use --dtype bfloat16."
        raise ResourceError(message, where=label, hint=hint) from None


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of an opened source; nothing of the checkpoint is executed.

    Raises:
        SourceError: transformers cannot load it.
        ResourceError: there is no transformers.
    """
    require("transformers", "reading text with a tokenizer")
    from transformers import AutoTokenizer

    with quiet_libraries():
        try:
            return AutoTokenizer.from_pretrained(str(source.root), trust_remote_code=False)
        except Exception as error:  # the package `tokenizers` raises plain exceptions
            lines = str(error).strip().splitlines() or [type(error).__name__]
            message = f"its tokenizer cannot be loaded: {lines[0]}"
            hint = "It is needed to read the data."
            raise SourceError(message, model=source.label, hint=hint) from error
