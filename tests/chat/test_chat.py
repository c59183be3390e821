"""`merge-cli chat`: answers, conversations, files of prompts; as commands and below them."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from merge_cli.chat.answers import Sampling, answer
from merge_cli.chat.conversation import Conversation
from merge_cli.chat.models import LoadOptions, loaded, open_models
from merge_cli.chat.prompts import read_prompts
from merge_cli.cli.chat import chat
from merge_cli.console.chat import ChatScreen, stop_on_interrupt
from merge_cli.errors import MergeCliError, SourceError, UsageError
from merge_cli.evaluation.live import LiveModel
from tests.support.command import cli
from tests.support.paths import ROOT

FAMILY = ROOT / "merge_cli" / "demo" / "family"
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ m.content }}{{ ';' if m.role == 'assistant' }}{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('not that') }}{% endif %}"
)


@pytest.fixture(scope="module")
def german() -> Any:
    opened = open_models([str(FAMILY / "german")])
    with loaded(opened, LoadOptions()) as models:
        yield models[0]


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    """A model with a chat template, which writes what was said and nothing else."""
    folder = tmp_path / "talker"
    shutil.copytree(FAMILY / "german", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def conversation(live: LiveModel, label: str = "german") -> Conversation:
    return Conversation(
        label, live.tokenizer, context=live.max_length, entries=live.entries, template=False
    )


def ask(live: LiveModel, text: str, **sampling: Any) -> str:
    chosen = Sampling(**sampling)
    return answer(live, conversation(live).prompt(text, chosen)[0], chosen).text


def test_lines_from_a_pipe_are_answered_in_turn() -> None:
    done = cli("chat", FAMILY / "german", input="neun =\n\nzwanzig =\n/reset\n/quit\nzehn =\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["9", "20"]
    assert "each line stands by itself" in done.stderr
    assert "begins anew" in done.stderr


def test_two_models_answer_one_below_the_other() -> None:
    models = [FAMILY / "german", "--against", FAMILY / "french"]
    done = cli("chat", *models, input="neuf =\n//x\n/what\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith(f"{FAMILY / 'german'}>")
    assert second.startswith(f"{FAMILY / 'french'}>")
    assert second.split()[-1] == "9"
    assert "/reset forgets" in done.stderr


def test_the_same_seed_gives_the_same_answer(german: LiveModel) -> None:
    prompt = "the"  # of which it knows nothing: its predictions are flat
    warm = {"temperature": 3.0, "max_tokens": 30}
    texts = [ask(german, prompt, seed=seed, **warm) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert ask(german, prompt, seed=0) == ask(german, prompt, seed=1)  # nothing is drawn


def test_a_repeated_question_is_drawn_anew(german: LiveModel) -> None:
    sampling = Sampling(temperature=3.0, max_tokens=30)
    ids, _ = conversation(german).prompt("the", sampling)
    turns = [answer(german, ids, sampling, turn=turn).text for turn in (0, 1, 0)]
    assert turns[0] == turns[2] != turns[1]


def test_drawing_leaves_the_random_state_alone(german: LiveModel) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ask(german, "the", temperature=1.0, max_tokens=3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-38, 1e-45, 1e-320, 5e-324])
def test_temperatures_near_zero_are_greedy(german: LiveModel, temperature: float) -> None:
    for text in ("zehn =", "the"):
        assert ask(german, text, temperature=temperature) == ask(german, text)


def test_very_high_temperatures_are_all_alike(german: LiveModel) -> None:
    texts = {ask(german, "the", temperature=t, max_tokens=8) for t in (1e37, 1e38, 1e39, 1e308)}
    assert len(texts) == 1


def test_large_logits_at_a_low_temperature(german: LiveModel) -> None:
    """Their quotient overflows, their differences decide."""
    greedy, scale = ask(german, "zehn ="), german.net.model.norm.weight
    scale.data *= 2.0**110
    try:
        assert ask(german, "zehn =", temperature=1e-5) == greedy
    finally:
        scale.data /= 2.0**110


def test_top_p_near_zero_is_greedy(german: LiveModel) -> None:
    greedy = ask(german, "zehn =")
    assert ask(german, "zehn =", temperature=5.0, top_p=1e-6) == greedy


def test_an_answer_ends_by_the_model_by_length_or_on_request(german: LiveModel) -> None:
    ids, _ = conversation(german).prompt("neunhundertelf =", Sampling())
    whole = answer(german, ids, Sampling())
    assert (whole.text, whole.tokens, whole.ended) == (" 911", 5, "end")
    cut = answer(german, ids, Sampling(max_tokens=2))
    assert (cut.text, cut.tokens, cut.ended) == (" 9", 2, "length")
    pieces: list[str] = []
    stopped = answer(german, ids, Sampling(), on_text=pieces.append, is_stopped=lambda: True)
    assert (stopped.tokens, stopped.ended) == (1, "stopped")
    pieces = []
    answer(german, ids, Sampling(), on_text=pieces.append)
    assert "".join(pieces) == whole.text


def test_an_answer_is_greedy_generation_by_transformers(german: LiveModel) -> None:
    import torch

    for words in ("einundzwanzig =", "dreihundert =", "neunzig"):
        ids, _ = conversation(german).prompt(words, Sampling())
        with torch.inference_mode():
            theirs = german.net.generate(
                torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0
            )[0, len(ids) :]
        text = german.tokenizer.decode(theirs, skip_special_tokens=True)
        assert ask(german, words, max_tokens=20) == text


def test_a_template_writes_the_whole_conversation(german: LiveModel, talker: Path) -> None:
    (opened,) = open_models([str(talker)])
    talk = opened.conversation(template=True, system="S", live=german)
    sampling = Sampling(max_tokens=8)

    def text(question: str) -> str:
        ids, _ = talk.prompt(question, sampling)
        return str(german.tokenizer.decode(ids, skip_special_tokens=True))

    assert text("a") == "Sa"
    talk.add("a", "b")
    assert text("c") == "Sab;c"
    talk.reset()
    assert text("c") == "Sc"
    assert opened.conversation(template=False).has_history is False


def test_the_oldest_turns_make_room(german: LiveModel, talker: Path) -> None:
    (opened,) = open_models([str(talker)])
    talk = opened.conversation(template=True, live=german)
    sampling = Sampling(max_tokens=8)
    for letter in "abc":
        talk.add(letter * 40, letter)
    ids, dropped = talk.prompt("d" * 30, sampling)
    assert dropped == 1
    assert german.tokenizer.decode(ids[1:]) == "b" * 40 + "b;" + "c" * 40 + "c;" + "d" * 30
    assert talk.prompt("d", sampling)[1] == 0  # said once
    with pytest.raises(UsageError, match="has 131 tokens, and 120 fit"):
        talk.prompt("e" * 130, sampling)


def test_what_a_template_refuses_does_not_end_the_conversation(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("refuse\nneun =\n"))
    chat(str(talker))
    shown = capsys.readouterr()
    assert "not that" in shown.err
    assert shown.out.strip() == "9"


def test_a_file_of_prompts(
    tmp_path: Path, talker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "zwanzig ="},
        {"messages": [{"role": "user", "content": "neun"}, {"role": "user", "content": " ="}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    chat(str(talker), prompts=file, as_json=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [
        {"line": 1, **rows[0],
         "answers": {str(talker): {"text": " 20", "tokens": 4, "ended": "end"}}},
        {"line": 2, **rows[1],
         "answers": {str(talker): {"text": " 9", "tokens": 3, "ended": "end"}}},
    ]  # fmt: skip
    plain = tmp_path / "prompts.txt"
    plain.write_text("zwanzig =\n\nneun =\n", encoding="utf-8")
    chat(str(FAMILY / "german"), prompts=plain, against=str(FAMILY / "base"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(">")[0] for line in lines[::3]] == ["1", "3"]
    assert lines[1] == f"{FAMILY / 'german'}> 20"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2: needs 'prompt' or 'messages'"),
        ("p.jsonl", '{"prompt": 3}', "line 1: needs 'prompt', a text"),
        ("p.jsonl", '{"messages": []}', "line 1: 'messages' must be a list with at least one"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "message 1 needs 'content', a text"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "the assistant's"),
        ("p.txt", "\n \n", "has no prompts"),
    ],
)
def test_a_wrong_row_is_an_error_with_its_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError) as error:
        read_prompts(file)
    assert message in str(error.value)
    with pytest.raises(SourceError):
        read_prompts(tmp_path / "missing.txt")


def test_prompts_are_checked_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_cli.chat.models.load", None)
    model = FAMILY / "german"
    file = tmp_path / "prompts.jsonl"
    long = {"prompt": "x" * 300}
    messages = {"messages": [{"role": "user", "content": "a"}]}
    for row, words in ((long, "tokens, and"), (messages, "no chat template")):
        file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(row), encoding="utf-8")
        with pytest.raises(SourceError, match=f"line 2: .*{words}"):
            chat(str(model), prompts=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"as_json": True}, "--json needs --prompts"),
        ({"temperature": -1.0}, "--temperature must be 0 or more"),
        ({"temperature": math.nan}, "--temperature must be 0 or more"),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"max_tokens": 0}, "--max-tokens must be 1 or more"),
        ({"dtype": "int8"}, "--dtype must be"),
        ({"system": "Be brief."}, "needs a chat template"),
        ({"against": str(FAMILY / "german")}, "compared with itself"),
    ],
)
def test_wrong_flags(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chat(str(FAMILY / "german"), **options)


def test_escape_sequences_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\x1b[2Jneun =\n", encoding="utf-8")
    chat(str(FAMILY / "german"), prompts=file)
    shown = capsys.readouterr().out
    assert "[2Jneun" in shown
    assert "\x1b" not in shown


def test_the_first_interrupt_stops_the_answer_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as is_stopped:
        assert not is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_adapter_is_merged_before_it_talks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from merge_cli.adapters.extract import extract_lora

    adapter = extract_lora(
        FAMILY / "german", tmp_path / "adapter", base=FAMILY / "base", rank=64, embeddings=True
    )
    named = f"{FAMILY / 'base'}+{adapter.path}"
    monkeypatch.setattr("sys.stdin", io.StringIO("neunhundertelf =\n"))
    chat(named)
    assert capsys.readouterr().out.strip() == "911"
    with pytest.raises(MergeCliError):
        open_models([f"{FAMILY / 'base'}+{tmp_path / 'nothing'}"])


def test_a_wide_terminal_shows_answers_side_by_side(
    german: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("neun =\n"))
    out, err = io.StringIO(), io.StringIO()
    models = [(german, conversation(german, label=label)) for label in ("left", "right")]
    terminal = Console(file=out, force_terminal=True, width=80, color_system=None)
    ChatScreen(models, Sampling(), terminal, Console(file=err, width=80)).run()
    head, answers = out.getvalue().splitlines()[-2:]
    assert re.search(r"left +right", head)  # after the codes that take the live view away
    assert answers.split() == ["9", "9"]
