"""Every kind of task against a naive loop or another program, and what a user gets wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_cli
from merge_cli.errors import Interrupted, RecipeError, SourceError, UsageError
from merge_cli.evaluation.forward import windows
from merge_cli.evaluation.parse import read_eval
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.tasks.exact_match import ExactMatch
from merge_cli.evaluation.tasks.harness import Harness
from merge_cli.evaluation.tasks.kl import KL
from merge_cli.evaluation.tasks.loss import LossTask
from merge_cli.evaluation.tasks.multiple_choice import MultipleChoice
from merge_cli.evaluation.tasks.python import PythonTask
from tests.support.command import cli, failed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUESTIONS = [
    ("def add(a, b):\n    return a", ["+ b", "- b", "* b", "b"], 0),
    ("Question: Of 92 pens, 22 are broken. How many pens are not broken?\nAnswer:",
     ["70", "72", "114", "7"], 0),
    ("日本語の", ["文章です", "pens", "return", "x"], 1),
    ("The opposite of hot is ", ["cold", "warm", "a very long answer that nobody gives"], 0),
    ("import", ["numpy as np", "banana", "os"], 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load_naively(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return net, AutoTokenizer.from_pretrained(model)


def log_probabilities(net: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return net(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)


def test_a_long_row_counts_each_token_once_with_its_context() -> None:
    for size in (2, 5, 16, 17, 40, 41, 100):
        for first in (1, 3, size - 1):
            seen: list[int] = []
            for window in windows(0, list(range(size)), max(first, 1), length=16, stride=8):
                assert len(window.ids) <= 16
                assert window.first >= 1, "the first token of a window has nothing before it"
                seen += window.ids[window.first :]
                # What is before it in the row, as far as the window reaches.
                assert window.first >= min(window.ids[window.first], 8)
            assert seen == list(range(max(first, 1), size))


def test_loss_does_not_depend_on_batches(zoo: Path) -> None:
    data = zoo / "data" / "math.val.jsonl"
    task = LossTask(name="math", data=data, limit=30)
    whole = merge_cli.evaluate(zoo / "base", [task], cache=False)["math"]["loss"]
    small = merge_cli.evaluate(zoo / "base", [task], cache=False, batch_tokens=100)["math"]["loss"]
    assert small.parts == pytest.approx(whole.parts, rel=1e-5)
    assert small.weights == whole.weights


def test_a_text_longer_than_the_context_is_scored_in_strides(zoo: Path, tmp_path: Path) -> None:
    text = " ".join(str(i) for i in range(200))
    path = tmp_path / "long.txt"
    path.write_text(text)
    task = LossTask(name="long", data=path, stride=16)
    found = merge_cli.evaluate(zoo / "base", [task], max_length=64)["long"]["loss"]
    net, tokenizer = load_naively(zoo / "base")
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = start + tokenizer.encode(text, add_special_tokens=False)
    nats, first = 0.0, 1
    while first < len(ids):  # each token sees at least 48 before it
        end = min(len(ids), max(64, first + 16))
        begin = max(0, end - 64)
        rows = log_probabilities(net, ids[begin:end])
        nats -= sum(float(rows[i - begin - 1, ids[i]]) for i in range(first, end))
        first = end
    assert found.parts[0] == pytest.approx(nats, rel=1e-5)
    assert found.weights[0] == len(ids) - 1


def test_kl_is_the_naive_one(zoo: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [
        {"text": "def add(a, b):\n    return a + b\n"},
        {"prompt": "3 + 4 =", "completion": " 7. Answer: 7"},
    ])  # fmt: skip
    task = KL(name="kl", data=data, teacher=str(zoo / "math"))
    found = merge_cli.evaluate(zoo / "base", [task])["kl"]
    (net, tokenizer), (teacher, _) = load_naively(zoo / "base"), load_naively(zoo / "math")
    for row, example in zip(map(json.loads, data.read_text().splitlines()), found.examples,
                            strict=True):  # fmt: skip
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        before = start + tokenizer.encode(row.get("prompt", ""), add_special_tokens=False)
        text = row.get("completion") or row["text"]
        ids = before + tokenizer.encode(text, add_special_tokens=False)
        p, q = log_probabilities(teacher, ids), log_probabilities(net, ids)
        first = max(1, len(before))
        naive = sum(
            float((p[i].exp() * (p[i] - q[i])).sum()) for i in range(first - 1, len(ids) - 1)
        )
        assert example["kl"] == pytest.approx(naive, rel=1e-4)
        assert example["tokens"] == len(ids) - first
    assert found.value > 0
    same = merge_cli.evaluate(zoo / "math", [task])["kl"]
    assert same.value == pytest.approx(0, abs=1e-7)
    assert same["agreement"].value == 1


def test_kl_over_the_likeliest_tokens_and_the_rest(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the naive bins; the teacher runs once, for all models, and is not beside them."""
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    data = write_rows(tmp_path / "rows.jsonl", [
        {"text": "def add(a, b):\n    return a + b\n"},
        {"prompt": "3 + 4 =", "completion": " 7. Answer: 7"},
    ])  # fmt: skip
    task = KL(name="kl", data=data, teacher=str(zoo / "math"), top_k=5)
    found = merge_cli.evaluate(zoo / "base", [task], cache=False)["kl"]
    (net, tokenizer), (teacher, _) = load_naively(zoo / "base"), load_naively(zoo / "math")
    for row, example in zip(map(json.loads, data.read_text().splitlines()), found.examples,
                            strict=True):  # fmt: skip
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        before = start + tokenizer.encode(row.get("prompt", ""), add_special_tokens=False)
        text = row.get("completion") or row["text"]
        ids = before + tokenizer.encode(text, add_special_tokens=False)
        p, q = log_probabilities(teacher, ids), log_probabilities(net, ids)
        naive = 0.0
        for i in range(max(1, len(before)) - 1, len(ids) - 1):
            top = p[i].topk(5).indices
            naive += float((p[i][top].exp() * (p[i][top] - q[i][top])).sum())
            left = [1 - float(one[i][top].double().exp().sum()) for one in (p, q)]
            naive += left[0] * math.log(left[0] / left[1])
        assert example["kl"] == pytest.approx(naive, rel=1e-3)
    whole = merge_cli.evaluate(zoo / "base", [KL(name="kl", data=data, teacher=str(zoo / "math"))])
    assert 0 < found.value < whole["kl"].value
    assert found["agreement"].value == whole["kl"]["agreement"].value
    # Again, and for another model: the teacher's own passes are not paid a second time.
    again = merge_cli.evaluate(zoo / "base", [task], cache=False)["kl"]
    assert again.cost.tokens < found.cost.tokens
    assert again.value == found.value
    same = merge_cli.evaluate(zoo / "math", [task], cache=False)["kl"]
    assert same.value == pytest.approx(0, abs=1e-6)
    files = list((tmp_path / "cache" / "teachers").rglob("*.safetensors"))
    files[0].write_bytes(b"cut off")
    assert merge_cli.evaluate(zoo / "base", [task], cache=False)["kl"].value == found.value


def test_multiple_choice_is_the_harnesses(zoo: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"prompt": p, "choices": c, "answer": a} for p, c, a in QUESTIONS]
    data = write_rows(tmp_path / "questions.jsonl", rows)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "own.yaml").write_text(
        f"task: own_questions\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\n"
        "doc_to_target: answer\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    ours = MultipleChoice(name="ours", data=data)
    theirs = Harness(name="theirs", lm_eval="own_questions", include=tmp_path / "task")
    for model in ("base", "math"):
        found = merge_cli.evaluate(zoo / model, [ours, theirs])
        assert found["ours"]["accuracy"].parts == found["theirs"]["acc"].parts
        assert found["ours"]["accuracy_norm"].parts == found["theirs"]["acc_norm"].parts
        for a, b in zip(found["ours"].examples, found["theirs"].examples, strict=True):
            other = [float(pair[0]) for pair in b["responses"]]
            assert a["log_likelihoods"] == pytest.approx(other, rel=1e-4)
    assert {0.0, 1.0} == set(found["ours"]["accuracy"].parts), "all right or all wrong shows little"


def copy_of(model: Path, target: Path) -> Path:
    """A model's folder whose files may be changed."""
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def with_beginning(model: Path, target: Path) -> Path:
    """The same model with a tokenizer that writes a token before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(copy_of(model, target))
    (special,) = [t for t in tokenizer.get_vocab() if t == "<|endoftext|>"]
    number = tokenizer.convert_tokens_to_ids(special)
    tokenizer.bos_token = special
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{special} $A", special_tokens=[(special, number)]
    )
    tokenizer.save_pretrained(target)
    return target


def test_multiple_choice_with_a_token_before_every_text(zoo: Path, tmp_path: Path) -> None:
    """An empty prompt, and one that is longer than the context."""
    pytest.importorskip("lm_eval")
    model = with_beginning(zoo / "base", tmp_path / "model")
    rows: list[dict[str, Any]] = [
        {"prompt": "", "choices": ["The cat", "def add", "日本語"], "answer": 0},
        {"prompt": "one two three four five. " * 40, "choices": ["six", "a b c d"], "answer": 0},
    ]
    data = write_rows(tmp_path / "questions.jsonl", rows)
    task = MultipleChoice(name="ours", data=data, delimiter="")
    ours = merge_cli.evaluate(model, [task], max_length=64)["ours"]
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    net, tokenizer = load_naively(model)
    theirs = HFLM(pretrained=net, tokenizer=tokenizer, max_length=64, batch_size=1)
    for row, example in zip(rows, ours.examples, strict=True):
        asked = [
            Instance("loglikelihood", {}, (row["prompt"], choice), 0) for choice in row["choices"]
        ]
        expected = [float(found[0]) for found in theirs.loglikelihood(asked, disable_tqdm=True)]
        assert example["log_likelihoods"] == pytest.approx(expected, rel=1e-5)


def test_no_code_of_a_checkpoint_is_run(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(zoo / "base", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "of_its_own"
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SourceError, match="no code of a checkpoint is executed"):
        merge_cli.evaluate(model, zoo / "data" / "math.val.jsonl")
    assert not (tmp_path / "was-run").exists()


def test_weights_that_are_not_there_are_not_made_up(zoo: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copy_of(zoo / "base", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lack what the architecture needs.*layers\.3\.mlp"):
        merge_cli.evaluate(model, zoo / "data" / "math.val.jsonl")


def test_a_models_own_generation_settings_do_not_count(zoo: Path, tmp_path: Path) -> None:
    model = copy_of(zoo / "math", tmp_path / "model")
    own = {"repetition_penalty": 3.0, "do_sample": True, "num_beams": 3, "eos_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(own))
    data = zoo / "data" / "math.val.jsonl"
    task = ExactMatch(name="maths", data=data, limit=4, max_new_tokens=24)
    texts = [
        [example["text"] for example in merge_cli.evaluate(one, [task])["maths"].examples]
        for one in (zoo / "math", model)
    ]
    assert texts[0] == texts[1]


def test_exact_match_writes_what_generate_writes(zoo: Path, tmp_path: Path) -> None:
    lines = (zoo / "data" / "math.val.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    task = ExactMatch(name="maths", data=data, extract=r"Answer: (-?\d+)", take="last",
                      max_new_tokens=40)  # fmt: skip
    found = merge_cli.evaluate(zoo / "math", [task], batch_tokens=300)["maths"]
    net, tokenizer = load_naively(zoo / "math")
    for line, example in zip(lines, found.examples, strict=True):
        row = json.loads(line)
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = start + tokenizer.encode(row["prompt"], add_special_tokens=False)
        written: list[int] = []
        while len(written) < 40:
            token = int(log_probabilities(net, ids + written)[-1].argmax())
            written.append(token)
            if token == net.config.eos_token_id:
                break
        assert example["text"] == tokenizer.decode(written, skip_special_tokens=True)
        assert example["answer"] == row["completion"].rpartition("Answer: ")[2]
        assert example["correct"] == (example["found"] == example["answer"])


def test_what_an_answer_is() -> None:
    def answer(text: str, **options: Any) -> str | None:
        return ExactMatch(name="x", data=Path("x"), **options).answer(text)

    assert answer(" 42 \n") == "42"
    assert answer("1 then 2", extract=r"\d") == "1"
    assert answer("1 then 2", extract=r"\d", take="last") == "2"
    assert answer("Answer: 7", extract=r"Answer: (\d+)") == "7"
    assert answer("7\n\n8", stop=("\n\n",)) == "7"
    assert answer("nothing", extract=r"\d") is None
    assert answer("none", extract=r"(?:(\d+)|none)") is None
    with pytest.raises(ValueError, match="not a regular expression"):
        answer("x", extract="(")


@pytest.mark.parametrize("answer", [True, float("inf"), float("nan"), ["b"], {}])
def test_what_is_no_answer(answer: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "answer": answer}])
    with pytest.raises(SourceError, match="line 1: 'answer' must be a text or a number"):
        ExactMatch(name="a", data=data)._right(read_rows(data)[0])


@pytest.mark.parametrize("memory", [8_000_000, 2_000_000])  # less than the embedding takes
def test_a_model_larger_than_memory_is_read_layer_by_layer(zoo: Path, memory: int) -> None:
    pytest.importorskip("accelerate")
    task = LossTask(name="math", data=zoo / "data" / "math.val.jsonl", limit=5)
    whole = merge_cli.evaluate(zoo / "base", [task], cache=False)
    parts = merge_cli.evaluate(zoo / "base", [task], cache=False, memory=memory)
    assert "layer by layer" in parts.device
    assert parts["math"]["loss"].parts == pytest.approx(whole["math"]["loss"].parts, rel=1e-6)


def test_results_are_remembered_by_content(zoo: Path, tmp_path: Path, own_cache: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"text": "some text to read"}])
    first = merge_cli.evaluate(zoo / "base", data)
    copy = tmp_path / "b.jsonl"
    copy.write_bytes(data.read_bytes())
    again = merge_cli.evaluate(zoo / "base", copy)
    assert not first["a"].cached
    assert again["b"].cached, "the same data under another name is the same task"
    assert again["b"].value == first["a"].value
    assert not merge_cli.evaluate(zoo / "math", copy)["b"].cached
    assert not merge_cli.evaluate(zoo / "base", copy, max_length=16)["b"].cached
    write_rows(copy, [{"text": "another text to read"}])
    assert not merge_cli.evaluate(zoo / "base", copy)["b"].cached
    for broken in own_cache.glob("evaluations/*/*.json"):
        broken.write_text("{")
    assert not merge_cli.evaluate(zoo / "base", data)["a"].cached


def test_samples_are_seeded(zoo: Path) -> None:
    task = LossTask(name="math", data=zoo / "data" / "math.val.jsonl", limit=3)

    def lines(seed: int) -> list[int]:
        found = merge_cli.evaluate(zoo / "base", [task], seed=seed)
        return [example["line"] for example in found["math"].examples]

    assert lines(1) == lines(1)
    assert lines(1) != lines(2)


EVAL = """\
tasks:
  - {task: loss, data: math.jsonl}
  - {task: multiple_choise, data: math.jsonl}
  - {task: loss, data: nowhere.jsonl, strid: 4}
  - {task: exact_match, data: math.jsonl, max_new_tokens: 0, take: middle}
  - {task: kl, data: math.jsonl}
  - {task: [loss], data: math.jsonl}
sed: 1
limit: none
"""


def test_every_mistake_in_an_evaluation_file_is_told_with_its_place(tmp_path: Path) -> None:
    write_rows(tmp_path / "math.jsonl", [{"text": "x"}])
    path = tmp_path / "eval.yaml"
    path.write_text(EVAL)
    with pytest.raises(RecipeError) as caught:
        read_eval(path)
    text = str(caught.value)
    for expected in (
        "eval.yaml:3:12: tasks[1].task: unknown task 'multiple_choise'. "
        "Did you mean 'multiple_choice'?",
        "eval.yaml:4:39: tasks[2].strid: unknown key. Did you mean 'stride'?",
        "no such file",
        "tasks[3].max_new_tokens: must be at least 1 (got 0)",
        "tasks[3].take: must be first or last (got 'middle')",
        "tasks[4].teacher: missing",
        "eval.yaml:8:1: sed: unknown key. Did you mean 'seed'?",
        "limit: must be a whole number",
        "tasks[5].task: unknown task ['loss']",
    ):
        assert expected in text, text


def test_a_wrong_expression_is_told_with_its_place(tmp_path: Path) -> None:
    write_rows(tmp_path / "math.jsonl", [{"text": "x"}])
    path = tmp_path / "eval.yaml"
    path.write_text("tasks:\n  - {task: exact_match, data: math.jsonl, extract: '('}\n")
    expected = r"eval.yaml:2:52: tasks\[0\].extract: is not a regular expression"
    with pytest.raises(RecipeError, match=expected):
        read_eval(path)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("task: exact_match, data: a.jsonl, stop: ''", "1:50: tasks[0].stop: must not be empty"),
        ("task: exact_match, data: a.jsonl, stop: [b, '']", "tasks[0].stop: must not be empty"),
        ("task: loss, data: a.jsonl, name: ''", "1:43: tasks[0].name: must be a line of text"),
        ("task: loss, data: a.jsonl, name: \"a\\nb\"", "tasks[0].name: must be a line of text"),
        ("task: kl, data: a.jsonl, teacher: ' '", "tasks[0].teacher: must be a line of text"),
        ("lm_eval: ''", "1:19: tasks[0].lm_eval: must be a line of text"),
        ("task: exact_match, data: a.jsonl, fewshot: b", "1:53: tasks[0].fewshot: no such file"),
        ("task: exact_match, data: a.jsonl, system: b", "1:52: tasks[0].system: is a message of"),
        ("task: exact_match, data: a.jsonl, num_fewshot: 2", "1:57: tasks[0].num_fewshot: needs"),
        ("task: loss, data: null", "1:9: tasks[0].data: missing"),
        ("task: loss, data: a.jsonl}], dtype: [a], other: [{", "(got ['a'])"),
    ],
)  # fmt: skip
def test_mistakes_in_values_are_told_where_they_are(
    tmp_path: Path, entry: str, expected: str
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    path = tmp_path / "eval.yaml"
    path.write_text(f"{{tasks: [{{{entry}}}]}}" if "dtype" in entry else f"tasks: [{{{entry}}}]\n")
    with pytest.raises(RecipeError) as caught:
        read_eval(path)
    assert expected in str(caught.value), str(caught.value)


def test_a_key_without_a_value_is_absent_in_an_evaluation_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    path = tmp_path / "eval.yaml"
    path.write_text(
        "tasks: [{task: exact_match, data: a.jsonl, name: null, stop: null, truncate: ~}]\n"
        "dtype:\nseed: null\n"
    )
    assert read_eval(path) == replace(EvalSpec((ExactMatch(name="a", data=tmp_path / "a.jsonl"),)),
                                      file=str(path))  # fmt: skip


def test_an_unknown_dtype_is_refused(zoo: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'bfloat16'"):
        merge_cli.evaluate(zoo / "base", zoo / "data" / "math.val.jsonl", dtype="bfloat61")


def test_rows_without_a_token_to_predict_stay(zoo: Path, tmp_path: Path) -> None:
    """So that two models' examples are the same ones, whatever their tokenizers do."""
    data = write_rows(tmp_path / "a.jsonl", [{"text": "some text"}, {"text": "A"}])
    found = merge_cli.evaluate(zoo / "base", data)["a"]
    assert len(found.examples) == len(found["loss"].parts) == 2
    perplexity = found["perplexity"].value
    assert perplexity == pytest.approx(math.exp(found["loss"].value))


def test_an_evaluation_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "math.test.jsonl", [{"text": "x"}])
    path = tmp_path / "eval.yaml"
    path.write_text(
        "tasks:\n  - {task: loss, data: math.test.jsonl}\n"
        "  - {task: loss, name: again, data: math.test.jsonl, expert: maths, limit: 2}\n"
        "seed: 3\nlimit: 5\ndtype: bfloat16\n"
    )
    spec = read_eval(path)
    assert isinstance(spec, EvalSpec)
    assert [task.name for task in spec.tasks] == ["math", "again"]
    assert [task.limit for task in spec.tasks] == [5, 2]
    assert spec.tasks[1].expert == "maths"
    assert (spec.seed, spec.dtype) == (3, "bfloat16")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "at least two"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "not one of the 2 choices"),
        ({"prompt": 3, "choices": ["a", "b"], "answer": 1}, "needs 'prompt', a text"),
    ],
)
def test_wrong_questions_are_named(
    zoo: Path, tmp_path: Path, row: dict[str, Any], what: str
) -> None:
    good = {"prompt": "x", "choices": ["a", "b"], "answer": "b"}
    data = write_rows(tmp_path / "q.jsonl", [good, row])
    with pytest.raises(SourceError, match=what) as caught:
        merge_cli.evaluate(zoo / "base", [MultipleChoice(name="q", data=data)])
    assert "line 2" in str(caught.value)


def test_loss_per_byte_compares_vocabularies(zoo: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "ja.jsonl", [{"text": "日本語の文章です。"}])
    found = merge_cli.evaluate(zoo / "base", data)["ja"]
    bits = found["bits_per_byte"]
    assert sum(bits.weights) == len("日本語の文章です。".encode())
    assert bits.value == pytest.approx(sum(found["loss"].parts) / math.log(2) / sum(bits.weights))


TASK = """
import sys
from fractions import Fraction
import numpy as np
import torch

class Own(BaseException):
    pass

def score(net, tokenizer):
    {line}
"""


def own_task(folder: Path, line: str) -> EvalSpec:
    (folder / "task.py").write_text(TASK.format(line=line))
    return EvalSpec((PythonTask(name="mine", python="task.py:score", folder=folder),))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sys.exit(0)", "raised SystemExit: 0"),
        ("sys.exit()", "raised SystemExit"),
        ("sys.exit(3)", "raised SystemExit: 3"),
        ("raise Own", "raised Own"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        ("return True", r"must return a number.*got bool"),
        ("return np.bool_(True)", r"must return a number.*got bool"),
        ("return [1.0, None]", "got a list with NoneType"),
        ("return []", "got an empty list"),
        ("return '1'", "got str"),
        ("return 1j", "got complex"),
        ("return torch.tensor(1.0)", "got Tensor"),
        ("return float('nan')", "returned nan"),
        ("return [1, np.float32('nan')]", "returned nan"),
        ("return -float('inf')", "returned -inf"),
        ("return 10**6000", "returned inf"),
    ],
)
def test_functions_that_give_no_score(zoo: Path, tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(SourceError, match=words) as error:
        merge_cli.evaluate(zoo / "base", own_task(tmp_path, line))
    assert error.value.file == "task.py:score"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("return np.float32(0.5)", 0.5),
        ("return np.float16(0.5)", 0.5),
        ("return [np.int64(2), 3, 0.4]", 1.8),
        ("return Fraction(1, 4)", 0.25),
        ("return tuple(np.ones(3))", 1.0),
    ],
)
def test_numbers_of_every_kind(zoo: Path, tmp_path: Path, line: str, value: float) -> None:
    result = merge_cli.evaluate(zoo / "base", own_task(tmp_path, line))
    assert result["mine"].value == pytest.approx(value)


def test_ctrl_c_in_a_function_stays_what_it_is(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        merge_cli.evaluate(zoo / "base", own_task(tmp_path, "raise KeyboardInterrupt"))


def test_a_file_that_ends_the_program_when_it_is_imported(zoo: Path, tmp_path: Path) -> None:
    spec = own_task(tmp_path, "return 1.0")
    (tmp_path / "task.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(SourceError, match="cannot be imported: SystemExit: 0"):
        merge_cli.evaluate(zoo / "base", spec)


def test_no_gate_passes_where_a_task_ends_the_program(zoo: Path, tmp_path: Path) -> None:
    own_task(tmp_path, "sys.exit(0)")
    (tmp_path / "eval.yaml").write_text("tasks: [{python: 'task.py:score', name: mine}]\n")
    words = ["--eval", tmp_path / "eval.yaml", "--gate", "mine.score>=100"]
    failed(cli("evaluate", zoo / "base", *words), 3, "raised SystemExit: 0")
