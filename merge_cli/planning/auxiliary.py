"""The files beside a model's weights, as a plan has decided them: config, index, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from merge_cli.checkpoint.auxiliary_files import code_files, copy_companions
from merge_cli.checkpoint.layout import indexes
from merge_cli.planning.plan import Plan, outputs_of
from merge_cli.sources.source import fetch_weights
from merge_cli.system.raw_io import write_error
from merge_cli.system.untrusted import plain_json
from merge_cli.tokenizer.chat_template import without_template
from merge_cli.tokenizer.files import TEMPLATES
from merge_cli.tokenizer.renumbering import renumber


def write_auxiliary_files(
    plan: Plan, folder: Path, *, tokenizer: bool = True, code: bool = False
) -> None:
    """config.json, the index, tokenizer and processor files.

    Args:
        tokenizer: whether to write tokenizer files.
        code: whether to copy the Python files of the model that config.json is from.

    Raises:
        HubError: those cannot be downloaded.
        ResourceError: a file cannot be written.
    """
    config_source, tokenizer_source = (
        plan.sources[plan.config_index],
        plan.sources[plan.tokenizer_index],
    )
    if code and config_source.repository is not None:
        fetch_weights(config_source, code_files(config_source.repository.files))
    try:
        copy_companions(
            config_source.root,
            tokenizer_source.root if tokenizer else None,
            folder,
            code=code,
        )
        _write_tokenizer(plan, folder, copied=tokenizer)
        if plan.config:
            _write_config(plan, config_source.root / "config.json", folder / "config.json")
        outputs = outputs_of(plan.tasks)
        for name, text in indexes(plan.shards, outputs, config_source.stems).items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(error, folder) from error


def _write_tokenizer(plan: Plan, folder: Path, *, copied: bool) -> None:
    """What is not as in its source: a joined vocabulary, a template, token numbers."""
    if copied:
        for name, content in plan.aligned.files.items():
            (folder / name).write_bytes(content)
        templates = plan.templates.files()
        if templates:
            shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
            if plan.templates.named:  # transformers refuses that file beside such a folder
                (folder / "chat_template.json").unlink(missing_ok=True)
            for name, text in templates.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")
            config = without_template(folder / "tokenizer_config.json")
            if config is not None:
                (folder / "tokenizer_config.json").write_bytes(config)
    settings = folder / "generation_config.json"
    if plan.aligned.ids is not None and settings.is_file():
        result = renumber(json.loads(settings.read_text(encoding="utf-8")), plan.aligned)
        settings.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _write_config(plan: Plan, source: Path, target: Path) -> None:
    """The source's bytes where nothing changed."""
    content = plain_json(source.read_bytes())
    if plan.config == json.loads(content):
        target.write_bytes(content)
    else:
        text = json.dumps(dict(plan.config), indent=2, ensure_ascii=False) + "\n"
        target.write_text(text, encoding="utf-8")
