"""The zoo: its generators and splits, and the committed family of models and texts."""

import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

ZOO = ROOT / "zoo"
MODELS = ("base", "japanese", "math", "code", "german")
DOMAINS = ("english", "japanese", "german", "code", "math")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of scripts/zoo, which is a folder of scripts and not a package."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "zoo"))
    loaded = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - loaded:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if "scripts/zoo" in Path(path).as_posix():
            del sys.modules[name]


def rows(domain: str, split: str) -> list[dict[str, str]]:
    text = (ZOO / "data" / f"{domain}.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_equation_and_answer_is_right(script: Any, split: str) -> None:
    arithmetic = script("arithmetic")
    for problem in itertools.islice(arithmetic.problems(split), 500):
        *worked, answer = re.split(r"\n", problem.completion)
        equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", "".join(worked))
        assert equations
        for left, operation, right, result in equations:
            expected = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
            }[operation]
            assert int(result) == expected
        assert answer == f"Answer: {equations[-1][3]}" == f"Answer: {problem.answer}"
        # Every operand of the answer stands in the question, unless a step made it.
        made = {step.result for step in problem.steps}
        asked = {int(number) for number in re.findall(r"\d+", problem.prompt)}
        assert all({step.left, step.right} <= asked | made for step in problem.steps)


def test_operand_pairs_and_their_twins_stay_on_one_side(script: Any) -> None:
    arithmetic = script("arithmetic")
    pairs = {
        split: {
            pair
            for problem in itertools.islice(arithmetic.problems(split), 1000)
            for step in problem.steps
            for pair in ((step.left, step.right), (step.right, step.left))
        }
        for split in ("train", "val", "test")
    }
    for one, other in itertools.combinations(pairs.values(), 2):
        assert not one & other
    assert arithmetic.side((3, 17)) == arithmetic.side((17, 3))


def test_problems_are_distinct_and_seeded(script: Any) -> None:
    arithmetic = script("arithmetic")
    first = list(itertools.islice(arithmetic.problems("val"), 200))
    assert first == list(itertools.islice(arithmetic.problems("val"), 200))
    assert len({problem.prompt for problem in first}) == 200
    assert first != list(itertools.islice(arithmetic.problems("val", seed=1), 200))


def test_document_split_is_a_seeded_partition(script: Any) -> None:
    corpora = script("corpora")
    names = [f"help/page{number}.html" for number in range(5000)]
    sides = [corpora.split_of(name) for name in names]
    assert sides == [corpora.split_of(name) for name in names]
    assert sides != [corpora.split_of(name, seed=1) for name in names]
    shares = {split: sides.count(split) / len(sides) for split in corpora.SPLITS}
    assert shares["test"] == pytest.approx(0.10, abs=0.02)
    assert shares["val"] == pytest.approx(0.06, abs=0.02)


def test_translations_share_a_side(script: Any) -> None:
    corpora = script("corpora")
    names = {
        corpora.document_name(
            next(source for source in corpora.SOURCES if source.package == package),
            Path(f"usr/share/libreoffice/help/{language}/text/shared/guide/autohide.html"),
        )
        for package, language in (
            ("libreoffice-help-en-us", "en-US"),
            ("libreoffice-help-ja", "ja"),
            ("libreoffice-help-de", "de"),
        )
    }
    assert names == {"help/shared/guide/autohide.html"}


def test_passages_hold_whole_paragraphs(script: Any) -> None:
    corpora = script("corpora")
    paragraphs = [f"{number} " + "x" * 150 for number in range(9)] + ["y" * 2000, "z" * 400]
    found = list(corpora.passages(paragraphs, 500))
    assert all(corpora.SHORTEST <= len(passage) <= 500 for passage in found)
    lines = [line for passage in found for line in passage.split("\n")]
    assert set(lines) <= set(paragraphs)
    assert lines == [line for line in paragraphs if line in lines]
    assert "y" * 2000 not in lines
    assert "z" * 400 in lines


def test_prose_of_a_page_and_of_a_manual(script: Any) -> None:
    markup = script("markup")
    page = (
        "<head><title>t</title></head><h1>Title</h1><nav><p>menu</p></nav><p>One <b>two</b>"
        "<br>three.<table><tr><td><p>cell</p></td></tr></table><p>Four &amp; five.</p>"
    )
    assert markup.html_paragraphs(page) == ["Title", "One two three.", "Four & five."]
    manual = ".TH X 1\n.SH NAME\nx \\- do \\fBthis\\fP\n.TS\na b\n.TE\n.BR read (2)\n"
    assert markup.roff_paragraphs(manual) == ["NAME", "x - do this", "read(2)"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_committed_texts_do_not_overlap(domain: str) -> None:
    contents = {
        split: ["".join(row.values()) for row in rows(domain, split)]
        for split in ("train", "val", "test")
    }
    for split, texts in contents.items():
        assert texts, split
        assert len(set(texts)) == len(texts)
    for one, other in itertools.combinations(contents.values(), 2):
        assert not set(one) & set(other)
    if domain != "math":
        # Long paragraphs are served to one split only, so they do not recur either.
        cut = "\n\n" if domain == "code" else "\n"
        train = {line for text in contents["train"] for line in text.split(cut) if len(line) > 80}
        for split in ("val", "test"):
            held_out = {line for text in contents[split] for line in text.split(cut)}
            assert not train & held_out
            assert all(300 <= len(text) <= 2000 for text in contents[split])


@pytest.mark.parametrize("name", MODELS)
def test_model_loads_without_missing_or_unexpected_weights(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        ZOO / name, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(ZOO / name)
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.decode(tokenizer.encode("日本語 äöü 12")) == "日本語 äöü 12"
    assert len(tokenizer.tokenize("2024")) == 4


def test_experts_beat_the_base_on_their_domain() -> None:
    scores = json.loads((ZOO / "scores.json").read_text())["models"]
    for name in ("japanese", "math", "code", "german"):
        own = scores[name][name]["nats_per_token"]
        assert own < scores["base"][name]["nats_per_token"] - 0.02
    assert scores["math"]["math_exact_match"] > scores["base"]["math_exact_match"]
