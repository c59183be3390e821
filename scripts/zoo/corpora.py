"""Makes the text corpora: fetch packages, clean, deduplicate, split by document, cut in passages.

A corpus is a list of `Passage` rows in `WORK/corpora/DOMAIN.SPLIT.jsonl`. A document (a page, a
manual page, a source file) lies wholly in one split, chosen by a seeded hash of its name. The
name leaves the language out, so a page and its translations share a side. Paragraphs are
deduplicated over all domains with the test set served first: what the test set holds, no
training set does.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from markup import code_blocks, html_paragraphs, roff_paragraphs

SEED = 20240611
SPLITS = ("test", "val", "train")  # the order in which duplicates are granted
HELD_OUT = {"test": 0.10, "val": 0.06}
# A passage should fit the models' 512 positions in every language.
LONGEST = {"english": 1400, "german": 1100, "japanese": 600, "code": 1200}
SHORTEST = 300


@dataclass(frozen=True)
class Source:
    domain: str
    package: str
    licence: str
    pattern: str  # glob below the unpacked package
    read: Callable[[str], list[str]]
    committed: bool = False  # may its text be redistributed in zoo/data?


@dataclass(frozen=True)
class Passage:
    text: str
    source: str
    document: str
    committed: bool


_HELP = "usr/share/libreoffice/help/{}/text/**/*.html"
_BY_PAGE = "free, page by page"
_MAN = "usr/share/man/{}man*/*.gz"
_REFERENCE = "usr/share/debian-reference/*.{}.html"
SOURCES = (
    Source(
        "english",
        "libreoffice-help-en-us",
        "MPL-2.0",
        _HELP.format("en-US"),
        html_paragraphs,
        committed=True,
    ),
    Source(
        "english",
        "python3.11-doc",
        "PSF-2.0",
        "usr/share/doc/python3.11/html/**/*.html",
        html_paragraphs,
    ),
    Source(
        "english",
        "debian-reference-en",
        "GPL-2.0-or-later",
        _REFERENCE.format("en"),
        html_paragraphs,
    ),
    Source("english", "manpages", _BY_PAGE, _MAN.format(""), roff_paragraphs),
    Source("english", "manpages-dev", _BY_PAGE, _MAN.format(""), roff_paragraphs),
    Source(
        "japanese",
        "libreoffice-help-ja",
        "MPL-2.0",
        _HELP.format("ja"),
        html_paragraphs,
        committed=True,
    ),
    Source("japanese", "manpages-ja", _BY_PAGE, _MAN.format("ja/"), roff_paragraphs),
    Source("japanese", "manpages-ja-dev", _BY_PAGE, _MAN.format("ja/"), roff_paragraphs),
    Source(
        "japanese",
        "debian-reference-ja",
        "GPL-2.0-or-later",
        _REFERENCE.format("ja"),
        html_paragraphs,
    ),
    Source(
        "german",
        "libreoffice-help-de",
        "MPL-2.0",
        _HELP.format("de"),
        html_paragraphs,
        committed=True,
    ),
    Source("german", "manpages-de", _BY_PAGE, _MAN.format("de/"), roff_paragraphs),
    Source(
        "german",
        "debian-reference-de",
        "GPL-2.0-or-later",
        _REFERENCE.format("de"),
        html_paragraphs,
    ),
    Source("code", "python-stdlib", "PSF-2.0", "**/*.py", code_blocks, committed=True),
)
_SKIPPED_CODE = (
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "_bundled",
)
_SKIPPED_FILES = ("changelog.html", "genindex", "search.html", "py-modindex.html", "_sysconfigdata")


def split_of(document: str, seed: int = SEED) -> str:
    """The side of a document: a pure function of its name and the seed."""
    digest = hashlib.sha256(f"{seed}:{document}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < HELD_OUT["test"]:
        return "test"
    return "val" if place < HELD_OUT["test"] + HELD_OUT["val"] else "train"


def document_name(source: Source, path: Path) -> str:
    """A file's name without its language: translations get the same one."""
    if source.pattern.startswith("usr/share/man"):
        return f"man/{path.name.removesuffix('.gz')}"
    if source.pattern.startswith("usr/share/libreoffice"):
        return "help/" + path.as_posix().split("/text/", 1)[1]
    if source.pattern.startswith("usr/share/debian-reference"):
        return "reference/" + path.name.split(".")[0]
    return f"{source.package}/{path.as_posix()}"


def passages(paragraphs: list[str], longest: int, joiner: str = "\n") -> Iterator[str]:
    """Whole paragraphs packed in order into passages of SHORTEST..longest characters."""
    packed = ""
    for paragraph in paragraphs:
        grown = packed + joiner + paragraph if packed else paragraph
        if len(grown) <= longest:
            packed = grown
            continue
        if len(packed) >= SHORTEST:
            yield packed
        packed = paragraph if len(paragraph) <= longest else ""
    if len(packed) >= SHORTEST:
        yield packed


def _is_japanese(text: str) -> bool:
    return sum("\u3040" <= char <= "\u9fff" for char in text) >= 0.3 * len(text)


def fetch(package: str, work: Path) -> Path:
    """Downloads and unpacks a Debian package without installing it; returns its root."""
    root = work / "packages" / package
    if root.exists():
        return root
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
    unpacking = root.with_name(package + ".partial")
    unpacking.mkdir(parents=True, exist_ok=True)
    deb = sorted(debs.glob(f"{package}_*.deb"))[-1]
    subprocess.run(["dpkg", "-x", str(deb), str(unpacking)], check=True)
    unpacking.rename(root)
    return root


def version(package: str, work: Path) -> str:
    if package == "python-stdlib":
        return sys.version.split()[0]
    deb = sorted((work / "debs").glob(f"{package}_*.deb"))[-1]
    return deb.name.split("_")[1].replace("%3a", ":")


def _files(source: Source, work: Path) -> Iterator[tuple[str, str, bool]]:
    """(document name, text, committable) of every file worth reading."""
    is_code = source.domain == "code"
    root = Path(sysconfig.get_path("stdlib")) if is_code else fetch(source.package, work)
    for path in sorted(root.glob(source.pattern)):
        relative = path.relative_to(root)
        if is_code and any(part in _SKIPPED_CODE for part in relative.parts):
            continue
        if path.name.startswith(_SKIPPED_FILES) or "_static" in relative.parts:
            continue
        if path.is_symlink():
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8", errors="ignore")
        # Standard library files with a notice of their own may have a licence of their own.
        committable = source.committed and not (is_code and "copyright" in text.lower())
        yield document_name(source, relative), text, committable


def build(work: Path, sources: tuple[Source, ...] = SOURCES) -> None:
    """Writes WORK/corpora/{DOMAIN.SPLIT.jsonl, sources.json}."""
    documents: dict[str, list[tuple[Source, str, str, bool]]] = {split: [] for split in SPLITS}
    for source in sources:
        for name, text, committable in _files(source, work):
            documents[split_of(name)].append((source, name, text, committable))
        print(f"corpora: read {source.package}", flush=True)

    seen: set[bytes] = set()

    def is_new(paragraph: str) -> bool:
        if len(paragraph) < 30:  # headings such as "Options" recur and give nothing away
            return True
        digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
        if digest in seen:
            return False
        seen.add(digest)
        return True

    out = work / "corpora"
    out.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    for split in SPLITS:
        rows: dict[str, list[Passage]] = {source.domain: [] for source in sources}
        for source, name, text, committable in documents[split]:
            kept = [paragraph for paragraph in source.read(text) if is_new(paragraph)]
            if source.domain == "japanese":
                kept = [paragraph for paragraph in kept if _is_japanese(paragraph)]
            joiner = "\n\n" if source.domain == "code" else "\n"
            for passage in passages(kept, LONGEST[source.domain], joiner):
                rows[source.domain].append(Passage(passage, source.package, name, committable))
        for domain, found in rows.items():
            write_rows(out / f"{domain}.{split}.jsonl", [asdict(row) for row in found])
            for row in found:
                key = f"{row.source}.{split}"
                sizes[key] = sizes.get(key, 0) + len(row.text.encode())
    described = [
        {
            "domain": source.domain,
            "package": source.package,
            "licence": source.licence,
            "version": version(source.package, work),
            "bytes": {split: sizes.get(f"{source.package}.{split}", 0) for split in SPLITS},
        }
        for source in sources
    ]
    (out / "sources.json").write_text(json.dumps(described, indent=1) + "\n")


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """JSON lines, put in place only once complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
