"""The experiments: what is counted, what chooses, and what tables say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_cli.evaluation.result import Cost, Metric
from tests.support.paths import ROOT

DOCS = ROOT / "docs" / "experiments"
SCRIPTS = ROOT / "scripts" / "experiments"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script by name; other tests get theirs from elsewhere."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in SCRIPTS.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def run_of(parts: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    return {"cpu": 10.0, "tokens": 1000, "chosen": "", "details": {}, "parts": parts, **more}


SMALL: dict[str, Any] = {
    "weights": {"english": [10, 10], "math": [1, 3]},
    "runs": {
        "uniform soup, seed 0": run_of({"english": [40.0, 20.0], "math": [1.0, 3.0]}),
        # Per token 0.5 less in English, and as much in maths: 0.25 in the mean of domains.
        "Fisher, seed 0": run_of({"english": [35.0, 15.0], "math": [1.0, 3.0]}, cpu=20.0),
        "Fisher, seed 1": run_of({"english": [31.0, 11.0], "math": [1.0, 3.0]}, cpu=40.0),
        "DARE, seed 0": run_of({"english": [50.0, 20.0], "math": [1.0, 3.0]}, chosen="λ 0.1"),
    },
}


def test_a_gain_is_the_mean_over_domains_and_seeds(scripts: Any) -> None:
    cells = scripts("study_page").cells(SMALL)
    fisher = cells["Fisher"]
    assert fisher.gains == pytest.approx([0.25, 0.45])
    # Every row gains alike, so that the interval is a point.
    assert fisher.gain == pytest.approx((0.35, 0.35, 0.35))
    assert (fisher.seeds, fisher.cpu) == (2, 30.0)
    dare = cells["DARE"]
    assert dare.gain[0] == pytest.approx(-0.25)
    # The draws have the bad row not at all, once or twice: 0, -0.25 or -0.5.
    assert dare.gain[1:] == pytest.approx((-0.5, 0.0))
    assert "auto" not in cells


def test_the_table_says_where_there_are_several_seeds(scripts: Any) -> None:
    page = scripts("study_page")
    soup, dare, fisher = page.table(SMALL, ["english", "math"]).splitlines()[2:]
    assert soup == "| uniform soup | 3.000 | 1.000 | 2.000 | – | – | none | 10 | 1,000 |"
    assert "| **−0.250** | −0.500 to +0.000 | 1 |" in dare
    assert "| **+0.350** | +0.350 to +0.350 | 2: +0.250 to +0.450 | 30 |" in fisher
    assert page.chosen(SMALL) == "Chosen on validation rows, by seed. DARE: λ 0.1."
    assert page.differences(SMALL).splitlines()[2:] == []
    paired = {**SMALL["runs"], "DAM, seed 1": run_of({"english": [30.0, 10.0], "math": [1.0, 3.0]})}
    found = page.differences({**SMALL, "runs": paired}).splitlines()[2:]
    assert found == ["| DAM over Fisher | +0.050 | +0.050 to +0.050 | 1 |"]  # of seed 1 alone
    assert page.label("expert 2", ["english", "math"]) == "the math expert"


class Rows:
    """A family whose merges have given losses on validation rows, and no test rows."""

    sources = ()

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses = losses

    def val_losses(self, folder: Path, seed: int) -> tuple[dict[str, Metric], Cost]:
        loss = self.losses[folder.name]
        return {"math": Metric("loss", "", "lower", [loss], [1.0])}, Cost(tokens=100)

    def test_losses(self, folder: Path) -> None:
        raise AssertionError("test rows choose nothing")


def test_validation_rows_choose_and_their_cost_counts(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = scripts("study_methods")

    def merge(
        context: Any, recipe: dict[str, Any], name: str
    ) -> tuple[Path, float, dict[str, Any]]:
        return context.work / name, 2.0, {}

    monkeypatch.setattr(methods.Context, "merge", merge)
    losses = {"ties-0": 3.0, "ties-1": 1.0, "ties-2": 2.0}
    settings = [{"density": 0.2, "lambda": x} for x in (0.1, 0.5, 1.0)]
    context = methods.Context(Rows(losses), 0, tmp_path, {})
    outcome = methods.grid("ties", settings)(context)
    assert outcome.folder.name == "ties-1"
    assert outcome.chosen == "density 0.2, λ 0.5"
    assert outcome.tokens == 300
    assert outcome.cpu == pytest.approx(6.0, abs=1.0)


def test_the_first_seed_comes_first_and_nothing_twice(scripts: Any) -> None:
    study = scripts("study")
    work = [(f, s, m) for f, s, m, _ in study.order(["zoo", "registers"], [0, 1, 2])]
    assert len(work) == len(set(work))
    seeds = [seed for _, seed, _ in work]
    assert seeds.index(1) == seeds.count(0)
    methods = {method for stage in study.STAGES for method in stage}
    for family in ("zoo", "registers"):
        for seed in (0, 1, 2):
            found = {m for f, s, m in work if (f, s) == (family, seed)}
            assert found == (methods if seed == 0 else methods - set(study.ONCE))
    assert methods == {name for names in scripts("study_page").GROUPS.values() for name in names}


def test_two_processes_lose_nothing_of_each_other(scripts: Any, tmp_path: Path) -> None:
    study = scripts("study")
    file = tmp_path / "study.json"
    one, other = study.Results(file), study.Results(file)
    weights = (["families", "zoo", "weights"], {"math": [1]})
    one.add(weights, (["families", "zoo", "runs", "a"], {"cpu": 1}))
    other.add(weights, (["families", "zoo", "runs", "b"], {"cpu": 2}))
    one.add((["rates", "LoRA"], {"0.1": 2.5}))
    assert one.read()["families"]["zoo"]["runs"] == {"a": {"cpu": 1}, "b": {"cpu": 2}}
    assert other.read()["rates"] == {"LoRA": {"0.1": 2.5}}


def test_a_low_rank_update_begins_at_nothing_and_is_written_into_the_weights(scripts: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    training = scripts("study_training")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    net = LlamaForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters = training._low_rank(net)
    start = training._weights(net)
    assert start.keys() == before.keys()
    assert all(torch.equal(start[name], before[name]) for name in before)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == sum(
        p.numel() for p in parameters
    )
    update = net.model.layers[0].mlp.up_proj.parametrizations.weight[0]
    torch.nn.init.ones_(update.b)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = before[name] + 16 / 8 * torch.ones(24, 8) @ update.a
    assert torch.allclose(training._weights(net)[name], expected)


def test_a_training_reads_its_budget(scripts: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    training = scripts("study_training")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row number {i}"}) + "\n" for i in range(5)))
    family = SimpleNamespace(sources=[SimpleNamespace(train=file)] * 2)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "zoo" / "base")
    steps = training._steps(family, tokenizer, 100, 0)
    sizes = [sum(len(item.ids) for examples in step for item in examples) for step in steps]
    assert sum(sizes) >= 100 > sum(sizes[:-1])
    assert {tuple(map(len, step)) for step in steps} == {(2, 2)}


def test_the_tables_say_what_was_measured(scripts: Any) -> None:
    """The committed pages are what the committed numbers come to."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    study = json.loads((DOCS / "study.json").read_text(encoding="utf-8"))
    study_page = scripts("study_page")
    for family in study["families"].values():
        assert study_page.table(family, list(family["weights"])) in page
        assert study_page.chosen(family) in page
        assert study_page.differences(family) in page
    fidelity = json.loads((DOCS / "fidelity.json").read_text(encoding="utf-8"))
    shown = (DOCS / "fidelity.md").read_text(encoding="utf-8")
    assert scripts("fidelity").tables(fidelity) in shown
    results = json.loads((DOCS / "statistics.json").read_text(encoding="utf-8"))
    shown = (DOCS / "statistics.md").read_text(encoding="utf-8")
    assert scripts("examples").table(results) in shown
    assert scripts("examples").counts(results) in shown


def test_a_rejection_is_judged_by_all_rows(scripts: Any) -> None:
    fidelity = scripts("fidelity")
    pair = {
        "off": {"history": [{"score": s, "share": 1.0} for s in (1.0, 4.0, 2.0, 3.0)]},
        "on": {"history": [{"score": None, "share": s} for s in (0.25, 1.0, 1.0, 0.25)]},
    }
    found = fidelity.ruled_out(pair)
    assert found == {"rejected": 2, "best_kept": False, "lost": 1.0, "wrong": 0.5}
