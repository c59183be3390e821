"""Scores every model of the family on every domain's test set and writes the tables.

Text: every token of a row is predicted after one leading `<|endoftext|>`; rows longer than the
models' positions are scored window by window. Arithmetic: only the completion counts. Bits per
byte count the bytes of what is predicted. Weights are the exported bfloat16 ones, computed with
in float32. Merges of the experts are scored too, as floors for merging methods.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bpe import END, POSITIONS
from corpora import read_rows
from export import DOMAINS, MODELS
from torch.nn import functional
from train import BASE, EXPERTS, encode_row
from transformers import AutoTokenizer, LlamaForCausalLM

MERGED = ("japanese", "math", "code")
EXACT_PROMPTS = 100
Weights = dict[str, torch.Tensor]


def load(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def windows(tokenizer: Any, row: dict[str, str]) -> Iterator[tuple[list[int], int]]:
    """(token ids with a leading end token, how many of them are not scored)."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids, prompt = encode_row(tokenizer, row)
    room = POSITIONS - 1
    for start in range(0, len(ids), room):
        yield [end, *ids[start : start + room]], 1 + (prompt if start == 0 else 0)


@torch.inference_mode()
def held_out(
    model: LlamaForCausalLM, tokenizer: Any, rows: list[dict[str, str]]
) -> dict[str, float]:
    """Nats per token and bits per byte over the rows; the batch order does not matter."""
    pieces = sorted(
        (piece for row in rows for piece in windows(tokenizer, row)),
        key=lambda piece: len(piece[0]),
    )
    nats, tokens = 0.0, 0
    for first in range(0, len(pieces), 16):
        group = pieces[first : first + 16]
        longest = max(len(ids) for ids, _ in group)
        # Padding on the right is never attended to under a causal mask, and is not scored.
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in group])
        scored = torch.tensor(
            [[skip <= place < len(ids) for place in range(1, longest)] for ids, skip in group]
        )
        logits = model(input_ids=padded[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(
            logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none"
        )
        nats += losses.double()[scored.flatten()].sum().item()
        tokens += int(scored.sum())
    size = sum(len((row.get("text") or row["completion"]).encode()) for row in rows)
    return {
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def final_answer(text: str) -> str | None:
    match = re.search(r"Answer: (-?\d+)", text)
    return match[1] if match else None


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Share of greedy completions whose final answer is the right one."""
    end = tokenizer.convert_tokens_to_ids(END)
    # Prompts of one length go together, so that nothing has to be padded.
    by_length: dict[int, list[tuple[list[int], str]]] = {}
    for row in rows:
        prompt = [end, *tokenizer.encode(row["prompt"])]
        by_length.setdefault(len(prompt), []).append((prompt, row["completion"]))
    right = 0
    for length, group in by_length.items():
        ids = torch.tensor([prompt for prompt, _ in group])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=96,
            eos_token_id=end,
            pad_token_id=end,
        )
        for generated, (_, completion) in zip(out, group, strict=True):
            text = tokenizer.decode(generated[length:], skip_special_tokens=True)
            right += final_answer(text) == final_answer(completion)
    return right / len(rows)


def merged(base: Weights, experts: list[Weights], strength: float) -> Weights:
    """base + strength * (sum of the experts' differences from it)."""
    return {
        name: weight
        + strength * sum((expert[name] - weight for expert in experts), torch.zeros_like(weight))
        for name, weight in base.items()
    }


def build(work: Path, out: Path, report: Callable[[str], None] = print) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    tests = {domain: read_rows(out / "data" / f"{domain}.test.jsonl") for domain in DOMAINS}
    base = load(out / "base").state_dict()
    experts = [load(out / name).state_dict() for name in MERGED]
    recipes = {"average": 1 / len(MERGED), "task arithmetic 0.5": 0.5, "task arithmetic 1.0": 1.0}

    # Kept per model, so that a stopped run goes on where it was.
    done_file = work / "scores.partial.json"
    done: dict[str, Any] = json.loads(done_file.read_text()) if done_file.exists() else {}
    for name in (*MODELS, *recipes):
        if name in done:
            continue
        model = load(out / (name if name in MODELS else "base"))
        if name in recipes:
            model.load_state_dict(merged(base, experts, recipes[name]))
        scores: dict[str, Any] = {
            domain: held_out(model, tokenizer, rows) for domain, rows in tests.items()
        }
        scores["math_exact_match"] = exact_match(model, tokenizer, tests["math"][:EXACT_PROMPTS])
        done[name] = scores
        done_file.write_text(json.dumps(done))
        report(f"scores: {name} {scores}")
    write_tables(done, out)
    write_cards(done, work, out)
    done_file.unlink()


def _table(scores: dict[str, Any], measure: str) -> list[str]:
    lines = [f"| model | {' | '.join(DOMAINS)} |", "|---|" + "---|" * len(DOMAINS)]
    for name, row in scores.items():
        cells = " | ".join(f"{row[domain][measure]:.3f}" for domain in DOMAINS)
        lines.append(f"| {name} | {cells} |")
    return lines


def write_tables(scores: dict[str, Any], out: Path) -> None:
    (out / "scores.json").write_text(
        json.dumps(
            {
                "models": {name: scores[name] for name in MODELS},
                "merges_of_japanese_math_code": {
                    name: row for name, row in scores.items() if name not in MODELS
                },
            },
            indent=1,
        )
        + "\n"
    )
    exact = " | ".join(f"{row['math_exact_match']:.0%}" for row in scores.values())
    lines = [
        "# A small model family to merge",
        "",
        "A Llama of 5.0 M parameters (`base`) and four full fine-tunes of it (`japanese`, `math`,",
        "`code`, `german`), in bfloat16, trained from scratch by one command:",
        "",
        "    python scripts/zoo/build.py --out zoo",
        "",
        "They are for trying and testing merges: real weights trained on real text, small enough",
        "to score in seconds, and far too small to write anything useful.",
        "",
        "`data/` holds text to calibrate on (`train`), to choose with (`val`) and to report on",
        "(`test`); `data/NOTICE.md` says where it is from. The models were trained on more text",
        "than `data/*.train.jsonl`, never on the documents of `val` and `test`.",
        "",
        "## Scores",
        "",
        "`python scripts/zoo/build.py --only scores` (after the other steps). Test sets of",
        "`data/`, every row after one `<|endoftext|>`; of `math` only the completions count. The",
        "last three rows are merges of `japanese`, `math` and `code`: the plain average, and task",
        "arithmetic (base + λ · sum of differences), which is the average at λ = 1/3.",
        "",
        "Nats per token:",
        "",
        *_table(scores, "nats_per_token"),
        "",
        "Bits per byte:",
        "",
        *_table(scores, "bits_per_byte"),
        "",
        f"Right answers to the first {EXACT_PROMPTS} maths test prompts, greedy decoding:",
        "",
        f"| {' | '.join(scores)} |",
        "|" + "---|" * len(scores),
        f"| {exact} |",
        "",
        "The weights are under Apache-2.0. A build is seeded, but floating-point sums differ from",
        "one processor to another, so a rebuild elsewhere gives close scores, not the same bits.",
        "",
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def write_cards(scores: dict[str, Any], work: Path, out: Path) -> None:
    """A model card per model, with the sources of the domains it was trained on."""
    sources = json.loads((work / "corpora" / "sources.json").read_text())
    for name in MODELS:
        run = BASE if name == "base" else EXPERTS[name]
        domains = {stream.removesuffix("-help") for stream in run.mixture}
        mixture = ", ".join(f"{stream} {share:.0%}" for stream, share in run.mixture.items())
        tokens = run.steps * run.batch_tokens
        origin = "trained from scratch" if name == "base" else "a full fine-tune of `../base`"
        lines = [
            "---",
            "license: apache-2.0",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {name}",
            "",
            f"A Llama of 5.0 M parameters, {origin} on {tokens / 1e6:.2f} M tokens",
            f"({mixture}), seed {run.seed}. Made by `scripts/zoo/build.py` to try model merging",
            "on; too small for any other use.",
            "",
        ]
        if any(stream.endswith("-help") for stream in run.mixture):
            lines += [
                "`-help` is the part of the domain's text that comes from the LibreOffice help.",
                "",
            ]
        lines += ["| training text | version | licence |", "|---|---|---|"]
        lines += [
            f"| {source['package']} | {source['version']} | {source['licence']} |"
            for source in sources
            if source["domain"] in domains
        ]
        if "math" in domains:
            lines.append("| generated word problems | `scripts/zoo/arithmetic.py` | Apache-2.0 |")
        lines += [
            "",
            "Held-out loss on the test sets of `../data`:",
            "",
            "| domain | nats per token | bits per byte |",
            "|---|---|---|",
        ]
        lines += [
            f"| {domain} | {scores[name][domain]['nats_per_token']:.3f} | "
            f"{scores[name][domain]['bits_per_byte']:.3f} |"
            for domain in DOMAINS
        ]
        lines += [
            "",
            f"Right answers on {EXACT_PROMPTS} maths test prompts: "
            f"{scores[name]['math_exact_match']:.0%}.",
            "",
        ]
        (out / name / "README.md").write_text("\n".join(lines), encoding="utf-8")
