"""Nodes to Recipe: every key is honoured or refused, and all problems are found in one pass.

Parameters are read for their shape only (scalar, gradient, filters); which ones a method has is
the business of `methods`, which reports through `Recipe.problem` so that both kinds of message
look the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merge_cli.errors import Problem
from merge_cli.recipe.keys import FP8, RECIPE_KEYS, SOURCE_KEYS, UNUSED_SEED
from merge_cli.recipe.models import ModelSections
from merge_cli.recipe.nodes import Node, without_empty
from merge_cli.recipe.output import parse_output
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.search import SEARCH_KEYS, Search, parse_search
from merge_cli.recipe.templates import AUTO, BUILT_IN, template_text
from merge_cli.recipe.tokenizer import parse_tokenizer


def parse_recipe(root: Node, file: str, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """Read one document.

    Returns:
        The recipe as far as it could be read (None if it has no shape at all) and every problem.
    """
    return _Parser(file, folder).recipe(root)


class _Parser(ModelSections):
    def recipe(self, root: Node) -> tuple[Recipe | None, list[Problem]]:
        if not isinstance(root.value, dict):
            self._add(root, "", "a recipe is a mapping of keys such as merge_method and models")
            return None, self.problems
        root = without_empty(root)
        top = self._mapping(root, "", RECIPE_KEYS)
        method = self._word(top.get("merge_method"), "merge_method")
        if top.get("merge_method", root).value is None or "merge_method" not in root.value:
            self._add(root, "merge_method", "missing", "`merge-cli methods` lists them.")
        given = [key for key in SOURCE_KEYS if key in root.value]
        if len(given) > 1:
            self._add(root, given[0], f"give either {' or '.join(given)}, not both")
        elif not given:
            self._add(root, "models", "missing", "List the sources under `models:`.")
        seed = self._seed(top)
        metadata = top.get("metadata")
        recipe = Recipe(
            merge_method=method or "",
            base_model=self._model(top.get("base_model"), "base_model"),
            models=tuple(
                self._source(node, f"models[{i}]", layers=False)
                for i, node in enumerate(self._list(top.get("models"), "models"))
            ),
            slices=tuple(
                self._slice(node, f"slices[{i}]")
                for i, node in enumerate(self._list(top.get("slices"), "slices"))
            ),
            modules=self._modules(top.get("modules")),
            parameters=self._parameters(top.get("parameters"), "parameters"),
            dtype=self._dtype(top.get("dtype"), "dtype"),
            out_dtype=self._dtype(top.get("out_dtype"), "out_dtype", (FP8,)),
            seed=seed,
            tokenizer=parse_tokenizer(
                top.get("tokenizer"),
                top.get("tokenizer_source"),
                self.folder,
                self._add,
                self.places,
            ),
            chat_template=self._chat_template(top.get("chat_template")),
            name=self._word(top.get("name"), "name"),
            training=self._training(top.get("training"), root),
            statistics=self._statistics(top.get("statistics")),
            coefficients=self._word(top.get("coefficients"), "coefficients"),
            inputs={k: str(v) for k, v in self._plain_mapping(top.get("inputs"), "inputs").items()},
            metadata=self._plain_mapping(metadata, "metadata"),
            eval=top.get("eval"),
            search=self._search(top.get("search")),
            objective=top.get("objective"),
            output=parse_output(top.get("output"), self._add),
            file=self.file,
            folder=self.folder,
            places=self.places,
            warnings=tuple(self.warnings),
        )
        return recipe, self.problems

    def _seed(self, top: Mapping[str, Node]) -> int:
        """`seed`; or `random_seed`, which stands in recipes that mergekit's users share."""
        given, other = top.get("seed"), top.get("random_seed")
        if other is not None and given is not None:
            self._ineffective("random_seed", UNUSED_SEED)
        if given is None and other is not None:
            return self._integer(other, "random_seed")
        return self._integer(given, "seed") if given is not None else 0

    def _search(self, node: Node | None) -> Search | None:
        if node is None or node.value is None:
            return None
        return parse_search(
            self._mapping(node, "search", SEARCH_KEYS),
            "search",
            lambda at, key, what, hint: self._add(at, key, what, hint),
        )

    def _chat_template(self, node: Node | None) -> str | None:
        word = self._word(node, "chat_template")
        if word is None or word == AUTO or node is None:
            return word
        text = template_text(word, self.folder)
        if text is None:
            what = f"no template of that name, and no such file: {word}."
            self._add(node, "chat_template", what, f"Use auto, {', '.join(BUILT_IN)}, or Jinja.")
        return text
