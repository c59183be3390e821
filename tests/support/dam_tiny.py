"""Tiny real models for the tests of DAM: transformers' own classes, a few thousand parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from merge_cli.dam.assembly import assemble
from merge_cli.dam.forward import Batch
from merge_cli.dam.losses import DistillationLoss, TeacherTargets
from merge_cli.dam.models import find_targets, load_student
from merge_cli.dam.student import Student
from merge_cli.engine.residency import Residency, SourceResidency
from merge_cli.evaluation.teachers import kept_predictions
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan

VOCABULARY = 260
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "n_inner": 24, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def config(kind: str = "llama", *, tied: bool = True, **more: Any) -> Any:
    """A config of a tiny model of one of several families."""
    classes = {
        "llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "gemma2": hf.Gemma2Config,
        "gpt2": hf.GPT2Config, "mixtral": hf.MixtralConfig,
    }  # fmt: skip
    sizes = GPT2 if kind == "gpt2" else SIZES
    extra = {"head_dim": 4} if kind == "gemma2" else {}
    return classes[kind](**{**sizes, "tie_word_embeddings": tied, **extra, **more})


def write_tokenizer(folder: Path, *, template: str | None = None) -> None:
    """One token for each byte, after an end-of-text token with id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{char: i + 1 for i, char in enumerate(alphabet)}}
    for i in range(len(vocabulary), VOCABULARY):
        vocabulary[f"<|unused{i}|>"] = i
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)


def write_models(
    folder: Path, of: Any, *, dtype: torch.dtype = torch.float32,
    names: Sequence[str] = ("base", "a", "b", "c"), seed: int = 0, change: float = 0.05,
) -> list[Path]:  # fmt: skip
    """A base and sources: the base with noise of their own, like fine-tunes."""
    torch.manual_seed(seed)
    net = hf.AutoModelForCausalLM.from_config(of)
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    folders = []
    for name in names:
        tensors = {}
        for key, value in start.items():
            noise = torch.randn(value.shape) * change if name != names[0] else 0.0
            tensors[key] = (value.double() * 3 + noise).to(dtype).contiguous()
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        about = of.to_dict() | {"architectures": [type(net).__name__]}
        about["dtype"] = str(dtype).removeprefix("torch.")
        (place / "config.json").write_text(json.dumps(about))
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        write_tokenizer(place)
        folders.append(place)
    return folders


def write_experts(folder: Path, kind: str, *, dtype: torch.dtype, **more: Any) -> list[Path]:
    """A family with experts, as transformers saves it: one by one."""
    of = hf.AutoConfig.for_model(kind, **{
        **SIZES, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4,
        "moe_intermediate_size": 24, **more,
    })  # fmt: skip
    folders = write_models(folder, of, dtype=dtype)
    for place in folders:
        net = hf.AutoModelForCausalLM.from_config(of).to(dtype)
        net.load_state_dict(load_file(place / "model.safetensors"), strict=False)
        (place / "model.safetensors").unlink()
        net.save_pretrained(place)
        assert any(".experts.3." in name for name in load_file(place / "model.safetensors"))
    return folders


def write_data(folder: Path, names: Sequence[str] = ("a", "b", "c"), rows: int = 24) -> None:
    """NAME.jsonl: rows of different lengths, each source's of its own kind."""
    for number, name in enumerate(names):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(rows):
                text = f"{name * (1 + i % 5)} {i} " + "xyz"[number % 3] * (3 + (i * 7) % 11)
                row = (
                    {"text": text}
                    if i % 2
                    else {"prompt": f"{name} {i}:", "completion": f" {text}"}
                )
                file.write(json.dumps(row) + "\n")


def llamas_with_data(folder: Path) -> Path:
    """The models as Llamas, and rows of each source."""
    write_models(folder, config("llama"))
    write_data(folder)
    return folder


def write_recipe(
    folder: Path, training: Mapping[str, Any] | None = None, *,
    names: Sequence[str] = ("a", "b", "c"), base: bool = True, **keys: Any,
) -> Path:  # fmt: skip
    """recipe.yaml beside the models and their data; the paper's preset unless it says another."""
    training = {"preset": "dam", **(training or {})}
    document = {
        "merge_method": "dam",
        **({"base_model": "base"} if base else {}),
        "models": [{"model": name, "data": f"{name}.jsonl"} for name in names],
        "training": training,
        **keys,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def plan_of(folder: Path, training: Mapping[str, Any] | None = None, **keys: Any) -> Plan:
    """The plan of models written by `write_models`."""
    write_data(folder)
    return make_plan(load_recipe(write_recipe(folder, training, **keys)))


def student_of(
    plan: Plan, dtype: torch.dtype = torch.float64, residency: Residency = "host", **changes: Any
) -> Student:
    """The student of a plan, in float64 unless said otherwise."""
    training = replace(plan.recipe.learning, **changes)
    targets, problems = find_targets(plan, load_student(plan, "cpu", dtype), training)
    assert not problems
    place = SourceResidency(residency, "for a test", 0)
    return assemble(plan, targets, training, place, "cpu", dtype)


def random_batch(
    generator: torch.Generator, rows: int = 3, length: int = 12, k: int = 8,
    dtype: torch.dtype = torch.float64, vocabulary: int = VOCABULARY,
) -> Batch:  # fmt: skip
    """Padded rows with random tokens, prompts of different lengths, and random teachers."""
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    counted = torch.zeros(rows, length, dtype=torch.bool)
    labels = []
    for row in range(rows):
        end = length - 2 * row
        first = 1 + row
        mask[row, end:] = 0
        ids[row, end:] = 0
        counted[row, first - 1 : end - 1] = True
        labels.append(ids[row, first:end])
    n = int(counted.sum())
    logits = torch.randn(n, vocabulary, generator=generator, dtype=dtype) * 2
    from merge_cli.evaluation.teachers import kept_predictions

    kept, logp, tail = kept_predictions(logits, k, 2.0)
    weights = torch.full((n,), 1.0 / n, dtype=dtype)
    return Batch(ids, mask, counted, TeacherTargets(torch.cat(labels), weights, kept, logp, tail))


def targets_of(logits: torch.Tensor, k: int, temperature: float) -> TeacherTargets:
    ids, logp, tail = kept_predictions(logits, k, temperature)
    n = len(logits)
    labels = torch.arange(n) % logits.shape[1]
    return TeacherTargets(labels, torch.full((n,), 1.0 / n, dtype=logits.dtype), ids, logp, tail)


def check_a_student_outside_the_teachers_top() -> None:
    """Renormalising the top k would call this student perfect; it gives them 2 % of its mass."""
    teacher = torch.tensor([[8.0, 7.0, 6.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    student = teacher.clone()
    student[0, 3:] += 11.0  # the same order and ratios among the top three
    targets = targets_of(teacher, 3, 1.0)
    q = student.softmax(-1).gather(-1, targets.ids)
    assert 0.01 < float(q.sum()) < 0.1
    renormalised = (targets.logp.softmax(-1) * (
        targets.logp.log_softmax(-1) - student.gather(-1, targets.ids).log_softmax(-1)
    )).sum()  # fmt: skip
    assert abs(float(renormalised)) < 1e-12
    assert float(DistillationLoss({"kl": 1.0}).terms(student, targets)["kl"]) > 2
