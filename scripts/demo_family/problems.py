"""The subjects of the demo's family: numbers in words, whose answers are known.

    forty-two = 42        zweiundvierzig = 42        quarante-deux = 42

Each number belongs to one split in all languages, by a draw with a fixed seed: a number of the test
rows has never been seen in training, in no language.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 7
LANGUAGES = ("english", "german", "french")
SUBJECTS = ("german", "french")
NUMBERS = range(1, 1000)
HELD_OUT = {"val": 150, "test": 250}

_ENGLISH = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen"""
_ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_GERMAN = """null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn
fünfzehn sechzehn siebzehn achtzehn neunzehn"""
_GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
_FRENCH = """zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze
seize dix-sept dix-huit dix-neuf"""
_FRENCH_TENS = "vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt"

Row = dict[str, str]


def english(number: int) -> str:
    """A number from 1 to 999 in English words."""
    small, tens_words = _ENGLISH.split(), _ENGLISH_TENS.split()
    hundreds, rest = divmod(number, 100)
    words = [f"{small[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        words.append(tens_words[tens - 2] + (f"-{small[ones]}" if ones else ""))
    elif rest:
        words.append(small[rest])
    return " ".join(words)


def german(number: int) -> str:
    """A number from 1 to 999 in German words."""
    small, tens_words = _GERMAN.split(), _GERMAN_TENS.split()
    hundreds, rest = divmod(number, 100)
    word = f"{small[hundreds]}hundert" if hundreds else ""
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        word += (f"{small[ones]}und" if ones else "") + tens_words[tens - 2]
    elif rest:
        word += "eins" if rest == 1 else small[rest]
    return word


def french(number: int) -> str:
    """A number from 1 to 999 in French words."""
    hundreds, rest = divmod(number, 100)
    words = []
    if hundreds:
        plural = "s" if hundreds > 1 and not rest else ""
        words.append(f"{_FRENCH.split()[hundreds]} cent{plural}" if hundreds > 1 else "cent")
    if rest:
        words.append(_french_below_100(rest))
    return " ".join(words)


def _french_below_100(number: int) -> str:
    small, tens_words = _FRENCH.split(), _FRENCH_TENS.split()
    if number < 20:
        return small[number]
    tens, ones = divmod(number, 10)
    word = tens_words[tens - 2]
    if tens in (7, 9):  # soixante-dix, quatre-vingt-dix: counted on from 60 and 80
        ones += 10
    if ones == 0:
        return f"{word}s" if tens == 8 else word
    joint = " et " if ones in (1, 11) and tens < 8 else "-"
    return f"{word}{joint}{small[ones]}"


WORDS = {"english": english, "german": german, "french": french}


def splits() -> dict[str, list[int]]:
    """The numbers of `train`, `val` and `test`, in the order of a fixed draw."""
    numbers = list(NUMBERS)
    random.Random(SEED).shuffle(numbers)
    parts = {}
    for split, count in HELD_OUT.items():
        parts[split], numbers = numbers[:count], numbers[count:]
    return {**parts, "train": numbers}


def rows(language: str, split: str) -> list[Row]:
    """Rows of a split, each with prompt and completion."""
    words = WORDS[language]
    return [{"prompt": f"{words(n)} =", "completion": f" {n}"} for n in splits()[split]]


def write(folder: Path) -> None:
    """Write train, val and test rows of both subjects as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for subject in SUBJECTS:
        for split in splits():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(subject, split)]
            (folder / f"{subject}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")
