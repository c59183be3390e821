"""The reader and the JSON Schema that is made from the same forms: what one refuses, so does the
other, and what one accepts, too."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from merge_cli.errors import MergeCliError, Problem, ProblemsError
from merge_cli.evaluation.parse import parse_eval, read_eval
from merge_cli.evolve.objectives import parse_objective
from merge_cli.json_schema import evaluation_schema, objective_schema, recipe_schema
from merge_cli.methods.registry import all_methods
from merge_cli.planning.method_checks import check_recipe
from merge_cli.recipe.load import parse_text
from tests.support.command import cli
from tests.support.paths import ROOT

CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs").glob("*/*.yaml")])

SOUP = "merge_method: soup\nmodels: [org/a, org/b]\n"
TIES = "merge_method: ties\nbase_model: org/base\nmodels: [org/a, org/b]\n"
DAM = "merge_method: dam\nbase_model: org/base\nmodels: [{model: org/a, data: x.jsonl}, org/b]\n"
REGMEAN = (
    "merge_method: regmean\nmodels: [{model: org/a, data: x.jsonl}, {model: b, data: x.jsonl}]\n"
)
SEARCH = (
    "merge_method: evolutionary\nbase_model: org/base\nmodels: [org/a, org/b]\n"
    "objective: [{task: loss, data: x.jsonl}]\n"
)
JUDGED = (
    "merge_method: evolutionary\nbase_model: org/base\nmodels: [org/a, org/b]\n"
    "search: {method: ties, parameters: {weight: {min: 0, max: 1}}}\n"
)
RANGE = "method: ties, parameters: {weight: {min: 0, max: 1}}"
TASK = "{task: loss, data: x.jsonl}"

# What follows each beginning is wrong.
MISTAKES: dict[str, list[str]] = {
    SOUP: [
        "dtyp: float16",
        "dtype: bf16",
        "dtype: 3",
        "dtype: fp8",
        "out_dtype: float8",
        "seed: -1",
        "engine: dask",
        "engine: [ray]",
        "seed: one",
        "random_seed: -1",
        "name: [a]",
        "metadata: [a]",
        "inputs: [a]",
        "base_model: 3",
        "base_model: {pat: a}",
        "base_model: {path: a, revison: b}",
        "base_model: {path: 3}",
        "base_model: {model: {path: a}, lorra: b}",
        "base_model: {path: a, lora: 3}",
        "chat_template: chatmll",
        "chat_template: 3",
        "parameters: [a]",
        "parameters: {wieght: 1}",
        "parameters: {weight: {filter: a}}",
        "parameters: {weight: {filter: a, valu: 1}}",
        "parameters: {weight: []}",
        "parameters: {weight: [{value: 1, filter: 3}]}",
        "parameters: {weight: many}",
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
        "genome: {}",
        "experts: []",
        "tokenizer_source: 3",
        "tokenizer: 3",
        "tokenizer: {sorce: union}",
        "tokenizer: {source: 3}",
        "tokenizer: {pad_to_multiple_of: 0}",
        "tokenizer: {pad_to_multiple_of: many}",
        "tokenizer: {truncate: 3}",
        "tokenizer: {truncate: true, source: base}",
        "tokenizer: {tokens: [a]}",
        "tokenizer: {tokens: {<s>: a}}",
        "tokenizer: {tokens: {<s>: {sorce: a}}}",
        "tokenizer: {tokens: {<s>: {source: a, force: 3}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: zeros}}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: zero, model: a}}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: model_token, model: a}}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: model_token, token: a}}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: model_token, model: a, token_id: -1}}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: model_token, model: a, token: 3}}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: model_token, model: a, tokn: b}}}}",
        "output: adaptr",
        "output: {adaptr: {}}",
        "output: {adapter: 3}",
        "output: {adapter: {rnk: 3}}",
        "output: {adapter: {rank: 0}}",
        "output: {adapter: {energy: 1.5}}",
        "output: {adapter: {energy: 0}}",
        "eval: 3",
        "eval: []",
        "eval: {tasks: []}",
        "eval: {tasks: [3]}",
        "eval: [{task: los, data: x.jsonl}]",
        "eval: [{data: x.jsonl}]",
        "eval: [{task: loss}]",
        "eval: [{task: loss, data: x.jsonl, strid: 3}]",
        "eval: [{task: loss, data: x.jsonl, stride: 0}]",
        "eval: [{task: loss, data: 3}]",
        "eval: [{task: loss, data: x.jsonl, name: 3}]",
        "eval: [{task: exact_match, data: x.jsonl, take: second}]",
        "eval: [{task: exact_match, data: x.jsonl, ignore_case: 3}]",
        "eval: [{task: exact_match, data: x.jsonl, stop: ''}]",
        "eval: [{task: exact_match, data: x.jsonl, stop: [3]}]",
        "eval: [{task: kl, data: x.jsonl}]",
        "eval: [{lm_eval: x, num_fewshot: -1}]",
        "eval: [{lm_eval: x, data: x.jsonl}]",
        "eval: [{python: 'x.py:f', better: more}]",
        f"eval: {{tasks: [{TASK}], sed: 3}}",
        f"eval: {{tasks: [{TASK}], seed: -3}}",
        f"eval: {{tasks: [{TASK}], max_length: 1}}",
        f"eval: {{tasks: [{TASK}], dtype: float64}}",
        f"eval: {{tasks: [{TASK}], limit: many}}",
    ],
    "merge_method: soup\n": [
        "models: 3",
        "models: []",
        "models: [3]",
        "models: ['']",
        "models: [{model: ''}]",
        "models: [{modell: a}]",
        "models: [{parameters: {weight: 1}}]",
        "models: [{model: a, parameters: 3}]",
        "models: [{model: a, parameters: {wieght: 3}}]",
        "models: [{model: a, datta: x.jsonl}]",
        "models: [{model: a, data: 3}]",
        "models: [{model: a, data: []}]",
        "models: [{model: a, data: {file: x.jsonl}}]",
        "models: [{model: a, data: {files: x.jsonl, dataset: b}}]",
        "models: [{model: a, data: {held_out: x.jsonl}}]",
        "models: [{model: a, data: {dataset: b, split: 3}}]",
        "slices: 3",
        "slices: [{}]",
        "slices: [{sources: []}]",
        "slices: [{sources: [a]}]",
        "slices: [{sources: [{model: a}]}]",
        "slices: [{sources: [{model: a, layer_range: 3}]}]",
        "slices: [{sources: [{model: a, layer_range: [0, 2, 3]}]}]",
        "slices: [{sources: [{model: a, layer_range: [-1, 2]}]}]",
        "slices: [{sources: [{model: a, layer_range: [0, many]}]}]",
        "slices: [{sorces: [{model: a, layer_range: [0, 2]}]}]",
        "slices: [{sources: [{model: a, layer_range: [0, 2], data: x.jsonl}]}]",
        "slices: [{sources: [{model: a, layer_range: [0, 2]}], parameters: 3}]",
        "modules: 3",
        "modules: {}",
        "modules: {text: 3}",
        "modules: {text: {}}",
        "modules: {text: {modells: [a]}}",
        "modules: {text: {models: [3]}}",
        "modules: {text: {models: [a], slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}}",
        "seed: 0",
    ],
    "models: [org/a, org/b]\n": ["merge_method: tise", "merge_method: 3", "seed: 0"],
    TIES: [
        "parameters: {normalise: true}",
        "parameters: {normalize: 3}",
        "parameters: {trim: models}",
        "parameters: {density: -0.1}",
        "parameters: {density: [0.1, -1]}",
        "parameters: {density: [{filter: mlp, value: -1}, 1]}",
        "parameters: {lambda: many}",
    ],
    DAM: [
        "statistics: kept",
        "training: 3",
        "training: {presett: dam}",
        "training: {preset: damm}",
        "training: {preset: 3}",
        "training: {rank: 0}",
        "training: {rank: 1.5}",
        "training: {rank: null}",
        "training: {granularity: rows}",
        "training: {granularity: {mlp: rows}}",
        "training: {granularity: {}}",
        "training: {start: worst}",
        "training: {start: true}",
        "training: {train: []}",
        "training: {train: 3}",
        "training: {loss: kll}",
        "training: {loss: {kll: 1}}",
        "training: {loss: {kl: -1}}",
        "training: {loss: {kl: much}}",
        "training: {regularize: cosin}",
        "training: {prompt_loss: 3}",
        "training: {top_k: 0}",
        "training: {top_k: all}",
        "training: {held_out: 0.95}",
        "training: {learning_rate: fast}",
        "training: {learning_rate: -1}",
        "training: {warmup: 2}",
        "training: {mofo_fraction: 0}",
        "training: {tokens: 0}",
        "training: {epochs: true}",
        "training: {clip_norm: -1}",
        "coefficients: 3",
    ],
    REGMEAN: [
        "statistics: 3",
        "statistics: ''",
        "statistics: [kept]",
        "statistics: {exampels: 3}",
        "statistics: {examples: 0}",
        "statistics: {examples: many}",
        "statistics: {examples: 2.5}",
        "statistics: {max_length: 1}",
        "statistics: {max_length: null}",
        "statistics: {dtype: bf16}",
        "statistics: {rounds: 0}",
    ],
    SEARCH: [
        "search: 3",
        f"search: {{{RANGE}, evaluation: 3}}",
        f"search: {{{RANGE}, evaluations: 0}}",
        f"search: {{{RANGE}, evaluations: many}}",
        f"search: {{{RANGE}, population: 1}}",
        f"search: {{{RANGE}, optimizer: cma}}",
        f"search: {{{RANGE}, sigma: 2}}",
        f"search: {{{RANGE}, layer_groups: 0}}",
        f"search: {{{RANGE}, layer_groups: []}}",
        f"search: {{{RANGE}, smooth: 3}}",
        f"search: {{{RANGE}, filters: 3}}",
        f"search: {{{RANGE}, filters: [mlp, mlp]}}",
        f"search: {{{RANGE}, fidelity: [0.5, 2.0]}}",
        f"search: {{{RANGE}, fidelity: 0.5}}",
        f"search: {{{RANGE}, start: 3}}",
        "search: {method: 3, parameters: {weight: {min: 0, max: 1}}}",
        "search: {method: tise, parameters: {weight: {min: 0, max: 1}}}",
        "search: {method: [ties, ties], parameters: {weight: {min: 0, max: 1}}}",
        "search: {method: ties, parameters: 3}",
        "search: {method: ties, parameters: {}}",
        "search: {method: ties, parameters: {weight: 3}}",
        "search: {method: ties, parameters: {weight: {min: 0}}}",
        "search: {method: ties, parameters: {weight: {min: 0, mx: 1}}}",
        "search: {method: ties, parameters: {weight: {min: 0, max: much}}}",
        "search: {method: ties, parameters: {weight: {min: 0, max: 1, log: 3}}}",
        "search: {method: ties, parameters: {weight: {min: 0, max: 1, integer: 3}}}",
        "search: {method: ties, parameters: {weight: {min: 0, max: 1, tied: rows}}}",
        "search: {method: ties, parameters: {weight: {choices: [1]}}}",
        "search: {method: ties, parameters: {weight: {choices: [1, 2], min: 0}}}",
        "search: {method: ties, parameters: {weight: {choices: [1, []]}}}",
    ],
    JUDGED: [
        "objective: 3",
        "objective: []",
        "objective: {tasks: []}",
        "objective: [3]",
        "objective: [{task: los, data: x.jsonl}]",
        "objective: [{task: loss}]",
        "objective: [{task: loss, data: x.jsonl, wieght: 3}]",
        "objective: [{task: loss, data: x.jsonl, weight: -3}]",
        "objective: [{task: loss, data: x.jsonl, weight: much}]",
        "objective: [{task: loss, data: x.jsonl, split: tset}]",
        "objective: [{task: loss, data: x.jsonl, goal: more}]",
        "objective: [{task: loss, data: x.jsonl, at_most: much}]",
        "objective: [{task: loss, data: x.jsonl, no_worse_than: best}]",
        "objective: [{task: loss, data: x.jsonl, margin: 0.1}]",
        "objective: [{task: loss, data: x.jsonl, metric: 3}]",
        f"objective: {{tasks: [{TASK}], sed: 3}}",
        f"objective: {{tasks: [{TASK}], max_length: 0}}",
    ],
}

# And what follows here is right.
RIGHT: dict[str, list[str]] = {
    SOUP: [
        "dtype: bfloat16",
        "dtype: torch.float16",
        "out_dtype: fp8",
        "seed: 3",
        "random_seed: 3",
        "name: org/merged",
        "metadata: {license: mit, tags: [a, {b: 3}]}",
        "inputs: {org/a: abc}",
        "base_model: {path: org/a, revision: v1, lora: org/l@v2}",
        "base_model: {model: {path: org/a}, lora: {path: org/l}}",
        "chat_template: chatml",
        "chat_template: '{{ messages }}'",
        "int8_mask: true",
        "parameters: {weight: 0.5, normalize: true, int8_mask: true, density: 0.3}",
        "parameters: {weight: 1e-3}",
        "parameters: {weight: [0, 0.5, 1]}",
        "parameters: {weight: {filter: mlp, value: 0.5}}",
        "parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}",
        "parameters: {weight: [{filter: mlp, value: 0.5}, 1]}",
        "parameters: {normalize: 1.0}",
        "tokenizer_source: union",
        "tokenizer: org/a",
        "tokenizer: {truncate: true}",
        "tokenizer: {source: {path: org/a}, pad_to_multiple_of: 64}",
        "tokenizer: {tokens: {<s>: {source: org/a, force: true}, <p>: {source: {kind: zero}}}}",
        "tokenizer: {tokens: {<s>: {source: {kind: model_token, model: a, token_id: 3}}, <p>: }}",
        "output: adapter",
        "output: model",
        "output: {adapter: {rank: 16, energy: 0.9}}",
        "eval: [{task: loss, data: x.jsonl, stride: 8}]",
        "eval: [{lm_eval: gsm8k, num_fewshot: 0}]",
        "eval: [{task: lm_eval, lm_eval: gsm8k}]",
        "eval: [{python: 'f.py:f', better: lower}]",
        "eval: [{task: exact_match, data: x.jsonl, stop: [a, b], take: last}]",
        "eval: [{task: kl, data: x.jsonl, teacher: org/a, top_k: 8}]",
        f"eval: {{tasks: [{TASK}], seed: 3, limit: 5, dtype: float16}}",
    ],
    "merge_method: soup\n": [
        "models: [{model: a, parameters: {weight: 0.3}, layer_range: [0, 2]}]",
        "slices: [{sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}]}]",
        "slices: [{sources: [{model: a, layer_range: [0, 2]}], parameters: {normalize: false}}]",
        "modules: {text: {models: [a, b], parameters: {weight: 1}}}",
        "modules: {text: {slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}}",
    ],
    TIES: [
        "parameters: {lambda: 0.3, density: 3, normalize: 'yes'}",
        "parameters: {semantics: paper}",
    ],
    DAM: [
        "training: {}",
        "training: {preset: dam, top_k: full, tokens: null, learning_rate: 1e-3}",
        "training: {granularity: {mlp: row, '*': tensor}, loss: {kl: 1, entropy: 0.1}}",
        "training: {granularity: element, loss: mse, regularize: l2, train: linear, start: 0.3}",
        "statistics: {examples: 96, max_length: 128, batch_tokens: 64, targets: sampled}",
        "training: {regularize: null, clip_norm: 1, train: [mlp, attn]}",
    ],
    "merge_method: dam\n": [
        "models: [{model: a, data: [x.jsonl]}]",
        "models: [{model: a, data: {files: x.jsonl, held_out: [x.jsonl]}}]",
        "models: [{model: a, data: {dataset: org/d, config: en, split: train, revision: v1}}]",
    ],
    REGMEAN: [
        "statistics: {examples: null, max_length: 64, dtype: bfloat16, rounds: 2}",
        "statistics: .",
    ],
    SEARCH: [
        f"search: {{{RANGE}, layer_groups: [1, 2], smooth: true, filters: mlp, population: null}}",
        f"search: {{{RANGE}, fidelity: [0.25, 0.5], keep: 0.3, start: softmax, temperature: 2}}",
        "search: {method: [ties, dare_ties], parameters: {density: {min: 1e-2, max: 1, log: true, "
        "tied: [models, layers]}, elect: {choices: [weighted, unweighted], tied: layers}}}",
    ],
    JUDGED: [
        "objective: [{task: loss, data: x.jsonl, weight: 2, goal: min, at_most: 3, metric: loss}]",
        "objective: [{task: loss, data: x.jsonl, no_worse_than: base, margin: 0.1}]",
        f"objective: {{tasks: [{TASK}], seed: 3, max_length: 64}}",
    ],
}  # fmt: skip


def cases(table: dict[str, list[str]]) -> list[str]:
    return [f"{start}{end}\n" for start, ends in table.items() for end in ends]


@cache
def recipes() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("recipes")
    (result / "x.jsonl").write_text('{"text": "a"}\n')
    return result


def problems(text: str, folder: Path) -> list[Problem]:
    """Everything that is said of a recipe before a model is looked at."""
    recipe, result = parse_text(text, "r.yaml", folder)
    assert recipe is not None
    result = [*result, *check_recipe(recipe).problems]
    try:
        if recipe.eval is not None:
            parse_eval(recipe.eval, "r.yaml", folder)
        if recipe.objective is not None:
            parse_objective(recipe)
    except ProblemsError as error:
        result += error.problems
    return result


@pytest.mark.parametrize("text", cases(MISTAKES), ids=lambda text: text.splitlines()[-1])
def test_mistakes_are_refused_by_the_reader_and_by_the_schema(text: str, folder: Path) -> None:
    found = problems(text, folder)
    assert found
    assert all(problem.line and problem.column for problem in found), found
    assert not recipes().is_valid(yaml.safe_load(text))


@pytest.mark.parametrize("text", cases(RIGHT), ids=lambda text: text.splitlines()[-1])
def test_what_is_right_is_accepted_by_the_reader_and_by_the_schema(text: str, folder: Path) -> None:
    assert not problems(text, folder)
    recipes().validate(yaml.safe_load(text))


def test_the_schemas_are_schemas() -> None:
    for schema in (recipe_schema(), evaluation_schema(), objective_schema()):
        Draft202012Validator.check_schema(schema)
        text = json.dumps(schema)
        for name in re.findall(r'"#/\$defs/([^"]+)"', text):
            assert name in schema["$defs"], name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_recipes_that_come_with_the_package_are_valid(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        recipes().validate(document)


def test_what_the_documentation_shows_is_valid() -> None:
    shown = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        # All fences in one pass: the end of one block must not be read as the start of another.
        text = page.read_text(encoding="utf-8")
        for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
            for document in yaml.safe_load_all(body) if kind == "yaml" else ():
                if isinstance(document, dict) and "merge_method" in document:
                    recipes().validate(document)
                elif isinstance(document, dict) and "tasks" in document:
                    Draft202012Validator(evaluation_schema()).validate(document)
                else:
                    continue
                shown += 1
    assert shown > 10


def test_every_parameter_of_every_method_is_offered_with_its_description() -> None:
    definitions = recipe_schema()["$defs"]
    for method in all_methods():
        for name, parameter in method.parameters.items():
            keys = [f"parameters.{method.name}"]
            keys += [f"{keys[0]}.model"] if parameter.per_model else []
            for key in keys:
                assert definitions[key]["properties"][name]["description"] == parameter.doc
            if not parameter.per_model:
                assert name not in definitions[f"{keys[0]}.model"]["properties"]


def described(schema: Any, path: str = "$") -> list[str]:
    """The keys of a schema that have no description."""
    missing = []
    if isinstance(schema, dict):
        for name, about in schema.get("properties", {}).items():
            if isinstance(about, dict) and "description" not in about and about.get("type"):
                missing.append(f"{path}.{name}")
        for name, child in schema.items():
            missing += described(child, f"{path}.{name}")
    elif isinstance(schema, list):
        missing = [
            item for i, child in enumerate(schema) for item in described(child, f"{path}[{i}]")
        ]
    return missing


def test_every_key_has_a_description() -> None:
    for schema in (recipe_schema(), evaluation_schema(), objective_schema()):
        assert not described({name: schema[name] for name in schema if name != "allOf"})


def test_evaluation_files(folder: Path) -> None:
    validator = Draft202012Validator(evaluation_schema())
    for text, right in (
        (f"tasks: [{TASK}]", True),
        (f"[{TASK}]", True),
        (f"tasks: [{TASK}]\nsed: 3", False),
        ("tasks: [{task: loss, data: x.jsonl, wieght: 3}]", False),
        ("tasks: [{task: loss, data: x.jsonl, weight: 3}]", False),  # of an objective's tasks
        ("tasks: []", False),
        ("seed: 3", False),
    ):
        path = folder / "eval.yaml"
        path.write_text(text)
        assert validator.is_valid(yaml.safe_load(text)) is right, text
        if right:
            read_eval(path)
        else:
            with pytest.raises(MergeCliError):
                read_eval(path)


def test_objectives() -> None:
    validator = Draft202012Validator(objective_schema())
    assert validator.is_valid(yaml.safe_load("[{task: loss, data: x.jsonl, weight: 3}]"))
    assert not validator.is_valid(yaml.safe_load("[{task: loss, data: x.jsonl, wieght: 3}]"))


def test_the_command_prints_them() -> None:
    for flags, schema in (
        ((), recipe_schema()),
        (("--eval",), evaluation_schema()),
        (("--objective",), objective_schema()),
    ):
        assert json.loads(cli("schema", *flags).stdout) == schema
    both = cli("schema", "--eval", "--objective")
    assert both.returncode == 2
    assert "exclude each other" in both.stderr


def test_a_line_for_editors_is_a_comment_to_the_reader(folder: Path) -> None:
    line = "# yaml-language-server: $schema=./merge-cli.schema.json\n"
    assert not problems(line + SOUP, folder)


def test_all_mistakes_of_a_file_are_told_at_once(folder: Path) -> None:
    text = (
        "merge_method: dam\nmodels: [{modell: a}, {model: b, data: {fils: x.jsonl}}]\n"
        "training: {rnk: 3, epochs: 0}\ntokenizer: {sorce: a}\nseed: -1\n"
    )
    keys = {problem.key for problem in problems(text, folder)}
    assert keys >= {
        "models[0].modell", "models[0].model", "models[1].data.fils", "training.rnk",
        "training.epochs", "tokenizer.sorce", "seed",
    }  # fmt: skip
