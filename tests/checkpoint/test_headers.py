"""Headers are believed only if they hold: every way to be wrong is one clear error."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge_cli.checkpoint import headers
from merge_cli.checkpoint.headers import parse_header, read_header_file
from merge_cli.checkpoint.tensors import columns_of
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.tiny import Family, write_model


def craft(path: Path, entries: Any, data: bytes = b"\0" * 16) -> Path:
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return path


def parse(path: Path) -> Any:
    return parse_header(read_header_file(path, "m"), path, path.stat().st_size, "m")


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 16, [2])}
BAD = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "overlaps"),
    "gap": ({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}, "gap"),
    "beyond the end": ({"a": entry(0, 8, [2]), "b": entry(8, 24, [4])}, "truncated: the last 8"),
    "unused end": ({"a": entry(0, 8, [2])}, "8 bytes at its end"),
    "size against shape": ({"a": entry(0, 16, [3])}, "contradicts itself"),
    "negative": ({"a": entry(-8, 8, [4])}, "impossible"),
    "backwards": ({"a": entry(8, 0, [2])}, "impossible"),
    "fractional": ({"a": entry(0, 16, [4.0])}, "impossible"),  # type: ignore[list-item]
    "unknown dtype": ({"a": entry(0, 16, [4], "Q7")}, "unknown dtype 'Q7'"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, "lacks"),
    "not a mapping": ([1, 2], "not a mapping"),
    "not JSON": (b'{"a": ', "not valid JSON"),
    "true": ({"a": entry(0, 16, [True, 4])}, "impossible"),
    "many dtypes": ({"a": {**entry(0, 16, [4]), "dtype": ["F32"]}}, "unknown dtype"),
    "not text": ({"\ud800": entry(0, 16, [4])}, "not text"),
    "twice": (b'{"a": 1, "a": 2}', "'a' occurs twice"),
    "twice inside": (b'{"a": {"dtype": "F32", "shape": [4], "shape": [2]}}', "'shape' occurs"),
    "twice with colons": (b'{"a:b": {}, "a:b": {}}', "'a:b' occurs twice"),
    "twice in a list": (b'{"a": [{"b": 1, "b": 2}]}', "'b' occurs twice"),
}


def test_good_header(tmp_path: Path) -> None:
    found = parse(craft(tmp_path / "x.safetensors", GOOD))
    assert [(r.name, r.shape, r.nbytes) for r in found.values()] == [("a", (2,), 8), ("b", (2,), 8)]


def test_colons_in_strings(tmp_path: Path) -> None:
    """They are what the quick look for keys that occur twice cannot see through."""
    entries = {"__metadata__": {"from": "https://x"}, "a:b": entry(0, 16, [4])}
    assert list(parse(craft(tmp_path / "x.safetensors", entries))) == ["a:b"]


@pytest.mark.parametrize("case", BAD)
def test_bad_header(tmp_path: Path, case: str) -> None:
    entries, words = BAD[case]
    with pytest.raises(CorruptFileError, match=words) as raised:
        parse(craft(tmp_path / "x.safetensors", entries))
    assert "x.safetensors" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 1000) + b"{}"])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CorruptFileError):
        parse(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float64", "int8", "bool", "float8_e4m3fn"]
)
def test_reads_what_safetensors_writes(tmp_path: Path, dtype: str) -> None:
    tensors = {"x": torch.ones(3, 5).to(getattr(torch, dtype)), "scalar": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = parse(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()[found["x"].offset :][: found["x"].nbytes]
    assert raw == tensors["x"].view(torch.uint8).numpy().tobytes()
    assert found["scalar"].shape == ()


def test_index_that_leaves_the_folder(family: Family) -> None:
    model = family.folder / "a"
    (model / "model.safetensors").rename(model / "part.safetensors")
    for shard in ("../b/model.safetensors", "/etc/hosts", "x/../../b/model.safetensors"):
        index = {"weight_map": {"model.norm.weight": shard}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CorruptFileError, match="outside the model's folder"):
            open_source(ModelRef("a"), family.folder)


def index_of(model: Path) -> tuple[Path, dict[str, Any]]:
    path = model / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(4) for name in "abcd"}
    write_model(tmp_path / "m", tensors, shards=2)
    path, index = index_of(tmp_path / "m")
    ref = ModelRef("m")
    assert set(open_source(ref, tmp_path).tensors) == set("abcd")

    index["weight_map"]["e"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="the file does not have it"):
        open_source(ref, tmp_path)

    index["weight_map"]["e"] = "model-00003-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="missing"):
        open_source(ref, tmp_path)


def test_models_of_one_header_share_it(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(4) for name in "abcd"}
    for label in "xy":
        write_model(tmp_path / label, tensors, shards=2)
    write_model(tmp_path / "z", tensors, shards=2)
    for path in (tmp_path / "z").glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt", "made": "elsewhere"})
    x, y, z = (open_source(ModelRef(label), tmp_path) for label in "xyz")
    assert columns_of(x.tensors) is columns_of(y.tensors) is not columns_of(z.tensors)
    assert [*map(id, x.header_bytes.values())] == [*map(id, y.header_bytes.values())]
    assert [*map(id, x.tensors)] == [*map(id, z.tensors)]
    for label, source in zip("xyz", (x, y, z), strict=True):
        for file, raw in source.header_bytes.items():
            assert (tmp_path / label / file).read_bytes().startswith(raw)
        for name, ref in source.tensors.items():
            [stored] = ref.stored
            assert (ref.name, ref.model, stored.path.parent) == (name, label, tmp_path / label)


def test_duplicate_tensor(tmp_path: Path) -> None:
    write_model(tmp_path / "m", {"a": torch.zeros(4), "b": torch.zeros(4)}, shards=2)
    save_file({"a": torch.zeros(4), "b": torch.ones(4)},
              tmp_path / "m" / "model-00002-of-00002.safetensors")  # fmt: skip
    with pytest.raises(CorruptFileError, match="two files"):
        open_source(ModelRef("m"), tmp_path)


def test_links_are_followed(family: Family) -> None:
    """The Hub's cache is made of links; only the names in an index are confined."""
    linked = family.folder / "linked"
    linked.mkdir()
    for file in (family.folder / "a").iterdir():
        (linked / file.name).symlink_to(file)
    assert open_source(ModelRef("linked"), family.folder).tensors.keys() == family.base.keys()


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    torch.save({"a": torch.zeros(2)}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(SourceError, match="pickled") as raised:
        open_source(ModelRef("m"), tmp_path)
    assert "merge-cli convert m converted" in raised.value.hint


@pytest.mark.parametrize(
    ("files", "words"),
    [([], "no safetensors"), (["adapter_model.safetensors"], "LoRA adapter")],
)
def test_not_a_model(tmp_path: Path, files: list[str], words: str) -> None:
    (tmp_path / "m").mkdir()
    for file in files:
        save_file({"a": torch.zeros(2)}, tmp_path / "m" / file)
    with pytest.raises(SourceError, match=words):
        open_source(ModelRef("m"), tmp_path)


def test_other_copies_are_left_alone(tmp_path: Path) -> None:
    """Mistral ships consolidated.safetensors beside the shards: the same weights, other names."""
    write_model(tmp_path / "m", {"a": torch.zeros(2)})
    save_file({"x": torch.zeros(2)}, tmp_path / "m" / "consolidated.safetensors")
    assert list(open_source(ModelRef("m"), tmp_path).tensors) == ["a"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "[1]", "is not a mapping"),
        ("config.json", "{", "is not valid JSON"),
        ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "not safetensors: 1"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x.bin"}}', "not safetensors"),
    ],
)
def test_hostile_json(tmp_path: Path, file: str, content: str, words: str) -> None:
    write_model(tmp_path / "m", {"a": torch.zeros(4)}, shards=2 if "index" in file else 1)
    (tmp_path / "m" / file).write_text(content)
    with pytest.raises(CorruptFileError, match=words):
        open_source(ModelRef("m"), tmp_path)


@pytest.mark.parametrize(
    "entries",
    [{"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}}, {"\ud800": entry(0, 16, [4])}],
)
def test_hostile_headers(tmp_path: Path, entries: Any) -> None:
    with pytest.raises(CorruptFileError):
        parse(craft(tmp_path / "x.safetensors", entries))


PLAIN = st.sampled_from(["a", "b.0.c", "d:e", "ä", ""])
ODD = st.sampled_from(["a", 'f"', "g\\", "h\n", "\xa0", "__metadata__"])
SHAPES = st.lists(st.integers(0, 3), max_size=2)
EDITS = st.sampled_from(
    [
        *'"\\{}[],: 0123a\n', '""', "}}", ', "', '":', "00", "-", ".0", "null", '"x":1,', "\ud800",
        '"__metadata__":{},', '"dtype":"F32",',
        '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
    ]
)  # fmt: skip


def entries_called(names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    dtypes = st.sampled_from(["F32", "U8", "BF16"])
    return st.lists(st.tuples(names, dtypes, SHAPES), unique_by=lambda e: e[0], max_size=4)


def header_text(entries: list[Any], metadata: Any, separators: Any) -> str:
    """A header as writers make it, of tensors one behind another."""
    end, document = 0, {} if metadata is None else {"__metadata__": metadata}
    for name, dtype, shape in entries:
        start, end = end, end + torch.Size(shape).numel() * {"F32": 4, "U8": 1}.get(dtype, 2)
        document[name] = entry(start, end, shape, dtype)
    return json.dumps(document, separators=separators, ensure_ascii=False)


def outcome(raw: bytes, size: int) -> Any:
    try:
        return list(parse_header(raw, Path("x.safetensors"), size, "m").items())
    except CorruptFileError as error:
        return str(error)


USUAL = (
    entries_called(PLAIN),
    st.sampled_from([None, {"format": "pt"}, {}, {"a": 'b:"},{'}]),
    st.sampled_from([(",", ":"), (", ", ": ")]),
)
AS_WRITTEN = st.tuples(*USUAL, st.just([]), st.sampled_from(["", " \n"]), st.just(0))
EDITED = st.tuples(
    *USUAL,
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), EDITS), min_size=1, max_size=2),
    st.just(""),
    st.just(0),
)
UNUSUAL = st.tuples(
    entries_called(ODD),
    st.sampled_from([None, {"a": 1}, {"a": {"b": "c"}}]),
    st.sampled_from([(",", ":"), (" ,", " : ")]),
    st.just([]),
    st.sampled_from(["", "\xa0", "x"]),
    st.integers(-1, 1),
)


@given(st.one_of(AS_WRITTEN, EDITED, UNUSUAL))
@example(([("a", "F32", [2])], None, (",", ":"), [(0, 0, "\ufeff")], "", 0))
def test_columns_are_those_of_entries_one_by_one(case: Any) -> None:
    """Whatever a header says: the same tensors, or the same error."""
    entries, metadata, separators, edits, padding, more = case
    text = header_text(entries, metadata, separators) + padding
    for at, taken, new in edits:
        text = text[:at] + new + text[at + taken :]
    body = text.encode(errors="surrogatepass")
    raw = struct.pack("<Q", len(body)) + body
    ends = {0, *map(int, re.findall(r"([0-9]{1,9})\]\}", text))}
    for size in {len(raw) + end + more for end in ends}:
        by_columns = outcome(raw, size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(headers, "columns_at_once", lambda *_: None)
            assert outcome(raw, size) == by_columns
