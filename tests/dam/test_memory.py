"""The plan's memory: activations against what autograd keeps, residency by what really fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import merge_cli
from merge_cli.dam.assembly import enable_checkpointing
from merge_cli.dam.forward import Forward
from merge_cli.dam.memory import activation_bytes, largest_batch
from merge_cli.dam.panel import training_json
from merge_cli.dam.plan import plan_training
from merge_cli.dam.start import LAMBDAS
from merge_cli.engine import device as device_module
from merge_cli.engine import residency as residency_module
from merge_cli.engine.device import choose_device
from merge_cli.engine.residency import choose_residency, reserve
from merge_cli.errors import ResourceError, UsageError
from merge_cli.options import MergeOptions
from tests.support.command import cli
from tests.support.dam_tiny import (
    config,
    llamas_with_data,
    plan_of,
    random_batch,
    write_recipe,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GB = 1_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llamas_with_data(tmp_path_factory.mktemp("models"))


def kept_by_autograd(net: Any, rows: int, length: int) -> int:
    """Bytes of distinct storages that a forward pass keeps until the backward pass.

    Parameters are left out, and the counted hidden states' gradient is in: the output layer's
    chunks are gone by then.
    """
    batch = random_batch(torch.Generator().manual_seed(0), rows, length, dtype=torch.float32)
    forward = Forward(net)
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address could be another's next
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = forward._hidden(batch.ids, batch.mask)[batch.counted]
    return sum(found.values()) + 2 * hidden.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(3, 32), (4, 120)])
def test_activations_of_a_llama(
    dtype: torch.dtype, kv_heads: int, checkpointing: bool, rows: int, length: int
) -> None:
    """Within 15 % of what autograd keeps; checkpointed, of what is kept before a layer's own."""
    about = hf.LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=176, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    net = hf.AutoModelForCausalLM.from_config(about).to(dtype)
    if checkpointing:
        net.train()
        enable_checkpointing(net)
    measured = kept_by_autograd(net, rows, length)
    width = torch.empty((), dtype=dtype).element_size()
    planned = activation_bytes(about, rows, length, width, checkpointing=checkpointing)
    if checkpointing:  # a layer is computed again in the backward pass, one at a time
        without = activation_bytes(about, rows, length, width, checkpointing=False)
        fewer = replace_layers(about, 4)
        planned -= without - activation_bytes(fewer, rows, length, width, checkpointing=False)
    assert measured / 1.15 < planned < measured * 1.15


def replace_layers(about: Any, layers: int) -> Any:
    return hf.LlamaConfig(**{**about.to_dict(), "num_hidden_layers": layers})


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "mixtral"])
def test_activations_of_other_families_are_within_a_factor_of_two(kind: str) -> None:
    about = config(kind)
    torch.manual_seed(0)
    net = hf.AutoModelForCausalLM.from_config(about).eval()
    measured = kept_by_autograd(net, 3, 40)
    planned = activation_bytes(about, 3, 40, 4, checkpointing=False)
    assert measured / 2 < planned < measured * 2


def test_the_largest_batch_holds_every_one_that_is_made(models: Path) -> None:
    from merge_cli.dam.data import Order
    from merge_cli.evaluation.forward import micro_batches

    for tokens in (1, 60, 10_000):
        training = {"batch_tokens": tokens, "batch_size": 2, "max_length": 40}
        decided = plan_training(plan_of(models, training), "cpu")
        rows, length = largest_batch(decided.datasets, decided.training)
        orders = [Order(dataset, decided.training, 0) for dataset in decided.datasets]
        for step in range(decided.steps):
            examples = [
                dataset.train[i]
                for dataset, order in zip(decided.datasets, orders, strict=True)
                for i in order.batch(step)
            ]
            for group in micro_batches(range(len(examples)), examples, tokens):
                longest = max(len(examples[i].ids) for i in group)
                assert longest <= length
                assert len(group) * longest <= max(tokens, length)
                assert len(group) * longest <= max(rows * length, tokens)


def test_sources_stay_on_the_device_where_everything_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """43.5 GB beside a student of 14.5 GB: a fixed share of 0.6 sent them to the host."""
    monkeypatch.setattr(residency_module, "free_memory", lambda *about: 200 * GB)
    size, student, rest = int(43.5 * GB), int(14.5 * GB), 6 * GB

    def on(memory: int, beside: int = student + rest, size: int = size) -> Any:
        return choose_residency(size, 0, on_device=beside, memory=memory, exact=True)

    assert on(80 * GB).residency == "device"
    assert 80 * GB - reserve(80 * GB) >= size + student + rest
    # What is just too large goes to the host, and the reason says what is left.
    edge = 80 * GB - reserve(80 * GB) - size
    assert on(80 * GB, edge).residency == "device"
    result = on(80 * GB, edge + 1)
    assert result.residency == "host"
    assert "leaves 43.5 GB of the device" in result.reason
    assert on(40 * GB).residency == "host"
    assert choose_residency(size, 0, on_device=student, memory=80 * GB).residency == "host"


def test_a_card_that_is_not_here_can_be_planned_for(models: Path) -> None:
    plan = plan_of(models, {"max_length": 40})
    here, there = plan_training(plan, "cpu"), plan_training(plan, "cuda:80GB")
    assert here.peak.device is None
    assert there.device == "cuda:0"
    assert there.residency.residency == "device"
    assert there.why["device"] == "a card of 80 GB: planned for"
    needs = there.needs
    assert there.peak.device == needs.beside_sources + there.residency.bytes
    assert there.peak.host == needs.predictions + needs.interpreter
    assert here.peak.host == (here.needs.beside_sources + here.needs.on_host + here.residency.bytes)
    assert not there.warnings
    # Too small for the sources, and then for anything.
    small = there.peak.device + needs.interpreter
    assert not plan_training(plan, f"cuda:{small}B").warnings
    tight = plan_training(plan, f"cuda:{there.peak.device}B")
    assert tight.residency.residency == "host"
    (warning,) = plan_training(plan, f"cuda:{needs.student}B").warnings
    assert "of device memory" in warning
    assert "checkpointing" in warning


def test_a_card_that_is_not_here_is_refused_by_what_runs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(models)
    ran = cli("run", recipe, tmp_path / "out", "--device", "cuda:80GB")
    assert ran.returncode != 0
    assert "'cuda:80GB' is for plans: no card of 80 GB is here to run on" in ran.stderr
    assert not (tmp_path / "out.training").exists()
    with pytest.raises(ResourceError, match="for plans"):
        merge_cli.merge(recipe, tmp_path / "out", options=MergeOptions(device="cuda:80GB"))
    for unknown in ("cuda:x", "cuda:0GB", "tpu:80GB"):
        with pytest.raises(UsageError):
            choose_device(unknown, planned=True)
    # Where there is one it is taken.
    monkeypatch.setattr(device_module, "_GPU_FILES", ("/",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = [40 * GB, 79 * GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (sizes[i], sizes[i]))
    assert device_module.device_here("cuda:80GB") == "cuda:1"
    assert device_module.device_here("cuda:24GB") == "cuda:0"


def test_the_plan_of_any_method_takes_such_a_card(models: Path) -> None:
    for document in (["models:", "  - model: a", "  - model: b", "merge_method: soup"],):
        path = models / "soup.yaml"
        path.write_text("\n".join(document) + "\n")
        shown = cli("plan", path, "--device", "cuda:80GB")
        assert shown.returncode == 0, shown.stderr


def test_the_plan_shows_tokens_peak_and_what_it_will_try(models: Path) -> None:
    plan = plan_of(models, {"max_length": 40, "start": "best", "form": "task_vector"})
    decided = plan_training(plan, "cpu")
    shown = training_json(decided)
    count = sum(len(e.ids) for d in decided.datasets for e in d.train)
    assert shown["tokens"] == pytest.approx(count, rel=0.2)
    assert shown["start"][:5] == ["base", "source a", "source b", "source c", "uniform soup"]
    assert len(shown["start"]) == 5 + len(LAMBDAS) + 2
    assert shown["start"][-2:] == ["fisher", "regmean"]
    assert all(tokens > 0 for tokens in shown["statistics"].values())
    assert "fisher" not in training_json(plan_training(plan_of(models, {}), "cpu"))["start"]
    assert shown["peak"]["device"] is None
    assert shown["peak"]["host"] == sum(shown["memory"].values()) + shown["source_bytes"]
    checkpointed = plan_training(plan_of(models, {"checkpointing": True, "max_length": 40}), "cpu")
    assert checkpointed.needs.activations < decided.needs.activations
    text = cli("plan", write_recipe(models, {"start": "best", "form": "task_vector"})).stdout
    flat = " ".join(text.split())
    for words in ("the best on held-out rows of base, source a", "fisher, regmean; fisher looks at",
                  "tokens", "at the peak", "activations"):  # fmt: skip
        assert words in flat


def test_predictions_of_the_whole_vocabulary_that_do_not_fit_are_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_cli.dam import plan as plan_module

    plan = plan_of(models, {"top_k": "full", "max_length": 40})
    decided = plan_training(plan, "cpu")
    train = sum(e.counted for d in decided.datasets for e in d.train)
    assert decided.needs.predictions > 8 * 260 * train
    monkeypatch.setattr(plan_module, "free_memory", lambda *about: decided.needs.predictions - 1)
    with pytest.raises(ResourceError, match="predictions take"):
        plan_training(plan, "cpu")
    plan_training(plan, "cuda:80GB")  # another machine's memory is not known
    assert replace(decided.needs, predictions=0).on_host == decided.needs.interpreter
