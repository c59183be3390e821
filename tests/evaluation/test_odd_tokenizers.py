"""Tasks on models whose tokenizers put things before, into and behind a text; broken models."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.gates import check_gates, read_gates
from merge_cli.evaluation.result import Evaluation, Metric, TaskResult
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.tasks.exact_match import ExactMatch
from merge_cli.evaluation.tasks.harness import Harness
from merge_cli.evaluation.tasks.kl import KL
from merge_cli.evaluation.tasks.loss import LossTask
from merge_cli.evaluation.tasks.multiple_choice import MultipleChoice
from tests.support.dam_tiny import config, write_models
from tests.support.tokenizer_kinds import KINDS, VOCABULARY, byte_level, metaspace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROWS = [
    {"prompt": "Answer:", "completion": " 42"}, {"prompt": "The cat ", "completion": "sat on"},
    {"prompt": "one tw", "completion": "o three"}, {"text": "<s>The cat sat"}, {"text": "日本語"},
]  # fmt: skip
QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "The cat", "choices": ["sat on", "mat", "three"], "answer": 0},
    {"prompt": "Answer: ", "choices": ["42", "one"], "answer": 1},
    {"prompt": "<s>one two", "choices": ["three", "four"], "answer": 0},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


def model_of(folder: Path, tokenizer: Any, entries: int = VOCABULARY) -> Path:
    """A tiny model that reads what this tokenizer writes."""
    place, other = write_models(
        folder, config("llama", vocab_size=entries, max_position_embeddings=256,
                       bos_token_id=1, eos_token_id=2), names=("base", "other"), change=0.5,
    )  # fmt: skip
    for one in (place, other):
        for file in one.glob("tokenizer*"):
            file.unlink()
        tokenizer.save_pretrained(one)
    return place


def rows_of(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def poisoned(model: Path, value: float = float("nan")) -> Path:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return model


def nats(net: Any, ids: Sequence[int], first: int) -> float:
    with torch.inference_mode():
        logp = net(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return -sum(float(logp[i - 1, ids[i]]) for i in range(first, len(ids)))


def loaded(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return net, AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "slow" not in kind])
def test_loss_is_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, KINDS[kind]())
    found = merge_cli.evaluate(model, rows_of(tmp_path / "rows.jsonl", ROWS), cache=False)["rows"]
    net, tokenizer = loaded(model)
    for row, part, weight in zip(ROWS, found["loss"].parts, found["loss"].weights, strict=True):
        prompt, text = row.get("prompt", ""), row.get("completion") or row["text"]
        with_all = tokenizer(prompt + text, return_offsets_mapping=True, add_special_tokens=False)
        ids, ends = with_all["input_ids"], [end for _, end in with_all["offset_mapping"]]
        full = tokenizer.encode("x")
        start = full[: full.index(tokenizer.encode("x", add_special_tokens=False)[0])]
        start = start or ([1] if tokenizer.bos_token_id is not None else [])
        start = [] if ids[: len(start)] == start else start
        own = next((i for i, end in enumerate(ends) if end > len(prompt)), 0) if prompt else 0
        first = max(1, len(start) + own)
        assert part == pytest.approx(nats(net, [*start, *ids], first), rel=1e-5)
        assert weight == len(start) + len(ids) - first


@pytest.mark.parametrize(
    "kind", ["metaspace, always, EOS (T5)", "metaspace, first, both", "bytes, EOS"]
)  # fmt: skip
def test_choices_are_scored_without_what_stands_behind_a_text(kind: str, tmp_path: Path) -> None:
    """The harness is right where nothing does; ours are those numbers with and without it."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    model = model_of(tmp_path, KINDS[kind]())
    task = MultipleChoice(name="q", data=rows_of(tmp_path / "q.jsonl", QUESTIONS))
    ours = merge_cli.evaluate(model, [task], cache=False)["q"]
    net, tokenizer = loaded(model)
    before = "<s> " if tokenizer.encode("x")[0] == 1 else ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before}$A", special_tokens=[("<s>", 1)]
    )
    theirs = HFLM(pretrained=net, tokenizer=tokenizer, max_length=256, batch_size=1)
    for row, example in zip(QUESTIONS, ours.examples, strict=True):
        asked = [Instance("loglikelihood", {}, (row["prompt"], f" {choice}"), 0)
                 for choice in row["choices"]]  # fmt: skip
        expected = [float(one[0]) for one in theirs.loglikelihood(asked, disable_tqdm=True)]
        assert example["log_likelihoods"] == pytest.approx(expected, rel=1e-5)


def test_a_prompt_is_cut_where_the_task_says_and_it_is_told(tmp_path: Path) -> None:
    model = model_of(tmp_path, byte_level("bos"))
    long = " ".join(["The cat sat on the mat."] * 8)
    data = rows_of(tmp_path / "q.jsonl", [{"prompt": long, "answer": "x"},
                                          {"prompt": "one", "answer": "y"}])  # fmt: skip
    net, tokenizer = loaded(model)
    ids = tokenizer.encode(long)
    room = 32 - 8
    assert len(ids) > room
    for how, kept in (("left", ids[-room:]), ("right", ids[:room])):
        task = ExactMatch(name="q", data=data, max_new_tokens=8, truncate=how)  # type: ignore[arg-type]
        found = merge_cli.evaluate(model, [task], max_length=32)["q"]
        written = list(kept)
        for _ in range(8):
            with torch.inference_mode():
                written.append(int(net(torch.tensor([written])).logits[0, -1].argmax()))
            if written[-1] == 2:
                break
        text = tokenizer.decode(written[room:], skip_special_tokens=True)
        assert found.examples[0]["text"] == text
        (note,) = found.notes
        assert note.startswith("1 of 2 prompts are longer than 24 tokens")
        again = merge_cli.evaluate(model, [task], max_length=32)["q"]
        assert (again.cached, again.notes) == (True, found.notes)
    kinds: list[tuple[Any, dict[str, int]]] = [
        (ExactMatch, {"max_new_tokens": 8}),
        (MultipleChoice, {}),
    ]
    for kind, more in kinds:
        rows = [{"prompt": "x", "choices": ["a", "b"], "answer": 0},
                {"prompt": long, "choices": ["a", "b"], "answer": 0}]  # fmt: skip
        refusing = kind(name="q", data=rows_of(data, rows), truncate="refuse", **more)
        with pytest.raises(SourceError, match=r"line 2: has \d+ tokens, and there is room for"):
            merge_cli.evaluate(model, [refusing], max_length=32)
    (note,) = merge_cli.evaluate(
        model, [MultipleChoice(name="q", data=data)], max_length=32
    )["q"].notes  # fmt: skip
    assert note.startswith("2 of 4 prompts with a choice are longer than 32 tokens")


def test_questions_as_a_conversation(tmp_path: Path) -> None:
    """Template, system message and shown rows; BOS stands once, because the template writes it."""
    tokenizer = metaspace("always", "both")
    tokenizer.chat_template = TEMPLATE
    model = model_of(tmp_path, tokenizer)
    shown = rows_of(tmp_path / "shown.jsonl", [{"prompt": "one", "completion": " two"},
                                               {"prompt": "three", "answer": 4}])  # fmt: skip
    data = rows_of(tmp_path / "q.jsonl", [{"prompt": "The cat", "answer": "sat"}])
    asked: list[list[int]] = []

    class Seen(ExactMatch):
        def _generate(self, prompts: Any, live: Any, tell: Any) -> list[str]:
            asked.append(list(prompts[0]))
            return super()._generate(prompts, live, tell)

    def text_of(**more: Any) -> str:
        task = Seen(name="q", data=data, max_new_tokens=4, **more)
        merge_cli.evaluate(model, [task], cache=False)
        assert asked[-1].count(1) == 1
        return str(asked[-1])

    def ids(text: str) -> str:
        return str(tokenizer.encode(text, add_special_tokens=False))

    assert text_of(chat_template=True) == ids("<s>[user]The cat[assistant]")
    assert text_of(chat_template=True, system="hi", fewshot=shown) == ids(
        "<s>[system]hi[user]one[assistant] two[user]three[assistant]4[user]The cat[assistant]"
    )
    assert text_of(fewshot=shown) == ids("<s>one two\n\nthree 4\n\nThe cat")
    assert text_of(fewshot=shown, num_fewshot=1) == ids("<s>one two\n\nThe cat")
    leak = rows_of(tmp_path / "leak.jsonl", [{"prompt": "The cat", "completion": " sat"}])
    with pytest.raises(SourceError, match="line 1: is among the rows that `fewshot` shows"):
        text_of(fewshot=leak)
    with pytest.raises(ValueError, match="needs chat_template"):
        ExactMatch(name="q", data=data, system="hi")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(SourceError, match="its tokenizer has no chat template"):
        text_of(chat_template=True)


def test_the_harness_asks_with_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    # Reading the harness's thousands of tasks, three times, for one of our own.
    alone = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", alone)
    tokenizer = metaspace("always", "both")
    tokenizer.chat_template = TEMPLATE
    model = model_of(tmp_path, tokenizer)
    data = rows_of(tmp_path / "q.jsonl", [{"prompt": "The cat", "choices": ["sat", "mat"],
                                           "answer": 0}])  # fmt: skip
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "own.yaml").write_text(
        f"task: own_questions\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    own: dict[str, Any] = {"name": "h", "lm_eval": "own_questions", "include": tmp_path / "task"}
    found = merge_cli.evaluate(model, [Harness(**own, chat_template=True, system="hi")])["h"]
    net, tokenizer = loaded(model)
    context = tokenizer.encode("<s>[system]hi[user]The cat[assistant]", add_special_tokens=False)
    for choice, pair in zip(("sat", "mat"), found.examples[0]["responses"], strict=True):
        ids = tokenizer.encode(f"<s>[system]hi[user]The cat[assistant]{choice}",
                               add_special_tokens=False)  # fmt: skip
        assert float(pair[0]) == pytest.approx(-nats(net, ids, len(context)), rel=1e-4)
    cut = merge_cli.evaluate(model, [Harness(**own)], max_length=2)["h"]
    assert "requests are longer than 2 tokens" in cut.notes[0]
    with pytest.raises(NonFiniteError, match="predicts NaN or Inf"):
        merge_cli.evaluate(poisoned(model), [Harness(**own)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_predicts_no_numbers_has_no_score(value: float, tmp_path: Path) -> None:
    model = model_of(tmp_path, byte_level("bos"))
    questions = rows_of(tmp_path / "q.jsonl", [
        {**row, "completion": " x", "answer": 0} for row in QUESTIONS
    ])  # fmt: skip
    other = str(tmp_path / "other")
    (tmp_path / "task.py").write_text(
        "import torch\ndef score(net, tokenizer):\n"
        "    return float(net(torch.tensor([[1, 2]])).logits.argmax())\n"
    )
    from merge_cli.evaluation.tasks.python import PythonTask

    tasks = [
        LossTask(name="a", data=questions), MultipleChoice(name="b", data=questions),
        ExactMatch(name="c", data=questions, max_new_tokens=4),
        KL(name="d", data=questions, teacher=other),
        KL(name="e", data=questions, teacher=other, top_k=3),
        PythonTask(name="f", python="task.py:score", folder=tmp_path),
    ]  # fmt: skip
    whole = merge_cli.evaluate(model, tasks, cache=False)
    assert all(task.value == task.value for task in whole.tasks.values())
    poisoned(model, value)
    for task in tasks:
        with pytest.raises(NonFiniteError, match="predicts NaN or Inf") as caught:
            merge_cli.evaluate(model, [task], cache=False)
        assert caught.value.model == str(model)
    for top_k in (None, 3):  # the teacher is the broken one, and named
        task = KL(name="d", data=questions, teacher=str(model), top_k=top_k)
        with pytest.raises(NonFiniteError) as caught:
            merge_cli.evaluate(other, [task], cache=False)
        assert caught.value.model == str(model)


def test_no_gate_is_met_by_what_is_no_number() -> None:
    def evaluation(value: float, better: Any) -> Evaluation:
        metric = Metric("m", "unit", better, [value, value], [1.0, 1.0])
        return Evaluation("x", "", "", "", {"t": TaskResult("t", "loss", {"m": metric}, [])})

    task = LossTask(name="t", data=Path("x"))
    for better in ("lower", "higher"):
        bad, good = evaluation(float("nan"), better), evaluation(1.0, better)
        for text in ("t<=2", "t>=0", "t<2", "t>0"):
            assert check_gates(read_gates([text], [], [task]), bad, {}), text
        assert check_gates(read_gates([], ["base:t"], [task]), bad, {"base": good})
        assert check_gates(read_gates([], ["base:t"], [task]), good, {"base": bad})
    huge = Metric("perplexity", "per token", "lower", [800.0], [1.0], power=True)
    assert huge.value == float("inf")
    assert huge.worse(1e300)


def test_a_token_beyond_the_embeddings_is_named_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level("bos")
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    model = model_of(tmp_path, tokenizer, size)
    fine = rows_of(tmp_path / "fine.jsonl", [{"prompt": "The", "completion": " cat", "answer": 1}])
    assert merge_cli.evaluate(model, fine).tasks, "a token that no row has is nobody's business"
    bad = rows_of(tmp_path / "bad.jsonl", [
        {"prompt": "The", "completion": " cat"},
        {"prompt": "a <new>", "completion": " one", "choices": ["a", "b"], "answer": 0},
    ])  # fmt: skip
    from merge_cli.evaluation.live import LiveModel

    def no_pass(*_: Any) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(LiveModel, "logits", no_pass)
    only = rows_of(tmp_path / "only.jsonl", [{"prompt": "a <new>", "choices": ["a", "b"],
                                              "answer": 0}])  # fmt: skip
    for task in (LossTask(name="x", data=bad), ExactMatch(name="x", data=only, max_new_tokens=4),
                 MultipleChoice(name="x", data=only),
                 KL(name="x", data=bad, teacher=str(tmp_path / "other"))):  # fmt: skip
        spec = EvalSpec((LossTask(name="first", data=fine), task), cache=False)
        with pytest.raises(
            SourceError, match=f"line [12]: its token '<new>' has the number {size}"
        ):
            merge_cli.evaluate(model, spec)
