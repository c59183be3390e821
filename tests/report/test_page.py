"""merge_report.html: well formed, self-contained, escaped, and showing what the report says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from html import escape
from importlib import resources
from typing import Any

import pytest
from markupsafe import Markup

from merge_cli.report import charts
from merge_cli.report.html import render_html
from merge_cli.report.page import (
    Details,
    Figure,
    Items,
    KeyFigure,
    Paragraph,
    Section,
    Table,
    Verbatim,
    code,
    render,
    strong,
)
from merge_cli.report.page import Page as Page_
from tests.support.html import Page
from tests.support.paths import GOLDEN

_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def group(name: str, layer: int | None, sources: int, value: float = 0.123) -> dict[str, Any]:
    pairs = range(sources)
    return {
        "name": name,
        "layer": layer,
        "count": 1234,
        "norm": [1.5] * sources,
        "relative_norm": [0.0456] * sources,
        "cosine": [[1.0 if i == j else value for j in pairs] for i in pairs]
        if sources > 1
        else None,
        "sign_agreement": [[1.0 if i == j else 0.567 for j in pairs] for i in pairs],
        "conflict": 0.314 if sources > 1 else None,
        "kept": [0.198] * sources,
        "change": 0.0271,
    }


def report(sources: int = 3, layers: int = 6, names: list[str] | None = None) -> dict[str, Any]:
    models = names or [f"expert-{i}" for i in range(sources)]
    groups = [
        group("model.embed_tokens.weight", None, sources),
        *(group(f"model.layers.{i}", i, sources, -0.25) for i in range(layers)),
    ]
    stage = {"thread_seconds": 1.25, "threads": 2, "bytes": 123, "gigabytes_per_second": 1.5}
    return {
        "schema": 1,
        "merge_cli": "0.1.0",
        "created": "2026-11-24T01:00:00+00:00",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "platform": "Linux x86_64"},
        "device": {"type": "cpu", "name": "cpu", "reason": "no CUDA device found"},
        "threads": 2,
        "recipe": {
            "method": "ties",
            "file": "ties.yaml",
            "digest": _DIGEST,
            "seed": 0,
            "text": "merge_method: ties\nname: <b>&amp;\n",
        },
        "inputs": [
            {
                "role": "source" if i else "base",
                "model": f"../zoo/{name}",
                "revision": None,
                "digest": _DIGEST,
                "tensors": 56,
                "bytes": 9961472,
            }
            for i, name in enumerate(["base", *models])
        ],
        "output": {
            "bytes": 9961472,
            "parameters": 4980000,
            "shards": [{"file": "model.safetensors", "bytes": 9961472}],
            "dtypes": {"BF16": 56},
        },
        "notes": ["the tokenizer is the base's"],
        "statistics": {
            "of": "deltas",
            "models": models,
            "sampled": 0.25,
            "total": group("whole model", None, sources),
            "groups": groups,
        },
        "tensors": [
            {
                "name": "lm_head.weight",
                "shape": [512, 64],
                "dtype": "BF16",
                "action": "merge",
                "note": "",
                "norm": [0.777] * sources,
                "non_finite": 0,
            }
        ],
        "cost": {
            "seconds": 12.3,
            "survey_seconds": 0.0,
            "stages": {"read": stage, "compute": stage, "write": stage},
            "bytes_read": 39845888,
            "bytes_written": 9961472,
            "resumed_bytes": 0,
            "peak_rss": 700000000,
            "peak_vram": None,
            "buffers": 640000000,
        },
    }


def without_statistics() -> dict[str, Any]:
    return {**report(), "statistics": None}


def without_data() -> dict[str, Any]:
    """Every measurement null, as for tensors that held nothing finite."""
    data = report()
    for one in [data["statistics"]["total"], *data["statistics"]["groups"]]:
        one["cosine"] = one["sign_agreement"] = [[None] * 3] * 3
        one["relative_norm"] = one["kept"] = [None] * 3
        one["conflict"] = one["change"] = None
    for stage in data["cost"]["stages"].values():
        stage["gigabytes_per_second"] = None
    return data


CASES = {
    "three": report(),
    "one source": report(sources=1),
    "sixteen sources": report(sources=16, layers=32),
    "eighty layers": report(sources=2, layers=80),
    "no layers": report(layers=0),
    "one layer": report(layers=1),
    "no statistics": without_statistics(),
    "no data": without_data(),
}


@pytest.mark.parametrize("case", CASES)
def test_page_is_well_formed_and_accessible(case: str) -> None:
    page = Page(render_html(CASES[case]))
    assert page.count("h1") == 1
    assert page.tags[0][:2] == ("html", {"lang": "en"})
    charts_drawn = [attrs for tag, attrs, _ in page.tags if tag == "svg"]
    assert charts_drawn
    assert all(attrs["role"] == "img" for attrs in charts_drawn)
    titled = sum(tag == "title" and parent == "svg" for tag, _, parent in page.tags)
    assert titled == len(charts_drawn)


@pytest.mark.parametrize("case", CASES)
def test_page_loads_nothing(case: str) -> None:
    html = render_html(CASES[case])
    page = Page(html)
    assert not re.search(r"https?://|url\(|@import|//cdn", html)
    assert not {"link", "img", "iframe"} & {tag for tag, _, _ in page.tags}
    assert "<script>" in html  # without an address
    assert not any({"src", "href"} & set(attrs) for _, attrs, _ in page.tags)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_finite(case: str) -> None:
    html = render_html(CASES[case])
    assert not re.search(r"\b(nan|inf|None)\b", html.partition("</style>")[2])


def test_text_from_outside_is_escaped() -> None:
    hostile = '<script>alert("x")</script>&'
    data = report(names=[hostile, "math", "code"])
    data["notes"] = [hostile]
    data["recipe"]["file"] = data["device"]["name"] = data["device"]["reason"] = hostile
    data["inputs"][1]["revision"] = data["inputs"][1]["digest"] = hostile
    data["statistics"]["groups"][0]["name"] = data["tensors"][0]["name"] = hostile
    data["tensors"][0]["note"] = data["tensors"][0]["dtype"] = hostile
    data["cost"]["stages"][hostile] = data["cost"]["stages"]["read"]
    html = render_html(data)
    assert html.count("<script") == 1  # the page's own
    assert escape(hostile) in html
    assert hostile in Page(html).text


def test_values_agree_with_the_report() -> None:
    page = Page(render_html(report()))
    for shown in ("0.123", "−0.25", "31.4 %", "56.7", "4.56 %", "2.71 %", "19.8 %"):
        assert shown in page.text
    for shown in ("4.98 M", "9.96 MB", "12.3 s", "700 MB", "1.25 s on 2 threads", "1.5 GB/s"):
        assert shown in page.text
    assert "expert-0 – expert-2, layer 5: −0.25" in page.tooltips
    assert "merge_method: ties\nname: <b>&amp;\n" in page.text


def test_digests_are_short_with_the_whole_to_point_at() -> None:
    page = Page(render_html(report()))
    assert _DIGEST not in page.text
    assert _DIGEST[:12] in page.text
    assert any(attrs.get("title") == _DIGEST for tag, attrs, _ in page.tags if tag == "code")


def test_one_source_has_no_pairs_but_has_norms() -> None:
    page = Page(render_html(report(sources=1)))
    assert page.text.count("nothing to compare it with") == 2
    assert "expert-0, layer 3: 4.56\u00a0%" in page.tooltips


def test_without_statistics_only_the_cost_is_drawn() -> None:
    page = Page(render_html(without_statistics()))
    assert "No statistics were measured" in page.text
    assert page.count("svg") == 3


def test_a_run_that_found_everything_done_has_no_rates() -> None:
    data = without_statistics()
    for stage in data["cost"]["stages"].values():
        stage |= {"bytes": 0, "gigabytes_per_second": None}
    page = Page(render_html(data))
    assert page.count("svg") == 2
    assert "GB/s by stage" not in page.text


def test_without_layers_no_axis_is_drawn() -> None:
    page = Page(render_html(report(layers=0)))
    assert "no tensor of this model belongs to a layer" in page.text
    assert "0.123" in page.text
    assert "layer" not in page.texts  # the label of an axis of layers


def test_signs_that_were_not_compared_are_no_conflict_of_zero() -> None:
    data = report()
    data["statistics"]["total"] |= {"sign_agreement": None, "conflict": 0.0}
    page = Page(render_html(data))
    assert "Signs: not measured." in page.text
    assert "of elements" not in page.texts


def test_many_sources_are_rows_by_source() -> None:
    page = Page(render_html(report(sources=16, layers=32)))
    tooltips = Counter(page.tooltips)
    assert any("mean of each source with the others" in text for text in page.texts)
    assert tooltips["16  expert-15, layer 31: −0.25"] == 1
    assert max(Counter(page.texts)[str(n)] for n in range(1, 17)) >= 2  # columns are numbers


def test_many_layers_are_numbered_as_often_as_fits() -> None:
    page = Page(render_html(report(sources=2, layers=80)))
    assert "75" in page.texts
    assert "76" not in page.texts
    assert "expert-0 – expert-1, layer 79: −0.25" in page.tooltips


def test_layers_are_in_order_stack_by_stack() -> None:
    data = report()
    data["statistics"]["groups"] = [
        group("text.layers.1", 1, 3), group("vision.layers.0", 0, 3), group("text.layers.0", 0, 3),
    ]  # fmt: skip
    alike = Page(render_html(data))  # bars of one height are a sentence
    assert "is alike." in alike.text
    assert not [tip for tip in alike.tooltips if tip.endswith(": 31.4\u00a0%")]
    for share, layer in zip((0.31, 0.53, 0.42), data["statistics"]["groups"], strict=True):
        layer["conflict"] = share
    page = Page(render_html(data))
    assert "by layer of text.layers, then vision.layers." in page.text
    ends = (": 42\u00a0%", ": 31\u00a0%", ": 53\u00a0%")
    bars = [tip for tip in page.tooltips if tip.endswith(ends)]
    assert [bar.partition(":")[0] for bar in bars] == [
        "text.layers.0", "text.layers.1", "vision.layers.0",
    ]  # fmt: skip


def test_long_names_are_shortened_at_both_ends_and_told_apart() -> None:
    names = [f"some-very-long-name-of-a-model-{end}-instruct-2026" for end in ("a", "b")]
    page = Page(render_html(report(sources=2, names=names)))
    assert charts.shorten(names[0]) == charts.shorten(names[1])
    assert any(text.startswith("1  some-very") for text in page.texts)
    assert all(len(name) <= 22 for name in map(charts.shorten, names))


@pytest.mark.parametrize(
    ("value", "level"), [(0.0, 0), (1.0, 20), (-1.0, -20), (2.0, 20), (0.26, 5), (-0.24, -5)]
)
def test_colours_are_a_step_of_the_palette(value: float, level: int) -> None:
    scale = charts.Scale(lambda v: v, (-1, 0, 1), str, "")
    assert scale.level(value) == level


def test_palette_has_every_step_in_light_and_dark() -> None:
    html = render_html(report())
    for name in ("z0", *(f"{side}{step}" for side in "pn" for step in range(1, 21))):
        assert len(re.findall(rf"\.{name}\{{fill:#", html)) == 2


def test_missing_values_break_lines_and_are_no_zero() -> None:
    axis = charts.layer_axis(["layer 0", "layer 1", "layer 2", "layer 3"], range(4), "layer")
    one = charts.Series("math", [0.1, None, 0.2, 0.3], 0)
    chart = charts.lines("norms", axis, [one], str, "")
    path = re.search(r'class="line s-0" d="([^"]*)"', chart)
    assert path is not None
    assert re.findall("[ML]", path[1]) == ["M", "M", "L"]
    grid = charts.heat_map("x", ["math"], axis, [[None] * 4], charts.Scale(abs, (0, 1), str, ""))
    assert grid.count("no data") == 4


def test_equal_models_are_drawn_on_the_zero_line() -> None:
    data = report()
    for one in data["statistics"]["groups"]:
        one |= {"relative_norm": [0.0] * 3, "change": 0.0, "conflict": 0.0}
    page = Page(render_html(data))
    assert "expert-0, layer 3: 0\u00a0%" in page.tooltips
    assert "100\u00a0%" in page.texts  # an axis still has two ends


def test_without_data_no_axis_is_drawn() -> None:
    page = Page(render_html(without_data()))
    assert page.text.count("Whole model: no data") == 2
    assert "layer" not in page.texts


@pytest.mark.parametrize(("sources", "chance"), [(2, "50 %"), (3, "75 %")])
def test_conflict_is_set_against_chance(sources: int, chance: str) -> None:
    page = Page(render_html(report(sources=sources)))
    assert f"would be in conflict on {chance}." in page.text


def test_equal_shares_are_a_sentence_and_others_a_chart() -> None:
    data = report()
    assert "the same in every layer" in Page(render_html(data)).text
    data["statistics"]["groups"][3]["kept"] = [0.3, 0.2, 0.1]
    page = Page(render_html(data))
    assert "the same in every layer" not in page.text
    assert "expert-2, layer 2: 10\u00a0%" in page.tooltips


def test_long_table_is_cut_with_a_word_about_the_rest() -> None:
    data = without_statistics()
    data["tensors"] = data["tensors"] * 20_003
    page = Page(render_html(data))
    assert "3 more are in merge_report.json." in page.text


def test_only_the_script_that_the_policy_names_runs() -> None:
    html = render_html(report())
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\">" in html
    assert "default-src 'none'" in html


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize(
    ("cells", "ordered"),
    [
        (["2 min 5 s", "48 s", "1 h", "–", "900 ms"], ["48 s", "2 min 5 s", "900 ms", "1 h", "–"]),
        (["1,234", "−5", "0.5 (0.1 to 0.9)", "12 %"], ["−5", "0.5 (0.1 to 0.9)", "12 %", "1,234"]),
        (["10 MB", "2 GB", "900 kB"], ["900 kB", "10 MB", "2 GB"]),
        (["b", "a"], ["a", "b"]),
    ],
)
def test_what_a_column_sorts_by(cells: list[str], ordered: list[str]) -> None:
    """Numbers with their units, before words; `ms` is no unit of the pages."""
    script = resources.files("merge_cli.report").joinpath("page.js").read_text(encoding="utf-8")
    functions = script.partition("for (const head")[0]
    program = f"""{functions}
      const cells = {json.dumps(cells)}.map((textContent) => ({{textContent}}));
      cells.sort((a, b) => {{ const [x, y] = [key(a), key(b)];
        return x[0] - y[0] || (x[1] < y[1] ? -1 : x[1] > y[1] ? 1 : 0); }});
      console.log(JSON.stringify(cells.map((cell) => cell.textContent)));"""
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ordered


def test_the_page_is_the_golden_one(request: pytest.FixtureRequest) -> None:
    """Every tag and word of one page. After a wanted change: pytest -k golden --rewrite-golden."""
    golden = GOLDEN / "merge_report.html"
    html = render_html(report())
    if request.config.getoption("--rewrite-golden"):
        golden.write_text(html, encoding="utf-8")
    assert html == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["<b>bold</b>", "a & b", "\"quoted\" 'text'", "{{ 7 * 7 }}"])
def test_every_part_of_a_page_escapes_its_text(text: str) -> None:
    parts: list[Any] = [
        Figure(text, Markup("<svg></svg>")),
        Table([text], [[text]]),
        Items([text]),
        Paragraph(text),
        Verbatim(text),
        Details(text, [Paragraph(text)]),
    ]
    sections = [Section(text, text, text, parts), Section("x", code(text), strong(text), ())]
    page = Page_(text, text, text, [text, text], [KeyFigure(text, text, [text])], sections)
    html = render(page)
    seen = Page(html)
    assert (text in html) == (text == "{{ 7 * 7 }}"), "nothing reads it as HTML or as a template"
    assert "".join(seen.texts).count(text) == 21
