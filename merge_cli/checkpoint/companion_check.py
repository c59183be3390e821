"""Whether the files that are copied beside the weights can be read by whoever loads the model.

A broken one is copied byte for byte otherwise, and the output that carries it does not load.
"""

from __future__ import annotations

from merge_cli.checkpoint.files import companion_files, is_tokenizer_file
from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.tokenizer_files import settings_json
from merge_cli.errors import CorruptFileError
from merge_cli.guarded import kind_of, read_json

# Larger ones are vocabularies: a second to read, and read where they are used.
_SMALL = 2**20
_LISTS = ("modules.json",)


def check_companions(donor: Source, tokenizer_donor: Source) -> None:
    """Read the small JSON files that a merge copies.

    Raises:
        CorruptFileError: one that is no JSON, or not of the kind that its name promises.
    """
    settings_json(tokenizer_donor)
    for source, tokenizer in ((donor, False), (tokenizer_donor, True)):
        if not source.root.is_dir():
            continue  # still to be made, or a base of zeros: nothing is copied from it
        for path in companion_files(source.root):
            chosen = is_tokenizer_file(path.name) is tokenizer and path.suffix == ".json"
            if not chosen or path.stat().st_size > _SMALL:
                continue
            found = read_json(path, source.label)
            if not isinstance(found, dict) and path.name not in _LISTS:
                what = f"is not a mapping but {kind_of(found)}"
                raise CorruptFileError(what, model=source.label, file=path.name)
