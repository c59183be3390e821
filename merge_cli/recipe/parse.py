"""The keys of a recipe, and a document read into a Recipe: every key is honoured or refused.

All problems are found in one look. Which parameters a method has is the business of `planning`,
which reports through `Recipe.problem` so that both kinds of message look the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import Problem
from merge_cli.recipe.automatic import BUDGET, METHODS
from merge_cli.recipe.checkpoints import CHECKPOINTS, METHOD, expand
from merge_cli.recipe.fields import CODES, DTYPES, FP8, SOURCE_KEYS, UNUSED_SEED, nearest
from merge_cli.recipe.forms import Anything, Plain, Text
from merge_cli.recipe.models import MODEL
from merge_cli.recipe.nodes import Node, without_empty
from merge_cli.recipe.output import OutputForm
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.schedule import SCHEDULE
from merge_cli.recipe.schema import Engine, Recipe
from merge_cli.recipe.search import SEARCH, Search
from merge_cli.recipe.sections import PASSED_BY, Key, Section
from merge_cli.recipe.sources import MODELS, PARAMETERS, SLICES, ModulesForm
from merge_cli.recipe.statistics import StatisticsForm
from merge_cli.recipe.sweep import SWEEP, SweepForm
from merge_cli.recipe.tokenizer import TemplateForm, TokenizerForm, TokenizerSpec
from merge_cli.recipe.training import Training, contradictions
from merge_cli.recipe.training_presets import TRAINING

_FP8_NAMES = ("fp8", "float8", "float8_e4m3fn", "fp8_e4m3", "e4m3")


# What else people call them; in torch, `float` and `half` are these.
_SHORT = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16",
    "fp32": "float32", "f32": "float32", "float": "float32", "single": "float32",
    "fp64": "float64", "f64": "float64", "double": "float64",
}  # fmt: skip


@dataclass(frozen=True)
class DtypeForm(Form):
    """A dtype by its name in torch, with or without `torch.`; `more` are other words."""

    more: tuple[str, ...] = ()

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        word = Text().read(node, key, reader)
        if word is REFUSED:
            return REFUSED
        name = word.removeprefix("torch.")
        dtypes = (*DTYPES, *self.more)
        if name in dtypes:
            return name
        hint = nearest(name, dtypes)
        if name.lower() in _SHORT:
            hint = f"Did you mean '{_SHORT[name.lower()]}'?"
        code = FP8 if name in _FP8_NAMES else name
        if code in CODES:
            hint = f"Write `out_dtype: {code}`; `dtype` is of everything that stays as it is."
        return reader.refuse(node, key, f"unknown dtype '{word}'.", hint)

    def schema(self) -> Schema:
        # Editors offer the short names; the long ones are read, too.
        return {
            "anyOf": [{"enum": [*DTYPES, *self.more]}, {"enum": [f"torch.{d}" for d in DTYPES]}]
        }


@dataclass(frozen=True)
class PlainMapping(Form):
    """A mapping of anything, which is kept as it is."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        plain = node.plain()
        return plain if isinstance(plain, dict) else reader.refuse(node, key, "must be a mapping")

    def schema(self) -> Schema:
        return {"type": "object"}


_SEED = Plain(int, 0)
RECIPE = Section(
    {
        "merge_method": Key(
            Text(), "how the models are merged", None, True, "`merge-cli methods` lists them."
        ),
        "base_model": Key(MODEL, "the model that the others were made from"),
        "models": MODELS,
        "slices": SLICES,
        "modules": Key(ModulesForm(), "parts of a multimodal model, each merged by itself"),
        "checkpoints": Key(
            CHECKPOINTS, "a window of a training run, instead of models (checkpoint_average)"
        ),
        "schedule": Key(
            SCHEDULE, "the learning-rate decay that the window stands for; default constant"
        ),
        "parameters": Key(PARAMETERS, "the method's parameters, for all models"),
        "dtype": Key(DtypeForm(), "stored dtype of the output; default each tensor's own"),
        "out_dtype": Key(
            DtypeForm(CODES),
            "takes precedence over `dtype`; codes (fp8, int4, ...) are of matrices of layers; "
            "same keeps each tensor's format",
        ),
        "seed": Key(_SEED, "seed of random masks, samples and splits", 0),
        "random_seed": Key(_SEED, "mergekit's name of `seed`"),
        "tokenizer_source": Key(Text(), "the same as `tokenizer: {source: ...}`"),
        "tokenizer": Key(TokenizerForm(), "the output's vocabulary; default the base's"),
        "chat_template": Key(
            TemplateForm(), "auto, a built-in name, a .jinja file beside the recipe, or Jinja"
        ),
        "name": Key(Text(), "the name by which other documents of the file use the result"),
        "metadata": Key(PlainMapping(), "anything, kept in the resolved recipe"),
        "training": Key(TRAINING, "how coefficients are learned (dam)"),
        "statistics": Key(
            StatisticsForm(),
            "how examples are measured first (regmean, fisher), or a folder of what was measured",
        ),
        "coefficients": Key(Text(), "a file of learned coefficients to merge with"),
        "inputs": Key(
            PlainMapping(), "in a resolved recipe: the models' fingerprints, which must match"
        ),
        "eval": Key(Anything(lambda: {"$ref": "#/$defs/evaluation"}), "tasks for the result"),
        "search": Key(SEARCH, "which parameters are searched, and how (evolutionary)"),
        "objective": Key(
            Anything(lambda: {"$ref": "#/$defs/objective"}), "tasks that candidates are judged by"
        ),
        "budget": Key(BUDGET, "what trying methods may cost (auto); default no limit"),
        "methods": Key(METHODS, "the methods that are tried (auto); default all that it knows"),
        SWEEP: Key(SweepForm(), "variants that are merged in one pass, by name (OUT/NAME)"),
        "output": Key(OutputForm(), "adapter merges adapters into an adapter", "model"),
        "engine": Key(
            Plain(Engine),
            "what merges: this machine, or the Ray cluster of RAY_ADDRESS or of this machine",
            "local",
        ),
    },
    rules={"oneOf": [{"required": [key]} for key in SOURCE_KEYS], **PASSED_BY},
)


def parse_recipe(root: Node, file: str, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """Read one document.

    Returns:
        The recipe as far as it could be read (None if it has no shape at all) and every problem.
    """
    reader = Reader(file, folder)
    if not isinstance(root.value, dict):
        reader.refuse(root, "", "a recipe is a mapping of keys such as merge_method and models")
        return None, reader.problems
    root = without_empty(root)
    values = RECIPE.read(root, "", reader)
    values.pop(SWEEP, None)  # its variants are documents by now (load.py)
    _check_sources(root, reader)
    expand(values, root, reader)
    values["seed"] = _seed(values, root, reader)
    values["merge_method"] = values.get("merge_method", "")
    values["inputs"] = {name: str(value) for name, value in values.get("inputs", {}).items()}
    source = values.pop("tokenizer_source", None)
    if "tokenizer_source" in root.value:
        if "tokenizer" in root.value:
            message = "stands beside `tokenizer`."
            node = root.value["tokenizer_source"]
            reader.refuse(node, "tokenizer_source", message, "Leave one of them out.")
        values["tokenizer"] = TokenizerSpec(source) if source else None
    if isinstance(values.get("statistics"), str):
        values["statistics_folder"] = values.pop("statistics")
    if "search" in root.value:
        values.setdefault("search", Search())  # so that nobody says that the section is missing
    if "training" in values:
        _check_training(values["training"], root, reader)
    if values.get("engine") == "ray" and values.get("output") is not None:
        message = "adapters are small: they are merged on one machine."
        reader.refuse(root.value["engine"], "engine", message, "Leave it out.")
    return Recipe(
        **values,
        file=file,
        folder=folder,
        positions=reader.positions,
        warnings=tuple(reader.warnings),
    ), reader.problems


def _check_sources(root: Node, reader: Reader) -> None:
    """One of models, slices and modules."""
    given = [key for key in SOURCE_KEYS if key in root.value]
    if len(given) > 1:
        reader.refuse(root, given[0], f"give either {' or '.join(given)}, not both")
    elif not given and root.value.get("merge_method", root).value != METHOD:
        reader.refuse(root, "models", "missing", "List the sources under `models:`.")


def _seed(values: dict[str, Any], root: Node, reader: Reader) -> int:
    """`seed`; or `random_seed`, which stands in recipes that mergekit's users share."""
    other = values.pop("random_seed", 0)
    if "seed" in root.value and "random_seed" in root.value:
        reader.warn("random_seed", UNUSED_SEED)
    seed: int = values.get("seed", 0) if "seed" in root.value else other
    return seed


def _check_training(training: Training, root: Node, reader: Reader) -> None:
    """Options that do not go together, told where they stand."""
    section, listed = root.value["training"], root.value.get("models")
    count = len(listed.value) if listed and isinstance(listed.value, list) else 0
    for name, message, hint in contradictions(training, count):
        reader.refuse(section.value.get(name, section), f"training.{name}", message, hint)
