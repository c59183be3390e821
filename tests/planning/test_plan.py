"""Plans: what is decided from headers, and everything that is refused there, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_cli
from merge_cli import load_recipe
from merge_cli.checkpoint.config import merged_config
from merge_cli.checkpoint.dtypes import promoted
from merge_cli.errors import MismatchError, RecipeError, ResourceError, SourceError, UsageError
from merge_cli.planning.layers import layer_key_of, layer_stacks, main_stack
from merge_cli.planning.plan import Plan
from tests.support.tiny import (
    Family,
    llama_config,
    llama_family,
    llama_tensors,
    merge,
    read_model,
    write_model,
)


def plan_of(folder: Path, text: str) -> Plan:
    (folder / "r.yaml").write_text(text)
    return merge_cli.plan(folder / "r.yaml")


def mismatches(folder: Path, text: str) -> list[str]:
    with pytest.raises(MismatchError) as raised:
        plan_of(folder, text)
    return [str(problem) for problem in raised.value.problems]


def rewrite(family: Family, name: str, change: Any, **config: Any) -> None:
    """Change one model of the family in place."""
    tensors = read_model(family.folder / name)
    change(tensors)
    write_model(family.folder / name, tensors, {**llama_config(), **config})


SOUP = "merge_method: soup\nmodels: [a, b]\n"


def test_every_tensor_has_a_fate(family: Family) -> None:
    plan = merge_cli.plan(family.recipe("ties"))
    assert {task.name for task in plan.tasks} == set(family.base)
    assert all(task.action == "merge" and len(task.inputs) == 4 for task in plan.tasks)
    assert plan.bytes_read == 4 * sum(t.nbytes for t in family.base.values())


def test_missing_and_extra_tensors(family: Family) -> None:
    rewrite(family, "b", lambda t: t.update({"extra.weight": torch.zeros(2)}))
    rewrite(family, "a", lambda t: t.pop("model.norm.weight"))
    found = mismatches(
        family.folder, "merge_method: task_arithmetic\nbase_model: base\nmodels: [a, b]"
    )
    assert found == [
        "extra.weight: b has it, base does not",
        "model.norm.weight: missing from a; base has it",
    ]


def test_shapes_and_vocabularies(family: Family) -> None:
    rewrite(family, "a", lambda t: t.update({"model.norm.weight": torch.zeros(17)}))
    rewrite(family, "b", lambda t: t.update({"model.embed_tokens.weight": torch.zeros(50, 16)}))
    found = mismatches(family.folder, "merge_method: soup\nmodels: [a, b, c]")
    sizes = "a [48, 16], b [50, 16], c [48, 16]."
    assert f"model.embed_tokens.weight: the vocabularies differ in size: {sizes}" in found[0]
    assert "tokenizer_source: union" in found[0]
    assert "model.norm.weight: the shapes differ: a [17], b [16], c [16]" in found


@pytest.mark.parametrize("name", [".", ".."])
def test_the_folder_that_is_a_dot_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    recipe = {"merge_method": "passthrough", "models": [name]}
    with pytest.raises(SourceError) as error:
        merge_cli.plan(recipe)
    assert f"has no safetensors files — {name} — Is this" in str(error.value)


def test_several_missing_models_at_once(family: Family) -> None:
    found = mismatches(family.folder, "merge_method: soup\nmodels: [a, ./x, ./y]")
    assert len(found) == 2


def test_buffers_that_models_compute_by_themselves(family: Family) -> None:
    rewrite(
        family,
        "b",
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
    )
    plan = plan_of(family.folder, SOUP)
    assert any("inv_freq" in note for note in plan.notes)
    plan = plan_of(family.folder, "merge_method: soup\nmodels: [b, a]")
    (task,) = (t for t in plan.tasks if "inv_freq" in t.name)
    assert task.action == "copy"


def test_integers_are_copied(family: Family, tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        rewrite(family, name, lambda t, v=value: t.update({"position": torch.tensor([v, v])}))
    plan = plan_of(family.folder, SOUP)
    (task,) = (t for t in plan.tasks if t.name == "position")
    assert (task.action, task.note) == ("copy", "I64 is not merged: copied")
    assert merge(family.folder / "r.yaml", tmp_path / "out")["position"].tolist() == [1, 1]


def test_quantised_models_are_refused(family: Family) -> None:
    rewrite(family, "a", lambda t: None, quantization_config={"quant_method": "gptq"})
    with pytest.raises(SourceError, match="quantised \\(gptq\\)"):
        plan_of(family.folder, SOUP)


def test_mixed_dtypes_are_promoted(family: Family, tmp_path: Path) -> None:
    rewrite(family, "b", lambda t: t.update({k: v.float() for k, v in t.items()}))
    plan = plan_of(family.folder, SOUP)
    assert {(t.dtype, t.note) for t in plan.tasks} == {("F32", "stored as BF16, F32")}
    assert any("written in the wider one (float32), as mergekit does" in n for n in plan.notes)
    merged = merge(family.folder / "r.yaml", tmp_path / "out")
    assert {t.dtype for t in merged.values()} == {torch.float32}
    assert {t.dtype for t in plan_of(family.folder, SOUP + "dtype: bfloat16\n").tasks} == {"BF16"}


def test_no_sixteen_bits_hold_both_formats() -> None:
    assert promoted({"BF16", "F16"}) == "F32"
    assert promoted({"F16", "F32"}) == "F32"
    assert promoted({"F64", "BF16"}) == "F64"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [("", "bfloat16"), ("dtype: float16\n", "float16"), ("dtype: torch.float32\n", "float32"),
     ("dtype: float32\nout_dtype: float16\n", "float16")],
)  # fmt: skip
def test_dtype(family: Family, tmp_path: Path, keys: str, expected: str) -> None:
    (family.folder / "r.yaml").write_text(SOUP + keys)
    merged = merge(family.folder / "r.yaml", tmp_path / "out")
    assert {t.dtype for t in merged.values()} == {getattr(torch, expected)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == expected


def test_weights_that_cancel(family: Family) -> None:
    text = (
        "merge_method: soup\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
        "  - {model: b, parameters: {weight: [-1, 1]}}\n"
    )
    with pytest.raises(RecipeError, match="sum to 0"):
        plan_of(family.folder, text)
    plan_of(family.folder, text + "parameters: {normalize: false}\n")


def test_no_base_says_who_gives_the_config(family: Family) -> None:
    assert (
        "config.json and tokenizer come from a, listed first" in plan_of(family.folder, SOUP).notes
    )


# Tied heads


def tied_family(folder: Path, stored: dict[str, bool], tied: dict[str, bool]) -> None:
    for i, name in enumerate(stored):
        generator = torch.Generator().manual_seed(i)
        tensors = llama_tensors(generator, tied=not stored[name])
        write_model(folder / name, tensors, llama_config(tied=tied[name]))


def out_config(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def test_tied_base_with_an_untied_source(tmp_path: Path) -> None:
    tied_family(tmp_path, {"a": False, "b": True}, {"a": True, "b": False})
    plan = plan_of(tmp_path, SOUP)
    assert any("a ties it to the embedding, which stands in" in note for note in plan.notes)
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    a, b = read_model(tmp_path / "a"), read_model(tmp_path / "b")
    expected = (a["model.embed_tokens.weight"] + b["lm_head.weight"]) / 2
    torch.testing.assert_close(merged["lm_head.weight"], expected)
    assert out_config(tmp_path / "out")["tie_word_embeddings"] is False


def test_redundant_heads_are_left_out(tmp_path: Path) -> None:
    tied_family(tmp_path, {"a": False, "b": True}, {"a": True, "b": True})
    plan = plan_of(tmp_path, SOUP)
    assert "lm_head.weight" not in {task.name for task in plan.tasks}
    assert any("left out, since every config ties it" in note for note in plan.notes)


def test_a_missing_head_that_is_not_tied(tmp_path: Path) -> None:
    tied_family(tmp_path, {"a": True, "b": False}, {"a": False, "b": False})
    assert mismatches(tmp_path, SOUP) == ["lm_head.weight: missing from b; a has it"]


# Layers and slices


@pytest.mark.parametrize(
    ("name", "stack", "index"),
    [
        ("model.layers.7.mlp.up_proj.weight", "model.layers", 7),
        ("h.0.attn.c_attn.bias", "h", 0),
        ("model.layers.3.experts.12.w1.weight", "model.layers", 3),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block", 2),
    ],
)
def test_layers_are_found_in_names(name: str, stack: str, index: int) -> None:
    place = layer_key_of(name)
    assert place is not None
    assert (place.stack, place.number, place.name(index)) == (stack, index, name)


def test_stacks() -> None:
    names = ["vision.layers.0.w", "vision.layers.1.w", "text.layers.0.w", "text.norm.weight"]
    assert layer_stacks(names) == {"vision.layers": 2, "text.layers": 1}
    assert main_stack(names, {"text_config": {"num_hidden_layers": 1}}) == "text.layers"
    assert main_stack(names, {}) is None
    assert layer_key_of("model.norm.weight") is None


FRANKEN = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
"""


def test_stacking_layers(family: Family, tmp_path: Path) -> None:
    (family.folder / "r.yaml").write_text(FRANKEN)
    merged = merge(family.folder / "r.yaml", tmp_path / "out")
    a, b, _ = family.models
    for out, (model, layer) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for part in ("mlp.up_proj.weight", "input_layernorm.weight"):
            mine = merged[f"model.layers.{out}.{part}"]
            assert torch.equal(mine, model[f"model.layers.{layer}.{part}"])
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], b["model.norm.weight"])
    assert out_config(tmp_path / "out")["num_hidden_layers"] == 6


def test_merging_slices(family: Family, tmp_path: Path) -> None:
    """A gradient runs over the layers of its slice; other tensors take its first value."""
    (family.folder / "r.yaml").write_text("""\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {t: [0.0, 1.0]}
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
    parameters: {t: [1.0, 0.0]}
""")
    plan = merge_cli.plan(family.folder / "r.yaml")
    t = {task.name: task.parameters["t"] for task in plan.tasks}
    assert [t[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)] == [0.0, 1.0, 1.0, 0.0]
    assert (t["model.embed_tokens.weight"], t["model.norm.weight"]) == (0.0, 1.0)


def test_a_base_that_the_slices_do_not_list(family: Family) -> None:
    plan = plan_of(family.folder, """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources: [{model: a, layer_range: [1, 3]}]
""")  # fmt: skip
    (task,) = (t for t in plan.tasks if t.name == "model.layers.0.mlp.up_proj.weight")
    assert task.base is not None
    assert task.base.name == task.operands[0].name == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FRANKEN.replace("[1, 4]", "[1, 9]"),
         ":4:26: slices[1].sources[0].layer_range: b has 4 layers, not 9"),
        (FRANKEN.replace("passthrough", "slerp"), ":3:5: slices[0]: slerp takes exactly 2"),
        (FRANKEN.replace("passthrough", "soup").replace(
            "{model: b, layer_range: [1, 4]}",
            "{model: b, layer_range: [1, 4]}, {model: a, layer_range: [0, 1]}"),
         "different numbers of layers"),
        (FRANKEN.replace("[1, 4]", "[4, 1]"), "0 <= first < last"),
        (FRANKEN.replace(", layer_range: [1, 4]", ""), "layer_range: missing"),
    ],
)  # fmt: skip
def test_slices_that_cannot_be(family: Family, text: str, words: str) -> None:
    with pytest.raises((RecipeError, MismatchError)) as raised:
        plan_of(family.folder, text)
    assert words in str(raised.value)


def test_config_follows_the_layers() -> None:
    kinds = ["full", "sliding", "full", "sliding"]
    original = {
        "num_hidden_layers": 4,
        "layer_types": kinds,
        "mlp_only_layers": [1],
        "other": [1, 2],
    }
    layers = [
        (original, 0),
        (original, 1),
        (original, 1),
        (original, 3),
        (original, 2),
    ]
    config, changes = merged_config(original, layers=layers)
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["full", "sliding", "sliding", "sliding", "full"]
    assert config["mlp_only_layers"] == [1, 2]
    assert config["other"] == [1, 2]
    assert "num_hidden_layers: 4 -> 5" in changes
    assert original["num_hidden_layers"] == 4


def test_config_is_copied_byte_for_byte_when_nothing_changes(
    family: Family, tmp_path: Path
) -> None:
    original = (family.folder / "base" / "config.json").read_text()
    odd = original.replace("{", "{\n\n  ", 1)
    (family.folder / "base" / "config.json").write_text(odd)
    merge(family.recipe("ties"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == odd


# Companions


def test_companion_files(family: Family, tmp_path: Path) -> None:
    base, other = family.folder / "base", family.folder / "a"
    own = b'{  "as": "it is \xc3\xa9"}\r\n'
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja", "preprocessor_config.json", "vocab.txt"):  # fmt: skip
        (base / name).write_bytes(own)
        (other / name).write_bytes(b"other")
    tokens = json.dumps({"model": {"vocab": {f"t{i}": i for i in range(48)}}})
    for folder in (base, other):
        (folder / "tokenizer_config.json").unlink()
        (folder / "tokenizer.json").write_text(tokens + " " * (folder == other))
    for name in ("modeling_x.py", "notes.txt", "pytorch_model.bin", "README.md"):
        (base / name).write_text("not wanted")
    merge(family.recipe("ties", tokenizer_source="a"), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "generation_config.json").read_bytes() == own
    assert (out / "preprocessor_config.json").read_bytes() == own
    assert (out / "tokenizer.json").read_text() == tokens + " "
    assert (out / "chat_template.jinja").read_bytes() == b"other"
    assert "not wanted" not in (out / "README.md").read_text()
    assert not (out / "modeling_x.py").exists()
    assert not (out / "pytorch_model.bin").exists()
    merge(family.recipe("ties"), tmp_path / "bare", copy_tokenizer=False)
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    assert (tmp_path / "bare" / "generation_config.json").exists()
    merge(family.recipe("ties"), tmp_path / "code", trust_remote_code=True)
    assert (tmp_path / "code" / "modeling_x.py").exists()


def test_tokenizer_source_must_be_one_of_the_models(family: Family) -> None:
    with pytest.raises(RecipeError, match="not one of the recipe's models"):
        merge_cli.plan(family.recipe("ties", tokenizer_source="elsewhere/x"))


def test_existing_target(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("soup", base=False)
    (tmp_path / "out").mkdir()
    merge(recipe, tmp_path / "out")  # an empty folder is no loss
    with pytest.raises(UsageError, match="exists already"):
        merge(recipe, tmp_path / "out")
    (tmp_path / "out" / "stale.safetensors").write_text("old")
    merge(recipe, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        merge(recipe, tmp_path / "file")


def test_disk_space_is_checked_first(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="the disk is too full"):
        merge(family.recipe("soup", base=False), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_planning_is_linear(tmp_path: Path) -> None:
    """Ten times the tensors must not take a hundred times the steps: counted, not timed."""
    import sys

    def steps(layers: int) -> int:
        llama_family(tmp_path / str(layers), layers=layers)
        (tmp_path / str(layers) / "r.yaml").write_text(SOUP)
        count = 0

        def trace(*_: Any) -> None:
            nonlocal count
            count += 1

        recipe = merge_cli.load_recipe(tmp_path / str(layers) / "r.yaml")
        sys.setprofile(trace)
        try:
            merge_cli.plan(recipe)
        finally:
            sys.setprofile(None)
        return count

    assert steps(40) < 15 * steps(4)


def test_many_slices_take_no_longer_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is taken apart once, however many sources have it and slices look at it."""
    family = llama_family(tmp_path, layers=12)
    parts = "".join(
        f"  - sources: [{{model: a, layer_range: [{i}, {i + 1}]}},"
        f" {{model: b, layer_range: [{i}, {i + 1}]}}]\n"
        for i in range(12)
    )
    seen: list[str] = []

    def counted(name: str) -> Any:
        seen.append(name)
        return layer_key_of(name)

    monkeypatch.setattr("merge_cli.planning.layers.layer_key_of", counted)
    plan = plan_of(tmp_path, "merge_method: soup\nslices:\n" + parts)
    assert {task.name for task in plan.tasks} == set(family.base)
    assert len(seen) == len(set(seen)) == len(family.base)


def test_tensors_that_are_treated_alike_share_their_parameters(family: Family) -> None:
    plan = merge_cli.plan(family.recipe("ties", parameters={"density": [1.0, 0.1]}))
    assert len({id(task.parameters) for task in plan.tasks}) == 4  # one for each layer's position
    assert len({id(task.sources) for task in plan.tasks}) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_planning_leaves_the_collector_as_it_was(family: Family, enabled: bool) -> None:
    import gc

    (gc.enable if enabled else gc.disable)()
    try:
        plan_of(family.folder, SOUP)
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == 0
        gc.freeze()  # as a program may have done
        plan_of(family.folder, SOUP)
        assert gc.get_freeze_count() > 0
        with pytest.raises(SourceError):
            plan_of(family.folder, "merge_method: soup\nmodels: [a, ./missing]\n")
        assert gc.isenabled() is enabled
    finally:
        gc.unfreeze()
        gc.enable()


# Traps


def test_the_same_model_twice_in_a_slice(family: Family, tmp_path: Path) -> None:
    """Layers 0 and 2 of one model, averaged: each part keeps its own range."""
    family.write(
        "merge_method: soup\nslices:\n  - sources:\n      - {model: a, layer_range: [0, 2]}\n"
        "      - {model: a, layer_range: [2, 4]}\ndtype: float32\n"
    )
    merged = merge(family.folder / "recipe.yaml", tmp_path / "out")
    a = family.models[0]
    part = "mlp.up_proj.weight"
    mean = (a[f"model.layers.1.{part}"].float() + a[f"model.layers.3.{part}"].float()) / 2
    assert torch.equal(merged[f"model.layers.1.{part}"], mean)


def test_two_spellings_of_one_model(family: Family, tmp_path: Path) -> None:
    """`./base` is the base, not another source; the resolved recipe must agree."""
    family.write(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [a, ./base, ../x/b]\n"
        "parameters: {normalize: true}\ndtype: float32\n".replace("../x/b", f"{family.folder}/b")
    )
    first = merge(family.folder / "recipe.yaml", tmp_path / "out")
    again = merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")
    name = "model.norm.weight"
    expected = (family.models[0][name].float() + family.models[1][name].float()) / 2
    torch.testing.assert_close(first[name], expected)
    assert torch.equal(first[name], again[name])
    family.write("merge_method: slerp\nbase_model: base\nmodels: [./base, a]\n")
    assert len(merge_cli.plan(family.folder / "recipe.yaml").operands) == 2


def test_slices_drop_nothing_without_a_word(family: Family) -> None:
    extra = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(16)}
    rewrite(family, "b", lambda t: t.update(extra))
    sources = "[{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]"
    found = mismatches(family.folder, f"merge_method: soup\nslices:\n  - sources: {sources}\n")
    assert found == ["model.layers.1.self_attn.q_proj.bias: b has it, a does not"]


def test_a_stored_head_that_the_config_ties(tmp_path: Path) -> None:
    """Loading would replace it by the embedding, so that the embedding is what counts."""
    tied_family(tmp_path, {"a": True, "b": True}, {"a": True, "b": False})
    plan_of(tmp_path, SOUP)
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    a, b = read_model(tmp_path / "a"), read_model(tmp_path / "b")
    expected = (a["model.embed_tokens.weight"] + b["lm_head.weight"]) / 2
    torch.testing.assert_close(merged["lm_head.weight"], expected)


def test_a_buffer_that_only_the_base_has(family: Family, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(family, "base", lambda t: t.update({name: torch.ones(4)}))
    merged = merge(family.recipe("task_arithmetic", models=[None]), tmp_path / "out")
    assert merged[name].tolist() == [1.0] * 4


def test_shards_in_a_subfolder(family: Family, tmp_path: Path) -> None:
    model = family.folder / "a"
    (model / "parts").mkdir()
    (model / "model.safetensors").rename(model / "parts" / "w.safetensors")
    index = {"weight_map": dict.fromkeys(family.base, "parts/w.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = plan_of(family.folder, SOUP)
    assert plan.shards_read(0) == {"parts/w.safetensors"}
    merge(family.folder / "r.yaml", tmp_path / "out")


def test_every_model_that_cannot_be_opened_has_its_line(tmp_path: Path) -> None:
    """Where nothing else is wrong, and where something is: then all of it is told at once."""
    write_model(tmp_path / "m", {"w": torch.zeros(4)}, llama_config())
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    listed = "merge_method: soup\nmodels:\n  - m\n  - ./none\n  - {model: file.gguf}\n"
    (tmp_path / "r.yaml").write_text(listed)
    with pytest.raises(MismatchError) as several:
        merge_cli.plan(load_recipe(tmp_path / "r.yaml"))
    assert [(p.line, p.key) for p in several.value.problems] == [
        (4, "models[1]"), (5, "models[2].model"),
    ]  # fmt: skip
    assert "truncated: its header ends beyond the file" in str(several.value)
    (tmp_path / "r.yaml").write_text(listed.replace("  - {model: file.gguf}\n", ""))
    with pytest.raises(SourceError, match=r"r\.yaml:4:5: no such folder") as one:
        merge_cli.plan(load_recipe(tmp_path / "r.yaml"))
    assert one.value.model == "./none"
    (tmp_path / "r.yaml").write_text(listed + "dtpye: bf16\n")
    with pytest.raises(RecipeError) as both:
        load_recipe(tmp_path / "r.yaml")
    assert [p.line for p in both.value.problems] == [4, 5, 6]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: soup\nmodels: [a, b]\ndtype: bf16\n", "Did you mean 'bfloat16'"),
        ("merge_method: soup\nmodels: [a, b]\ndtype: float\n", "Did you mean 'float32'"),
        ("merge_method: soup\nmodels: [a, b]\ndtype: FP16\n", "Did you mean 'float16'"),
        ("merge_method: TIES\nbase_model: b\nmodels: [a]\n", "Did you mean 'ties'"),
        ("merge_method: slerp\nbase_model: b\nmodels: [b, a, c]\nparameters: {t: 0.5}\n",
         "The base counts: list 2, or name the base under `base_model` alone"),
        ("merge_method: slerp\nmodels: [b, a, c]\nparameters: {t: 0.5}\n",
         "lists those that take more"),
        ("merge_method: soup\nmodels:\n\t- a\n", "a tab in the indentation: use spaces"),
    ],
)  # fmt: skip
def test_what_to_type_instead(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert words in str(caught.value)


def test_different_architectures_are_named_in_the_first_line(family: Family) -> None:
    rewrite(family, "b", lambda t: t.pop("model.norm.weight"), model_type="mistral")
    with pytest.raises(MismatchError) as raised:
        plan_of(family.folder, SOUP)
    assert str(raised.value).splitlines()[0].endswith("the architectures differ (llama, mistral)")
