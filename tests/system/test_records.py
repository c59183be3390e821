"""Records with checksums: what does not hold is as good as absent, whichever bit it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.system.records import Records, read_lines, read_sealed, seal, unseal

ENTRY = {"unit": 7, "stats": {"count": 64, "gram": [[1.5, -2e-300]], "said": "née\r\n\u2028"}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def flips(content: bytes) -> Any:
    """Every file that differs in one bit."""
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def test_every_bit_counts() -> None:
    line = seal(ENTRY)
    assert unseal(line) == ENTRY
    assert json.loads(line)["unit"] == 7  # still JSON for whoever reads it
    assert all(unseal(changed) is None for changed in flips(line))
    assert all(unseal(line[:length]) is None for length in range(len(line)))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), JSON, min_size=1, max_size=4))
def test_what_is_sealed_is_read_back(entry: dict[str, Any]) -> None:
    line = seal(entry)
    assert line.count(b"\n") == 1
    found = unseal(line)
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        assert found is None  # half of a surrogate pair is no text: done again, never wrong
    else:
        assert found == entry


def test_lines_count_up_to_the_first_that_does_not_hold() -> None:
    lines = [seal({"n": number}) for number in range(4)]
    assert read_lines(b"".join(lines)) == ([{"n": n} for n in range(4)], sum(map(len, lines)))
    for changed in flips(lines[1]):
        found, length = read_lines(lines[0] + changed + lines[2])
        assert (found, length) == ([{"n": 0}], len(lines[0]))
    assert read_lines(b"".join(lines)[:-3])[0] == [{"n": n} for n in range(3)]
    assert read_lines(b"") == ([], 0)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]\n", b"\xff\xfe", b'"}\n' * 9, None])
def test_files_of_somebody_elses(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    assert read_sealed(path) is None
    path.unlink(missing_ok=True)
    path.mkdir()
    assert read_sealed(path) is None


def test_records_survive_any_flipped_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is believed is a beginning of what was written, and what follows can be added."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = tmp_path / "journal.jsonl"
    records = Records(path, "key", "inputs")
    for number in range(3):
        records.append({"n": number})
    records.close()
    whole = path.read_bytes()
    for changed in flips(whole):
        path.write_bytes(changed)
        again = Records(path, "key", "inputs")
        known = again.entries
        assert known == [{"n": number} for number in range(len(known))]
        again.append({"n": len(known)})
        again.close()
        last = Records(path, "key", "inputs")
        assert len(last.entries) == len(known) + 1
        last.close()


def test_records_of_other_inputs_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    records = Records(path, "key", "inputs")
    records.append({"n": 1})
    records.close()
    assert Records.is_of(path, "key", "inputs")
    assert not Records.is_of(path, "key", "others")
    assert Records.count_of(path) == 1
    other = Records(path, "key", "others")
    assert other.entries == []
    other.close()
