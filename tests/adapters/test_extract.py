"""A fine-tune's change as an adapter: what PEFT and a merge make of it is the fine-tune again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import merge_cli
from merge_cli.adapters import threads
from merge_cli.adapters.factors import RankTruncation, factorise, recombine
from merge_cli.errors import MergeCliError, MismatchError, NonFiniteError, UsageError
from merge_cli.options import MergeOptions
from tests.support.adapters import gpt2, gpt_oss, llama, mixtral
from tests.support.command import cli
from tests.support.tiny import read_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = MergeOptions(device="cpu", threads=1)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None)
def test_factors_are_the_best_of_their_rank(rows: int, columns: int, rank: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    found = factorise(matrix, RankTruncation(rank))
    assert found is not None
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    kept = min(rank, len(values))
    best = (values[:kept] ** 2).sum() / (values**2).sum()
    error = np.square(matrix - found.left.astype(np.float64) @ found.right).sum()
    assert found.share == pytest.approx(best, abs=1e-6)
    assert 1 - error / (values**2).sum() == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_a_drawn_subspace_is_nearly_the_best(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=shape) @ np.diag(1.0 / np.arange(1, shape[1] + 1))
    found = factorise(matrix.astype(np.float32), RankTruncation(8))
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert found is not None
    assert found.share == pytest.approx(values[:8].sum() / values.sum(), rel=1e-4)
    error = np.square(matrix - found.left.astype(np.float64) @ found.right).sum()
    assert found.share == pytest.approx(1 - error / values.sum(), abs=1e-5)


@pytest.mark.parametrize("rank", [16, 40])
def test_where_no_direction_stands_out_a_drawn_subspace_is_4_percent_off(rank: int) -> None:
    matrix = np.random.default_rng(1).normal(size=(400, 900)).astype(np.float32)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    found = factorise(matrix, RankTruncation(rank))
    assert found is not None
    assert 0.96 < found.share / (values[:rank].sum() / values.sum()) <= 1
    error = np.square(matrix - found.left.astype(np.float64) @ found.right).sum()
    assert found.share == pytest.approx(1 - error / values.sum(), abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
@pytest.mark.parametrize("energy", [0.5, 0.99, 0.9999])
def test_an_energy_of_a_large_matrix_is_cut_where_it_has_to_be(
    shape: tuple[int, int], energy: float
) -> None:
    matrix = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    reached = values.cumsum() / values.sum()
    rank = int(np.searchsorted(reached, energy)) + 1
    found = factorise(matrix, RankTruncation(energy=energy))
    assert found is not None
    assert found.rank == rank
    assert found.share == pytest.approx(reached[rank - 1], abs=1e-6)
    error = np.square(matrix - found.left.astype(np.float64) @ found.right).sum()
    assert 1 - error / values.sum() == pytest.approx(found.share, abs=1e-6)


def test_energy_ends_as_early_as_it_can() -> None:
    matrix = np.diag([3.0, 2.0, 1.0, 0.0]).astype(np.float32)
    cuts = [
        *(RankTruncation(None, energy) for energy in (9 / 14, 0.65, 13 / 14, 1.0)),
        RankTruncation(1, 0.9),
    ]
    found = [factorise(matrix, cut) for cut in cuts]
    assert [one.rank for one in found if one] == [1, 2, 2, 3, 1]
    assert factorise(0 * matrix, RankTruncation(2)) is None


def test_a_product_of_thin_matrices_is_cut_without_being_made() -> None:
    generator = np.random.default_rng(1)
    left, right = generator.normal(size=(40, 6)), generator.normal(size=(6, 50))
    found = recombine(left, right, RankTruncation())
    assert found is not None
    assert found.rank == 6
    np.testing.assert_allclose(found.left.astype(np.float64) @ found.right, left @ right, atol=1e-4)
    cut, full = (
        recombine(left, right, RankTruncation(3)),
        factorise((left @ right).astype(np.float32), RankTruncation(3)),
    )
    assert cut is not None
    assert full is not None
    np.testing.assert_allclose(cut.left @ cut.right, full.left @ full.right, atol=1e-4)


def tune(folder: Path, make: Callable[[], Any], rank: int | None = 3, *, others: bool = True,
         dtype: torch.dtype = torch.float32) -> Any:  # fmt: skip
    """base and tuned; the layers' changes have a rank, or all that they can have."""
    base = make().to(dtype)
    base.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in base.named_modules():
            layer = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
            for key, parameter in module.named_parameters(recurse=False):
                if layer and key == "weight" and "lm_head" not in name:
                    rows, columns = parameter.shape
                    k = rank or min(rows, columns)
                    change = torch.randn(rows, k, generator=generator) @ torch.randn(
                        k, columns, generator=generator
                    )
                    parameter += (0.05 * change).to(dtype)
                elif others and not isinstance(module, torch.nn.Embedding) and not layer:
                    parameter += 0.1
    base.save_pretrained(folder / "tuned")
    return base


def merged_by_peft(folder: Path, adapter: str = "adapter") -> dict[str, torch.Tensor]:
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / adapter)
    return dict(model.merge_and_unload().state_dict())


def merged_here(folder: Path, adapter: str = "adapter") -> dict[str, torch.Tensor]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "merge_method": "passthrough", "models": [{"model": f"base+{adapter}"}],
        "dtype": "float32",
    }))  # fmt: skip
    out = merge_cli.merge(path, folder / f"{adapter} merged", options=OPTIONS).path
    return read_model(out)


CASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(tie_word_embeddings=True),
    "untied": llama,
    "gpt2": gpt2,
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_of_low_rank_comes_back(tmp_path: Path, case: str) -> None:
    wanted = tune(tmp_path, CASES[case]).state_dict()
    found = merge_cli.extract_lora(
        tmp_path / "tuned", tmp_path / "adapter", base=tmp_path / "base", rank=3
    )
    assert found.share == pytest.approx(1.0, abs=1e-9)
    assert not any(change.why for change in found.changes)
    theirs, ours = merged_by_peft(tmp_path), merged_here(tmp_path)
    for name, value in ours.items():
        full = next(key for key in wanted if key.endswith(name))
        torch.testing.assert_close(value, wanted[full], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs[full], wanted[full], rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] is (case == "gpt2")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_get_factors_where_that_is_asked_for(tmp_path: Path, tied: bool) -> None:
    net = tune(tmp_path, lambda: llama(tie_word_embeddings=tied))
    with torch.no_grad():
        embedding = net.get_input_embeddings().weight
        embedding += torch.randn(len(embedding), 2) @ torch.randn(2, 16)
    net.save_pretrained(tmp_path / "tuned")
    found = merge_cli.extract_lora(
        tmp_path / "tuned", tmp_path / "adapter", base=tmp_path / "base", rank=4, embeddings=True
    )
    assert found.share == pytest.approx(1.0, abs=1e-9)
    theirs, ours, wanted = merged_by_peft(tmp_path), merged_here(tmp_path), net.state_dict()
    for name in ("model.embed_tokens.weight", *(["lm_head.weight"] if not tied else [])):
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs[name], wanted[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["lm_head.weight"], wanted["lm_head.weight"])


def test_energy_chooses_a_rank_for_each_layer(tmp_path: Path) -> None:
    wanted = tune(tmp_path, llama, None, others=False).state_dict()
    found = merge_cli.extract_lora(
        tmp_path / "tuned", tmp_path / "adapter", base=tmp_path / "base", energy=0.8
    )
    ranks = {change.name: change.rank for change in found.changes}
    assert len(set(ranks.values())) > 1
    theirs, ours = merged_by_peft(tmp_path), merged_here(tmp_path)
    base = read_model(tmp_path / "base")
    for name, rank in ranks.items():
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-5)
        change = (wanted[name] - base[name]).double()
        values = torch.linalg.svdvals(change).square()
        held = 1 - (ours[name].double() - wanted[name].double()).square().sum() / values.sum()
        assert rank is not None
        assert held >= 0.8 - 1e-5 > values[: rank - 1].sum() / values.sum()
    assert 0.8 <= found.share < 0.95


def test_a_rank_above_all_and_numbers_that_are_none_are_said(tmp_path: Path) -> None:
    tune(tmp_path, llama)
    tuned, base = tmp_path / "tuned", tmp_path / "base"
    extracted = merge_cli.extract_lora(tuned, tmp_path / "all", base=base, rank=99)
    assert "no matrix has more than rank 16: --rank 99 cuts nothing off" in extracted.notes
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj") as caught:
        merge_cli.extract_lora(tuned, tmp_path / "none", base=base)
    assert "--exclude" in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    tune(tmp_path, llama)
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    found = merge_cli.extract_lora(
        tmp_path / "tuned", tmp_path / "adapter", base=tmp_path / "base",
        include=["q_proj"], exclude=["model.norm"],
    )  # fmt: skip
    why = {change.name: change.why for change in found.changes}
    assert why["model.embed_tokens.weight"].startswith("an embedding")
    assert why["model.norm.weight"] == "excluded"
    assert why["model.layers.0.mlp.up_proj.weight"] == "not included"
    assert why["model.layers.1.self_attn.q_proj.weight"] == ""
    assert found.share < 0.5
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "of the change: an embedding" in card
    merged = merged_by_peft(tmp_path)
    assert torch.equal(
        merged["model.norm.weight"], read_model(tmp_path / "base")["model.norm.weight"]
    )


EXPERTS = {"stored one by one": mixtral, "stored together": gpt_oss}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_get_factors_of_their_own(tmp_path: Path, case: str) -> None:
    net = EXPERTS[case]()
    net.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    net.save_pretrained(tmp_path / "tuned")
    found = merge_cli.extract_lora(
        tmp_path / "tuned", tmp_path / "adapter", base=tmp_path / "base", rank=32
    )
    out = {change.name for change in found.changes if change.why}
    assert not any("weight" in name and "experts" in name for name in out)
    theirs, ours = merged_by_peft(tmp_path), merged_here(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4
    for name, parameter in net.named_parameters():
        if ("experts" in name or "q_proj" in name) and name not in out:
            torch.testing.assert_close(theirs[name], parameter.data, rtol=1e-3, atol=1e-4)
    tuned = read_model(tmp_path / "tuned")
    for name in (name for name in ours if "experts" in name and name not in out):
        torch.testing.assert_close(ours[name], tuned[name], rtol=1e-3, atol=1e-4)


def test_experts_that_are_excluded_are_told(tmp_path: Path) -> None:
    for number, folder in enumerate(("base", "tuned")):
        net = mixtral()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.01 * number
        net.save_pretrained(tmp_path / folder)
    found = merge_cli.extract_lora(tmp_path / "tuned", tmp_path / "adapter",
                                   base=tmp_path / "base", exclude=["experts"])  # fmt: skip
    out = {change.name for change in found.changes if change.why == "excluded"}
    assert len(out) == 2 * 4 * 3
    assert all("experts" in name for name in out)


def test_the_same_bytes_by_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(tmp_path, llama, dtype=torch.bfloat16)
    from merge_cli.adapters import extract

    files = []
    for count in (1, 4):
        monkeypatch.setattr(extract, "threads_for", lambda shapes, count=count: count)
        out = tmp_path / f"by {count}"
        merge_cli.extract_lora(tmp_path / "tuned", out, base=tmp_path / "base", rank=2)
        files.append((out / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tune(tmp_path, llama)
    here: dict[str, Any] = {"base": tmp_path / "base"}
    out = tmp_path / "out"
    refusals: list[tuple[type[MergeCliError], str, dict[str, Any], Path]] = [
        (UsageError, "a rank of 0", {**here, "rank": 0}, tmp_path / "tuned"),
        (UsageError, "an energy of 1.5", {**here, "energy": 1.5}, tmp_path / "tuned"),
        (UsageError, "the same", here, tmp_path / "base"),
    ]
    for kind, said, keys, model in refusals:
        with pytest.raises(kind, match=said):
            merge_cli.extract_lora(model, out, **keys)
    llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    with pytest.raises(MismatchError):
        merge_cli.extract_lora(tmp_path / "wide", out, **here)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        merge_cli.extract_lora(tmp_path / "tuned", out, **here)
    with pytest.raises(UsageError, match="is not a model"):
        merge_cli.extract_lora(tmp_path / "tuned", out, overwrite=True, **here)
    with pytest.raises(UsageError, match="would replace"):
        merge_cli.extract_lora(tmp_path / "tuned", tmp_path / "base", overwrite=True, **here)
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_a_resized_vocabulary_is_refused_with_a_way_out(tmp_path: Path) -> None:
    tune(tmp_path, llama)
    net = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    net.resize_token_embeddings(56)
    net.save_pretrained(tmp_path / "resized")
    for name, size in (("base", 48), ("resized", 56)):
        vocabulary = {f"t{number}": number for number in range(size)}
        about = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(about))
    keys: dict[str, Any] = {"base": tmp_path / "base", "rank": 3}
    with pytest.raises(MismatchError) as refused:
        merge_cli.extract_lora(tmp_path / "resized", tmp_path / "adapter", **keys)
    assert "by a passthrough of the fine-tune" in str(refused.value)
    assert "union" not in str(refused.value)
    path = tmp_path / "cut.yaml"
    path.write_text("merge_method: passthrough\nbase_model: base\nmodels: [{model: resized}]\n"
                    "tokenizer_source: base\n")  # fmt: skip
    merge_cli.merge(path, tmp_path / "cut", options=OPTIONS)
    found = merge_cli.extract_lora(tmp_path / "cut", tmp_path / "adapter", **keys)
    assert found.share == pytest.approx(1.0, abs=1e-9)


def test_filters_that_match_nothing_are_told_or_refused(tmp_path: Path) -> None:
    tune(tmp_path, llama)
    tuned = tmp_path / "tuned"
    keys: dict[str, Any] = {"base": tmp_path / "base", "rank": 3}
    found = merge_cli.extract_lora(
        tuned, tmp_path / "adapter", include=["q_proj", "typo"], exclude=["nope"], **keys
    )
    assert "--include 'typo' matches no tensor and has no effect" in found.notes
    assert "--exclude 'nope' matches no tensor and has no effect" in found.notes
    refused = {
        "--include 'q_prok' matches no layer": (["q_prok"], "Did you mean 'q_proj'?"),
        "--include 'norm' matches no layer": (["norm"], "Norms and biases are saved without it"),
        "--include has an empty filter": ([""], "a part of a tensor's name"),
        "--include '/(/'": (["/(/"], "not a regular expression"),
    }
    for said, (include, hint) in refused.items():
        with pytest.raises(UsageError) as caught:
            merge_cli.extract_lora(tuned, tmp_path / "none", include=include, **keys)
        assert said in str(caught.value)
        assert hint in str(caught.value)
    with pytest.raises(UsageError, match="--exclude has an empty filter"):
        merge_cli.extract_lora(tuned, tmp_path / "none", exclude=["q_proj", ""], **keys)
    assert not (tmp_path / "none").exists()


def test_the_file_with_nan_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tune(tmp_path, llama)
    keys: dict[str, Any] = {"base": tmp_path / "base"}
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"\(first at element 3\)") as caught:
        merge_cli.extract_lora(tmp_path / "tuned", tmp_path / "none", **keys)
    assert str(tmp_path / "base") in str(caught.value)
    tensors["model.norm.weight"][3] = -3e38
    save_file(tensors, file, {"format": "pt"})
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((16,), 3e38, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match="its change is too large for float32"):
        merge_cli.extract_lora(tmp_path / "tuned", tmp_path / "none", **keys)


def test_an_error_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(tmp_path, llama)
    from merge_cli.adapters import extract

    def fail(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "extraction_card", fail)
    with pytest.raises(MergeCliError, match="stopped"):
        merge_cli.extract_lora(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_the_command(tmp_path: Path) -> None:
    tune(tmp_path, llama, None)
    command = ["extract-lora", "tuned", "adapter", "--base", "base", "--rank", "2"]
    ran = cli(*command, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "of the change's sum of squares in" in ran.stdout
    assert "least complete" in ran.stdout
    again = cli(*command, "--overwrite", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert 0 < json.loads(again.stdout)["share"] < 1
    refused = cli(*command, cwd=tmp_path)
    assert refused.returncode == 2
    assert "exists already" in refused.stderr


def test_threads_are_as_many_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 64)
    monkeypatch.setattr(threads, "free_memory", lambda: 16e9)
    assert threads.threads_for([(100, 200)]) == 64
    assert threads.threads_for([(100, 200)], 3) == 3
    assert threads.threads_for([(8192, 28672), (10, 10)]) == 1  # 4 GB each
    assert threads.threads_for([(4096, 4096)]) == 11
