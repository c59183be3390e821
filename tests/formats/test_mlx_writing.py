"""MLX's forms as a merge writes them: by mlx's formula, one group at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from merge_cli.formats.encoding import Encoding, Tiles
from merge_cli.formats.mlx_encoding import MlxAffineEncoding, MlxFp4Encoding
from merge_cli.formats.packed import unpack
from merge_cli.formats.small_floats import numbers_of as small_floats
from tests.support.encoded import family, same_files, written
from tests.support.quantised import numbers_of
from tests.support.tiny import llama_config, read_model, write_model

UP = "model.layers.0.mlp.up_proj"
KINDS = [(2, 32), (3, 64), (4, 32), (5, 32), (6, 64), (8, 128)]
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encoded(encoding: Encoding, values: np.ndarray, before: Any = None, stored: Any = None) -> Any:
    """The bytes of the parts of a matrix."""
    parts = encoding.parts(values.shape)
    raw = stored or [np.full(part.bytes_of(0, values.size)[1], 0xAA, np.uint8) for part in parts]
    encoding.encode(Tiles(values.reshape(-1), values.shape, before=before), raw)
    return raw


def mlx_scale_and_bias(group: np.ndarray, bits: int) -> tuple[np.float32, np.float32]:
    """As mlx.core.quantize computes them in float32."""
    low, high, bins = group.min(), group.max(), np.float32(2**bits - 1)
    scale = max((high - low) / bins, np.float32(1e-7))
    edge, scale = (low, scale) if abs(low) > abs(high) else (high, -scale)
    whole = np.rint(edge / scale)
    return (edge / whole, edge) if whole else (scale, np.float32(0))


def weights(seed: int, rows: int = 6, columns: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("dtype", TORCH)
def test_affine_is_mlxs_formula(bits: int, group: int, dtype: str) -> None:
    values = weights(bits)
    values[0, :group], values[1, :group] = 0, np.abs(values[1, :group])
    values[2, :group], values[3, :group] = -np.abs(values[2, :group]), 0.25
    encoding = MlxAffineEncoding(bits, group, dtype)
    words, scales, biases = encoded(encoding, values)
    codes = unpack(words.reshape(len(values), -1), bits).reshape(-1, group)
    kind = TORCH[dtype]
    stored_scales, stored_biases = (
        torch.from_numpy(raw).view(kind).float().numpy() for raw in (scales, biases)
    )
    for g, numbers in enumerate(values.reshape(-1, group)):
        scale, bias = mlx_scale_and_bias(numbers, bits)
        assert stored_scales[g] == torch.tensor(scale).to(kind).float()
        assert stored_biases[g] == torch.tensor(bias).to(kind).float()
        exact = (numbers - stored_biases[g]) / stored_scales[g]
        np.testing.assert_array_equal(codes[g], np.rint(np.clip(exact, 0, 2**bits - 1)))


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_a_group_may_reach_as_far_as_float32(bits: int, group: int) -> None:
    """Where mlx's formula overflows: the steps are of the size that they would be."""
    values = weights(bits, columns=group)
    values[:, 0], values[:, -1] = -3e38, 3e38
    words, scales, biases = encoded(MlxAffineEncoding(bits, group, "F32"), values)
    codes = unpack(words.reshape(len(values), -1), bits).reshape(-1, group).astype(np.float64)
    scale, bias = (raw.view(np.float32).astype(np.float64)[:, None] for raw in (scales, biases))
    step = 6e38 / (2**bits - 1)
    np.testing.assert_allclose(np.abs(scale), step, rtol=0.5)
    assert np.abs(codes * scale + bias - values).max() <= 1.01 * np.abs(scale).max()


@pytest.mark.parametrize(("bits", "group"), [k for k in KINDS if k[1] in (32, 64, 128)])
def test_affine_is_what_mlx_writes(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    values = weights(bits)
    theirs = mx.quantize(mx.array(values), group_size=group, bits=bits)
    for ours, other in zip(
        encoded(MlxAffineEncoding(bits, group, "F32"), values), theirs, strict=True
    ):
        np.testing.assert_array_equal(ours, np.array(other).view(np.uint8).reshape(-1))


@settings(deadline=None)
@given(arrays(np.float32, (3, 32), elements=st.floats(width=32)), st.sampled_from(KINDS))
def test_any_numbers(values: np.ndarray, kind: tuple[int, int]) -> None:
    """A group that is not finite is NaN; any other is within a step of what it was."""
    bits = kind[0]
    with np.errstate(all="ignore"):
        words, scales, biases = encoded(MlxAffineEncoding(bits, 32, "F32"), values)
        codes = unpack(words.reshape(3, -1), bits).astype(np.float64)
        step, bias = (raw.view(np.float32)[:, None].astype(np.float64) for raw in (scales, biases))
        numbers = codes * step + bias
    for g, group in enumerate(values):
        if not np.isfinite(group).all():
            assert np.isnan(numbers[g]).all()
        elif np.abs(group).max() < 1e38:
            bound = max(abs(step[g, 0]), np.abs(group).max() / 2**20)
            assert (np.abs(numbers[g] - group) <= bound).all()


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_small_floats_are_the_nearest(mode: str, group: int, size: float) -> None:
    values = weights(1) * np.float32(size)
    values[0, :group] = 0
    values[1, 0] = np.nan
    words, scales = encoded(MlxFp4Encoding(group, mode), values)
    codes = unpack(words.reshape(len(values), -1), 4).reshape(-1, group)
    table = small_floats("F8_E8M0" if mode == "mxfp4" else "F8_E4M3")
    for g, numbers in enumerate(values.reshape(-1, group)):
        scale = table[scales[g]]
        if not np.isfinite(numbers).all():
            assert np.isnan(scale)
            continue
        largest = np.abs(numbers).max()
        if largest:
            wanted = 2.0 ** np.floor(np.log2(largest)) / 4 if mode == "mxfp4" else largest / 6
            near = [abs(float(t) - wanted) for t in table if t > 0]
            assert abs(float(scale) - wanted) <= min(near) * (1 + 1e-6)
        choices = small_floats("F4_E2M1")[:16].astype(np.float64) * scale
        errors = np.abs(choices[codes[g]] - numbers)
        assert (errors <= np.abs(choices[:, None] - numbers).min(axis=0) + 1e-12).all()


def quantised(root: Path, bits: int, group: int, mode: str = "affine") -> None:
    """A Llama whose layers and embedding are stored as mlx-lm writes them, some with more bits."""
    (tensors,) = family(root, "a")
    stored: dict[str, torch.Tensor] = {}
    own: dict[str, Any] = {}
    for name, value in tensors.items():
        if value.ndim < 2 or "lm_head" in name:
            stored[name] = value
            continue
        module = name.removesuffix(".weight")
        kind: Encoding = MlxAffineEncoding(8, 64, "BF16")
        if "down_proj" in name:
            own[module] = {"group_size": 64, "bits": 8}
        elif mode == "affine":
            kind = MlxAffineEncoding(bits, group, "BF16")
        else:
            kind = MlxFp4Encoding(group, mode)
        if mode != "affine" and "down_proj" in name:
            own[module]["mode"] = "affine"
        raw = encoded(kind, value.float().numpy())
        for part, data in zip(kind.parts(value.shape), raw, strict=True):
            dtype = {"U32": torch.uint32, "U8": torch.uint8, "BF16": torch.bfloat16}[part.dtype]
            stored[part.output(name).name] = torch.from_numpy(data).view(dtype).reshape(part.shape)
    about = {"group_size": group, "bits": bits, "mode": mode, **own}
    config = {**llama_config(layers=2, width=128), "dtype": "bfloat16"}
    config |= {"quantization": about, "quantization_config": about}
    write_model(root / "q", stored, config)


@pytest.mark.parametrize("kind", [(4, 32, "affine"), (3, 64, "affine"), (4, 32, "mxfp4")])
def test_same_writes_a_merge_as_it_came(tmp_path: Path, kind: tuple[int, int, str]) -> None:
    quantised(tmp_path, *kind)
    before = read_model(tmp_path / "q")
    for method, models in (("passthrough", ("q",)), ("soup", ("q", "q"))):
        assert same_files(written(tmp_path, method, "same", *models, method=method), tmp_path / "q")
    # One row of one matrix moves, and the rest keeps its bytes.
    changed = numbers_of(tmp_path / "q")
    changed[f"{UP}.weight"][140] *= 0.75
    config = {**llama_config(layers=2, width=128), "dtype": "float32"}
    write_model(tmp_path / "tuned", changed, config)
    keys = {"base_model": "q", "parameters": {"weight": 1.0}}
    out = written(tmp_path, "out", "same", "tuned", method="task_arithmetic", **keys)
    after = read_model(out)
    assert {k: (v.dtype, v.shape) for k, v in after.items()} == {
        k: (v.dtype, v.shape) for k, v in before.items()
    }
    for name, value in before.items():
        old, new = (t.view(torch.uint8).reshape(len(t), -1) for t in (value, after[name]))
        rows = (old != new).any(1).nonzero().flatten().tolist()
        assert rows == [] or (rows == [140] and name.startswith(UP)), name
    assert not torch.equal(before[f"{UP}.weight"][140], after[f"{UP}.weight"][140]) or not (
        torch.equal(before[f"{UP}.scales"][140], after[f"{UP}.scales"][140])
    )
    words = json.loads((tmp_path / "q" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text())["quantization"] == words["quantization"]
    found, exact = numbers_of(out)[f"{UP}.weight"], changed[f"{UP}.weight"]
    reach = exact.abs().max()
    assert ((found - exact).abs() <= reach / (3 if kind[2] == "mxfp4" else 2 ** kind[0] - 2)).all()
