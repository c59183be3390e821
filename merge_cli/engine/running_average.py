"""The mean of state dicts that come one after another: exact, and without keeping them.

A soup of models adds w_1 * θ_1, w_2 * θ_2, ... in their order in float32, each product and each
sum rounded by itself, and divides once by the sum of the weights. So its running sum is all that
must be kept to go on: 1 * sum is the sum, and the next product is added to it. What comes out is
bit for bit the soup of all of them, however often the sum was saved and loaded in between.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.dtypes import MERGEABLE, SAFETENSORS_NAMES, promoted, torch_dtype
from merge_cli.engine.dict_tensors import StateDict, check_tensors, dtype_name, same_memory
from merge_cli.engine.worker_context import all_finite
from merge_cli.errors import CorruptFileError, MismatchError, NonFiniteError, Problem, UsageError
from merge_cli.kernels.convert import encode
from merge_cli.kernels.reduce import divided, weighted_sum
from merge_cli.methods.consensus import no_average

if TYPE_CHECKING:
    import torch

_FORMAT = "merge_cli.running_average"


class RunningAverage:
    """The weighted mean of the state dicts that were added, in the order in which they were.

    Args:
        device: torch's word for where the sum is kept; None: where the tensors of the first are.

    Attributes:
        weights: of the state dicts that were added.
        sums: name -> sum of w_i * θ_i, float32 (float64 for tensors that are); what is not a float
            is a copy of the first's.
        dtypes: name -> safetensors' name of the dtype of the average.
        tied: name -> the name of the tensor whose memory it shared (tied weights).
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self._device = device
        self.weights: list[float] = []
        self.sums: dict[str, torch.Tensor] = {}
        self.dtypes: dict[str, str] = {}
        self.tied: dict[str, str] = {}

    def add(self, state_dict: StateDict, weight: float = 1.0) -> None:
        """Add a state dict. It is not kept, and may change afterwards.

        Raises:
            UsageError: a weight that is not a finite number.
            MismatchError: names, shapes, ties or dtypes that are not as before.
            NonFiniteError: NaN or Inf among the weights. In all of these cases nothing is added.
        """
        import torch

        weight = float(weight)
        if not math.isfinite(weight):
            raise UsageError(f"a weight must be a finite number (got {weight})")
        with torch.no_grad():
            self._check(state_dict)
            tied = _tied(state_dict)
            for name, tensor in state_dict.items():
                if name in tied:
                    continue
                kind = dtype_name(tensor)
                before = self.dtypes.get(name, kind)
                self.dtypes[name] = before if before == kind else promoted({before, kind})
                if kind not in MERGEABLE:
                    self.sums.setdefault(name, tensor.detach().to(self._device, copy=True))
                    continue
                wide = torch.float64 if kind == "F64" else torch.float32
                device = self.sums[name].device if name in self.sums else self._device
                values = tensor.detach().to(device, wide).reshape(-1)
                so_far = [self.sums[name].reshape(-1)] if name in self.sums else []
                factors = [1.0, weight] if so_far else [weight]
                self.sums[name] = weighted_sum(factors, [*so_far, values]).reshape(tensor.shape)
            self.tied = tied
            self.weights.append(weight)

    def average(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The mean, as new tensors where the sums are.

        Args:
            dtype: of the floats; None keeps each tensor's own.

        Raises:
            UsageError: nothing was added, or the weights sum to 0.
            NonFiniteError: a mean that is too large for float16.
        """
        import torch

        if not self.weights:
            raise UsageError("nothing has been added to this average")
        if why := no_average(self.weights):
            raise UsageError(why)
        divisor = math.fsum(self.weights)
        asked = SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")] if dtype else ""
        result: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, total in self.sums.items():
                kind = self.dtypes[name]
                if kind not in MERGEABLE:
                    result[name] = total.clone()
                    continue
                mean = total.clone() if divisor == 1.0 else divided(total.clone(), divisor)
                result[name], fits = encode(mean, asked or kind)
                if not fits:
                    message = "some averaged weights are too large for float16"
                    raise NonFiniteError(message, tensor=name, hint="Give another dtype.")
        return result | {name: result[original] for name, original in self.tied.items()}

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write everything that is needed to go on into one safetensors file, by one rename."""
        from safetensors.torch import save_file

        about = {"weights": self.weights, "dtypes": self.dtypes, "tied": self.tied}
        path = Path(file)
        written = path.with_name(f"{path.name}.partial")
        tensors = {name: total.contiguous() for name, total in self.sums.items()}
        save_file(tensors, written, metadata={_FORMAT: json.dumps(about)})
        os.replace(written, path)

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], device: str | torch.device | None = None
    ) -> RunningAverage:
        """What `save` has written.

        Raises:
            CorruptFileError: a file that is no running average.
        """
        from safetensors import safe_open

        average = cls(device)
        with safe_open(file, "pt", device=str(device or "cpu")) as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {}).get(_FORMAT, "{}"))
            names = set(opened.keys())
            if not names or names != set(about.get("dtypes", ())):
                raise CorruptFileError("is not a running average", file=str(file))
            # In the order in which they were added, which safetensors does not keep.
            average.sums = {name: opened.get_tensor(name) for name in about["dtypes"]}
        average.weights = [float(weight) for weight in about["weights"]]
        average.dtypes, average.tied = dict(about["dtypes"]), dict(about["tied"])
        return average

    def _check(self, state_dict: StateDict) -> None:
        """Whether a state dict can be added to what is here."""
        label, before = "the state dict", "the average"
        if not self.weights:
            check_tensors({label: state_dict}, label)
        else:
            averaged = self.sums | {
                name: self.sums[original] for name, original in self.tied.items()
            }
            check_tensors({before: averaged, label: state_dict}, before)
            problems = []
            if _tied(state_dict) != self.tied:
                problems.append(Problem("tied weights are not those of the average", label))
            for name, tensor in state_dict.items():
                kind = dtype_name(tensor)
                was = self.dtypes[self.tied.get(name, name)]
                if kind != was and not ({kind, was} <= set(MERGEABLE) and "F64" not in (kind, was)):
                    message = f"is {tensor.dtype}, and was {torch_dtype(was)}"
                    problems.append(Problem(message, f"{label}[{name!r}]"))
            if problems:
                raise MismatchError(problems, "the state dict cannot be added")
        for name, tensor in state_dict.items():
            flat = tensor.detach().reshape(-1)
            if dtype_name(tensor) in MERGEABLE and tensor.numel() and not _is_finite(flat):
                raise NonFiniteError("NaN or Inf among the weights", tensor=name)


def _is_finite(flat: torch.Tensor) -> bool:
    return all_finite([flat]) if flat.dtype.itemsize >= 4 else bool(flat.isfinite().all())


def _tied(state_dict: StateDict) -> dict[str, str]:
    """Names whose tensor is the memory of an earlier one's -> the earlier name."""
    first: dict[object, str] = {}
    tied = {}
    for name in state_dict:
        original = first.setdefault(same_memory(name, [state_dict]), name)
        if original != name:
            tied[name] = original
    return tied
