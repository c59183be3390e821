"""What compressed-tensors says of weights in config.json, read and written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_cli.formats.encoding import Encoding

METHOD = "compressed-tensors"
# Why a stack is not written in one of its schemes.
STACKED = "stacks of experts are not written in it: compressed-tensors has experts one by one"
FLOATS = ("F32", "F16", "BF16")  # dtypes of scales that are numbers, widest first


class CompressedTensorsEncoding(Encoding):
    """One that compressed-tensors has a scheme for."""

    @property
    def family(self) -> str:
        return METHOD

    @property
    @abstractmethod
    def kind(self) -> str:
        """compressed-tensors' `format`."""

    @property
    @abstractmethod
    def scheme(self) -> dict[str, Any]:
        """`weights` of a group."""

    @property
    def activations(self) -> dict[str, Any] | None:
        """`input_activations` of a group: what is done with them while the model runs."""
        return None

    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        kinds = [e.kind for e in groups if isinstance(e, CompressedTensorsEncoding)]
        # One scheme is of all linear layers but those that are ignored; of several, each is of
        # the modules that it names.
        single = len(groups) == 1
        described = {
            f"group_{number}": {
                "format": encoding.kind,
                "input_activations": encoding.activations,
                "output_activations": None,
                "targets": ["Linear"] if single else list(modules),
                "weights": encoding.scheme,
            }
            for number, (encoding, modules) in enumerate(groups.items())
            if isinstance(encoding, CompressedTensorsEncoding)
        }
        return {
            "config_groups": described,
            "format": kinds[0] if len(set(kinds)) == 1 else "mixed-precision",
            "ignore": list(unconverted),
            "kv_cache_scheme": None,
            "quant_method": METHOD,
            "quantization_status": "compressed",
        }


def scheme_weights(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config's groups say of weights."""
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            yield group["weights"]
