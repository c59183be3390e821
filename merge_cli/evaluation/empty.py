"""A causal language model without weights: its config, its parameters, and what kind each is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge_cli.checkpoint.class_config import refuse_code
from merge_cli.errors import SourceError
from merge_cli.evaluation.guards import quiet_libraries
from merge_cli.planning.plan import Plan


def model_config(plan: Plan) -> Any:
    """The output's config, without dropout: a loss must not depend on chance.

    Raises:
        SourceError: transformers does not know the architecture, or the config asks for code.
    """
    from transformers import AutoConfig

    config_source = plan.sources[plan.config_index]
    refuse_code(config_source.config, config_source.label)
    with quiet_libraries():
        try:
            config = AutoConfig.from_pretrained(str(config_source.root), trust_remote_code=False)
        except Exception as error:  # a config's own code checks it, with errors of any kind
            message = f"transformers cannot read its config: {reason(error)}"
            raise SourceError(message, model=config_source.label) from error
    if "tie_word_embeddings" in plan.config:
        config.tie_word_embeddings = plan.config["tie_word_embeddings"]
    _drop_nothing(config)
    config.use_cache = False
    return config


def _drop_nothing(config: Any) -> None:
    """No dropout in a config and in the configs inside it, whatever a model calls it."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            _drop_nothing(value)


def empty_model(plan: Plan) -> Any:
    """The student without weights: names, shapes and kinds of layers."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(plan)
    with quiet_libraries(), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # of any kind: what a model makes of sizes that do not fit
            message = f"is no causal language model that transformers knows: {reason(error)}"
            raise SourceError(message, model=plan.sources[plan.config_index].label) from error


def kinds_of(net: Any) -> dict[str, str]:
    """Parameter -> linear, conv1d (stored input first), or other."""
    return dict(_walk(net))


def embeddings_of(net: Any) -> set[str]:
    """The weights by which tokens go in and out: a row for each token."""
    modules = {
        id(m.weight)
        for m in (net.get_input_embeddings(), net.get_output_embeddings())
        if m is not None
    }
    return {name for name, parameter in net.named_parameters() if id(parameter) in modules}


def _walk(net: Any) -> Iterator[tuple[str, str]]:
    import torch

    embeddings = {
        id(module.weight) for module in net.modules() if isinstance(module, torch.nn.Embedding)
    }
    for prefix, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = "other"
            if isinstance(module, torch.nn.Linear) and id(parameter) not in embeddings:
                kind = "linear"
            elif type(module).__name__ == "Conv1D" and name == "weight":
                kind = "conv1d"
            full = f"{prefix}.{name}".lstrip(".")
            yield full, kind_of_expert(full, parameter.dim()) if kind == "other" else kind


def kind_of_expert(name: str, dimensions: int) -> str:
    """Matrices of experts are linear layers, one by one or stacked."""
    return "linear" if ".experts." in name and dimensions > 1 and "bias" not in name else "other"


def reason(error: BaseException) -> str:
    """The first line of a message; the kind of error where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
