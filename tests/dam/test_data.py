"""Data of all kinds to sequences; the teachers' cache; the split, the order, the errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merge_cli.dam.data import Dataset, Order, load_datasets, steps_of
from merge_cli.dam.plan import kept_for, plan_training
from merge_cli.data.rows import part_of
from merge_cli.data.sequences import cut
from merge_cli.errors import RecipeError, ResourceError, SourceError
from merge_cli.evaluation import teachers
from merge_cli.evaluation.fingerprints import source_identity
from merge_cli.evaluation.forward import Example, padded
from merge_cli.evaluation.rows import make_row
from merge_cli.evaluation.tokens import Encoded
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.training import Training
from merge_cli.sources.source import Source
from tests.support.dam_tiny import (
    config,
    plan_of,
    write_data,
    write_models,
    write_recipe,
    write_tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, config("llama"), names=("base", "a", "b", "c"), change=0.3)
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def teacher_of(source: Source, device: str, dtype: str) -> teachers.Teacher:
    return teachers.Teacher(source, source_identity(source), device, dtype)


def tokenizer_of(folder: Path, template: str | None = None) -> Any:
    from transformers import AutoTokenizer

    write_tokenizer(folder, template=template)
    return AutoTokenizer.from_pretrained(folder)


def datasets_of(models: Path, tokenizer: Any, data: Any, **training: Any) -> Any:
    path = write_recipe(models, training)
    import yaml

    document = yaml.safe_load(path.read_text())
    document["models"][0]["data"] = data
    path.write_text(yaml.safe_dump(document))
    recipe = load_recipe(path)
    assert recipe.training is not None
    return load_datasets(recipe, ["a", "b", "c"], tokenizer, recipe.training, 128)


def test_every_kind_of_row_becomes_tokens(models: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, TEMPLATE)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows: list[dict[str, Any]] = [
        {"text": "plain"}, {"prompt": "one ", "completion": "two"}, {"messages": messages},
    ]  # fmt: skip
    place = models / "mixed.jsonl"
    place.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = datasets_of(models, tokenizer, "mixed.jsonl", held_out=0)[0].train
    texts = {tokenizer.decode(one.ids[one.first :]) for one in found}
    assert texts == {"plain", "two", "[assistant]ho"}
    (models / "whole.txt").write_text("a whole file")
    (text,) = datasets_of(models, tokenizer, ["whole.txt"], held_out=0)[0].train
    assert tokenizer.decode(text.ids[text.first :]) == "a whole file"
    found = datasets_of(models, tokenizer, "mixed.jsonl", held_out=0, prompt_loss=True)[0].train
    assert {one.first for one in found} == {1}


def test_parquet_and_data_sets_of_the_hub(models: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    tokenizer = tokenizer_of(tmp_path)
    table = pyarrow.Table.from_pylist([{"text": "from parquet", "other": 1}] * 4)
    parquet.write_table(table, models / "rows.parquet")
    found = datasets_of(models, tokenizer, "rows.parquet", held_out=0)[0]
    assert tokenizer.decode(found.train[0].ids[1:]) == "from parquet"
    (models / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match="is not a Parquet file"):
        datasets_of(models, tokenizer, "broken.parquet")


def test_a_hub_data_set_goes_through_the_package(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    asked: list[Any] = []

    def load_dataset(*arguments: Any, **named: Any) -> Any:
        asked.append((arguments, named))
        return [{"text": f"row {i}", "id": i} for i in range(5)]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = {"dataset": "someone/texts", "config": "en", "split": "test", "revision": "abc"}
    found = datasets_of(models, tokenizer_of(tmp_path), data, held_out=0)[0]
    assert len(found.train) == 5
    assert asked == [(("someone/texts", "en"), {"split": "test", "revision": "abc"})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ResourceError, match=r"pip install 'merge-cli\[data\]'"):
        datasets_of(models, tokenizer_of(tmp_path), data)


@pytest.mark.parametrize("line", ["{", '{"txt": 1}', "[1]", '{"text": 3}'])
def test_a_malformed_line_is_named(models: Path, tmp_path: Path, line: str) -> None:
    (models / "bad.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(SourceError, match="line 2") as error:
        datasets_of(models, tokenizer_of(tmp_path), "bad.jsonl")
    assert "bad.jsonl" in str(error.value)


def test_missing_files_are_named_in_the_recipe(models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+: models\[0\].data: no such file"):
        datasets_of(models, tokenizer_of(tmp_path), "gone.jsonl")
    with pytest.raises(RecipeError, match="give either files or a dataset"):
        datasets_of(models, tokenizer_of(tmp_path), {"files": "a.jsonl", "dataset": "x/y"})


def test_long_rows_are_cut_and_every_token_is_predicted_once() -> None:
    for first in (1, 4, 9, 23):
        row = Encoded(list(range(100, 130)), first)
        pieces = list(cut(row, 8))
        predicted = [token for one in pieces for token in one.ids[one.first :]]
        assert predicted == list(range(100 + first, 130))
        assert all(2 <= len(one.ids) <= 8 for one in pieces)
    assert list(cut(Encoded([1], 1), 8)) == []


def test_rows_are_split_before_they_are_cut(models: Path, tmp_path: Path) -> None:
    """No document is on both sides, and an explicit file is taken as it is."""
    tokenizer = tokenizer_of(tmp_path)
    rows = [{"text": chr(ord("A") + i) * 30} for i in range(20)]
    (models / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = datasets_of(models, tokenizer, "letters.jsonl", held_out=0.2, max_length=8)[0]

    def letters(part: Any) -> set[str]:
        return {char for one in part for char in tokenizer.decode(one.ids[one.first :])}

    assert letters(found.train) & letters(found.held_out) == set()
    assert len(letters(found.held_out)) == 4
    assert max(len(one.ids) for one in found.train) == 8
    write_data(models, ("held",))
    data = {"files": "letters.jsonl", "held_out": "held.jsonl"}
    own = datasets_of(models, tokenizer, data, max_length=8)[0]
    assert len(letters(own.train)) == 20
    assert len(own.held_out) == 64  # at most `held_out_examples`


def words_of(tokenizer: Any, part: Any) -> set[str]:
    """What sequences say, as `write_rows` wrote it."""
    return {" ".join(tokenizer.decode(one.ids[1:]).split()) for one in part}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def leaks(tokenizer: Any, found: Any) -> set[str]:
    """Rows that are trained on somewhere, and held out somewhere."""
    train = set().union(*(words_of(tokenizer, one.train) for one in found))
    return train & set().union(*(words_of(tokenizer, one.held_out) for one in found))


def test_a_row_that_is_held_out_is_trained_on_nowhere(models: Path, tmp_path: Path) -> None:
    """Duplicates, other white space, another form, and two sources with one file."""
    tokenizer = tokenizer_of(tmp_path)
    rows: list[dict[str, Any]] = []
    for i in range(12):
        text = f"row number {i} " + "ab" * i
        rows += [{"text": text}, {"text": f"  {text} ", "id": i},
                 {"prompt": text[:4], "completion": text[4:].replace(" ", "\n")}]  # fmt: skip
    write_rows(models / "twice.jsonl", rows)
    found = datasets_of(models, tokenizer, "twice.jsonl", held_out=0.25)
    assert leaks(tokenizer, found) == set()
    assert len(found[0].held_out) == 3  # of what is said, not of lines
    assert found[0].removed == 6
    assert len(found[0].train) == 27
    # The same file for the second source: what one holds out, the other does not learn.
    shared = datasets_of(models, tokenizer, ["twice.jsonl", "b.jsonl"], held_out=0.25)
    assert leaks(tokenizer, shared) == set()
    assert shared[1].removed > 0
    assert all(one.train and one.held_out for one in shared)


def test_held_out_files_that_share_rows_with_training(models: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    rows = [{"text": f"row number {i}"} for i in range(10)]
    write_rows(models / "all.jsonl", rows)
    write_rows(models / "some.jsonl", [*rows[:3], *rows[:3], {"text": "another"}])
    data = {"files": "all.jsonl", "held_out": "some.jsonl"}
    (found, *_) = datasets_of(models, tokenizer, data)
    assert leaks(tokenizer, [found]) == set()
    assert (len(found.train), len(found.held_out), found.removed) == (7, 4, 3)
    for held_out in ("all.jsonl", "../" + models.name + "/all.jsonl"):
        with pytest.raises(SourceError, match=r"all of its 10 rows are held out.*all\.jsonl"):
            datasets_of(models, tokenizer, {"files": "all.jsonl", "held_out": held_out})


def test_data_without_duplicates_is_split_as_before(models: Path, tmp_path: Path) -> None:
    """A shuffle by the seed and the source's name, of which the first share is held out."""
    import random

    tokenizer = tokenizer_of(tmp_path)
    rows = [f"row number {i}" for i in range(30)]
    write_rows(models / "plain.jsonl", [{"text": row} for row in rows])
    (found, *_) = datasets_of(models, tokenizer, "plain.jsonl", held_out=0.2)
    random.Random("0:a:split").shuffle(rows)
    texts = [[tokenizer.decode(one.ids[1:]) for one in part]
             for part in (found.held_out, found.train)]  # fmt: skip
    assert texts == [rows[:6], rows[6:]]
    assert found.removed == 0


def test_a_token_that_the_models_lack_is_named(models: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    tokenizer.add_tokens(["<new>"])
    write_rows(models / "new.jsonl", [{"text": "fine"}, {"text": "a <new> one"}])
    path = write_recipe(models)
    recipe = load_recipe(path)
    import yaml

    document = yaml.safe_load(path.read_text())
    document["models"][0]["data"] = "new.jsonl"
    path.write_text(yaml.safe_dump(document))
    recipe = load_recipe(path)
    with pytest.raises(SourceError, match=r"line 2: its token '<new>' has the number 260.*260"):
        load_datasets(recipe, ["a", "b", "c"], tokenizer, Training(), 128, 260)


def test_order_visits_everything_once_in_each_pass(models: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    (dataset, other, _) = datasets_of(models, tokenizer, "a.jsonl", examples=17, batch_size=4)
    training = Training(batch_size=4, epochs=2)
    order = Order(dataset, training, 0)
    per_pass = -(-len(dataset.train) // 4)
    for number in range(2):
        seen = [i for step in range(per_pass) for i in order.batch(number * per_pass + step)]
        assert sorted(seen) == list(range(len(dataset.train)))
    assert steps_of([dataset, other], training) == 2 * per_pass
    padding = sum(
        max(len(dataset.train[i].ids) for i in order.batch(s)) - len(dataset.train[i].ids)
        for s in range(per_pass) for i in order.batch(s)
    )  # fmt: skip
    lengths = [len(one.ids) for one in dataset.train]
    assert padding < sum(max(lengths) - length for length in lengths) / 2  # like with like


def test_padding_carries_no_loss() -> None:
    from array import array

    short, long = Example(array("i", [5, 6, 7]), 2), Example(array("i", [1, 2, 3, 4, 5]), 1)
    ids, mask, counted = padded([short, long])
    assert mask.sum(1).tolist() == [3, 5]
    assert counted.tolist() == [[False, True, False, False, False], [True] * 4 + [False]]
    assert ids[0].tolist() == [5, 6, 7, 0, 0]


def test_the_cache_is_reused_and_keyed_by_content(
    models: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Digests of files that have just been written are not kept, and plans make none.
    monkeypatch.setattr("merge_cli.checkpoint.fingerprint._SETTLED", -1.0)
    plan = plan_of(models, {"top_k": 8, "max_length": 24, "examples": 20})
    decided = plan_training(plan, "cpu")
    assert all(one.missing > 0 for one in decided.teachers)
    (dataset, *_) = decided.datasets
    source = plan.sources[plan.operands[0]]
    teacher = teacher_of(source, "cpu", "float32")
    first = teacher.predictions(dataset.train, decided.kept, lambda *_: None)
    assert teacher.passes > 0
    again = teacher_of(source, "cpu", "float32")
    second = again.predictions(dataset.train, decided.kept, lambda *_: None)
    assert again.passes == 0
    for number in range(len(dataset.train)):
        for mine, theirs in zip(first.of(number), second.of(number), strict=True):
            assert torch.equal(mine, theirs)
    assert again.missing(dataset.train, decided.kept) == 0
    # Another temperature, another model, other tokens: other predictions.
    assert again.missing(dataset.train, kept_for(decided.training, held_out=True)) > 0
    assert teacher_of(plan.sources[plan.operands[1]], "cpu", "float32").missing(
        dataset.train, decided.kept
    )
    assert again.missing(decided.datasets[1].train, decided.kept) > 0
    held = plan_training(plan, "cpu").teachers[0]
    assert held.missing == len(dataset.held_out)
    size = sum(f.stat().st_size for f in cache.rglob("*.safetensors"))
    expected = decided.kept.bytes_of(sum(one.counted for one in dataset.train), 260)
    assert expected < size < expected * 1.2 + 2000


def test_predictions_are_the_teachers(models: Path) -> None:
    """Against one row at a time through transformers, at the places that count."""
    from transformers import AutoModelForCausalLM

    plan = plan_of(models, {"top_k": 300, "max_length": 24, "examples": 6, "temperature": 2.0})
    decided = plan_training(plan, "cpu")
    dataset = decided.datasets[1]
    teacher = teacher_of(plan.sources[plan.operands[1]], "cpu", "float32")
    known = teacher.predictions(dataset.train, decided.kept, lambda *_: None)
    net = AutoModelForCausalLM.from_pretrained(models / "b").eval()
    for number, one in enumerate(dataset.train):
        with torch.no_grad():
            logits = net(torch.tensor([one.ids.tolist()])).logits[0]
        expected = (logits[one.first - 1 : -1] / 2.0).log_softmax(-1)
        ids, logp, tail = known.of(number)
        assert tail is None  # k covers the vocabulary
        torch.testing.assert_close(logp, expected.gather(-1, ids.long()), rtol=1e-4, atol=1e-5)


def test_full_predictions_stay_in_memory(models: Path, cache: Path) -> None:
    plan = plan_of(models, {"top_k": "full", "max_length": 24, "examples": 4})
    decided = plan_training(plan, "cpu")
    teacher = teacher_of(plan.sources[plan.operands[0]], "cpu", "float32")
    known = teacher.predictions(decided.datasets[0].train, decided.kept, lambda *_: None)
    ids, logp, tail = known.of(0)
    assert ids.shape[1] == 260
    assert tail is None
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(len(logp)))
    assert not list(cache.rglob("teachers/**/*.safetensors"))


def test_a_cache_that_cannot_be_written_is_an_error(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "file"))
    plan = make_plan(load_recipe(write_recipe(models, {"max_length": 24, "examples": 4})))
    decided = plan_training(plan, "cpu")
    teacher = teacher_of(plan.sources[plan.operands[0]], "cpu", "float32")
    with pytest.raises(ResourceError, match="MERGE_CLI_CACHE"):
        teacher.predictions(decided.datasets[0].train, decided.kept, lambda *_: None)


@pytest.mark.parametrize("size", [0, 100])
def test_a_broken_file_of_the_cache_is_made_again(models: Path, size: int) -> None:
    plan = make_plan(load_recipe(write_recipe(models)))
    decided = plan_training(plan, "cpu")
    kept, dataset = decided.kept, decided.datasets[0]
    teacher = teacher_of(plan.sources[plan.operands[0]], "cpu", decided.dtype)
    teacher.predictions(dataset.train, kept, lambda done, total: None)
    place = teacher.path(dataset.train[:32], kept)
    whole = place.read_bytes()
    place.write_bytes(whole[:size])
    assert teacher.missing(dataset.train, kept) == len(dataset.train[:32])
    teacher.predictions(dataset.train, kept, lambda done, total: None).of(0)
    assert place.read_bytes() == whole


def test_nothing_is_left_of_a_file_that_cannot_be_written(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(load_recipe(write_recipe(models)))
    decided = plan_training(plan, "cpu")
    teacher = teacher_of(plan.sources[plan.operands[0]], "cpu", decided.dtype)
    group = decided.datasets[0].train

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(ResourceError, match="cannot be written"):
        teacher.predictions(group, decided.kept, lambda done, total: None)
    assert not list(teacher.path(group[:32], decided.kept).parent.iterdir())


def test_predictions_do_not_depend_on_chunks(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 40, generator=torch.Generator().manual_seed(1))
    whole = teachers.kept_predictions(logits, 5, 2.0)
    sizes = []
    made = teachers.kept_predictions
    monkeypatch.setattr(teachers, "_CHUNK", 4)
    monkeypatch.setattr(
        teachers, "kept_predictions", lambda own, *how: sizes.append(len(own)) or made(own, *how)
    )
    found = teachers._in_chunks(logits, 5, 2.0)
    assert sizes == [4, 4, 3]
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_the_cache_tells_devices_apart(models: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(models)))
    decided = plan_training(plan, "cpu")
    source, group = plan.sources[plan.operands[0]], decided.datasets[0].train[:32]
    places = {
        teacher_of(source, device, decided.dtype).path(group, decided.kept)
        for device in ("cpu", "cuda:0", "cuda:1")
    }
    assert len(places) == 2


def test_rows_that_choose_do_not_judge(models: Path, tmp_path: Path) -> None:
    """Validation takes the first held-out rows, the test those after them: rows, not cuts."""
    tokenizer = tokenizer_of(tmp_path)
    rows = [{"text": f"{i} " + "word " * 30} for i in range(40)]
    write_rows(models / "a.jsonl", rows[:20])
    write_rows(models / "a.val.jsonl", rows[20:])
    path = write_recipe(models)
    document = yaml.safe_load(path.read_text())
    document["models"][0]["data"] = {"files": "a.jsonl", "held_out": "a.val.jsonl"}
    path.write_text(yaml.safe_dump(document))
    training = Training(max_length=16, held_out_tokens=100)
    (dataset, *_) = load_datasets(load_recipe(path), ["a", "b", "c"], tokenizer, training, 128)

    def numbers(examples: tuple[Example, ...]) -> set[int]:
        texts = [tokenizer.decode(list(example.ids)) for example in examples]
        return {int(found.group(1)) for text in texts if (found := re.match(r"\D*(\d+)", text))}

    assert len(dataset.held_out) > 1
    assert len(dataset.test) > 1
    assert numbers(dataset.held_out)
    assert numbers(dataset.test)
    assert not numbers(dataset.held_out) & numbers(dataset.test)
    assert not (numbers(dataset.held_out) | numbers(dataset.test)) & set(range(20))
    # Where validation takes every row, none is left to judge.
    everything = Training(max_length=16, held_out_tokens=None, held_out_examples=10_000)
    (dataset, *_) = load_datasets(load_recipe(path), ["a", "b", "c"], tokenizer, everything, 128)
    assert dataset.test == ()


def test_a_part_to_train_on_is_divided_by_what_rows_say(models: Path, tmp_path: Path) -> None:
    """As `auto` divides: whatever the seed, and however often a row stands somewhere."""
    tokenizer = tokenizer_of(tmp_path)
    rows = [{"text": f"{i} of many rows"} for i in range(200)]
    write_rows(models / "a.jsonl", [*rows, *rows[:50]])
    parts = {part: set[str]() for part in ("train", "validation", "test")}
    for number, row in enumerate(rows):
        parts[part_of(make_row(number + 1, row, models))].add(str(number))
    assert all(len(part) > 8 for part in parts.values())

    def datasets(seed: int, *, baselines: bool) -> Dataset:
        path = write_recipe(models, seed=seed)
        document = yaml.safe_load(path.read_text())
        document["models"][0]["data"] = {"files": "a.jsonl", "part": "train"}
        path.write_text(yaml.safe_dump(document))
        training = Training(held_out_examples=len(parts["validation"]), baselines=baselines)
        return load_datasets(load_recipe(path), ["a", "b", "c"], tokenizer, training, 128)[0]

    def numbers(examples: tuple[Example, ...]) -> set[str]:
        texts = [tokenizer.decode(list(example.ids)) for example in examples]
        return {found.group(1) for text in texts if (found := re.match(r"\D*(\d+)", text))}

    for seed in (0, 1):
        for baselines in (True, False):
            found = datasets(seed, baselines=baselines)
            assert numbers(found.train) == parts["train"]
            assert numbers(found.held_out) == parts["validation"]
            assert numbers(found.test) == (parts["test"] if baselines else set())
