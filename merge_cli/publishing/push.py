"""Pushing a merged model to the Hub: the large files first, then one commit with everything.

An address is a store's: `store` uploads there.

So the repository has the old model or the new one, and never a mixture. Uploaded files are
recognised by their content: after an interruption the same command sends the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import CARD
from merge_cli.errors import CorruptFileError, HubError, UsageError
from merge_cli.hub.errors import LOGIN, explained_upload
from merge_cli.options import OnProgress, Progress, ignore_progress
from merge_cli.publishing.package import REPORT, Package, pack
from merge_cli.publishing.store import upload
from merge_cli.recipe.reference import is_address
from merge_cli.sources.storage import INDEX

MAIN = "main"


@dataclass(frozen=True)
class Pushed:
    """A finished upload.

    Attributes:
        repo_id: `owner/name`, or the address of a store; that has no branch and no commit.
        url: the repository's page, at the branch.
        commit: the branch's head afterwards.
        changed: False where the branch had all files already.
        removed: weights of an earlier model that this commit has removed.
    """

    repo_id: str
    branch: str
    url: str
    commit: str
    private: bool
    created: bool
    changed: bool
    files: dict[str, int]
    removed: tuple[str, ...]


def push(
    out: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    branch: str = MAIN,
    message: str = "",
    overwrite: bool = False,
    bars: bool = False,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Upload the merged model in the folder `out` to a model repository; create it if needed.

    Args:
        repo_id: `owner/name`; or the address of a folder in a store (see `store.upload`).
        public: the repository's visibility; an existing one must have the same.
        branch: created from main if it does not exist.
        message: of the commit.
        overwrite: replace another model in the repository.
        bars: show huggingface_hub's progress bars.
        on_progress: called after each file.

    Raises:
        SourceError, CorruptFileError: `out` is not a finished merge.
        UsageError: the repository has the other visibility, or holds another model.
        HubError: no token, no right, no connection. The same call resumes.
    """
    on_progress = on_progress or ignore_progress
    check_name(repo_id)
    if is_address(repo_id):
        refuse_hub_options(repo_id, public=public, branch=branch, message=message)
        stored = upload(out, repo_id, overwrite=overwrite, on_progress=on_progress)
        changed, url = bool(stored.sent or stored.removed), stored.address
        return Pushed(url, "", url, "", False, False, changed, stored.files, stored.removed)
    package = pack(Path(out), repo_id)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if not get_token():
        raise HubError("there is no token to upload with", model=repo_id, hint=LOGIN)
    api = HfApi(library_name="merge-cli", library_version=version("merge-cli"))
    with _bars(bars):
        _check_card(package, repo_id)
        with explained_upload(repo_id):
            created = _repository(api, repo_id, public)
            _branch(api, repo_id, branch)
            head = api.model_info(repo_id, revision=branch, files_metadata=True)
        remote_files = {file.rfilename: file for file in head.siblings or []}
        stale = _stale(package, remote_files, repo_id, overwrite)
        with explained_upload(repo_id):
            additions = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=package.content(name))
                for name in package.files
            ]
        sent = 0
        for addition in additions:
            name = addition.path_in_repo
            with explained_upload(repo_id, name):
                # Small files go with the commit: this does nothing for them.
                api.preupload_lfs_files(
                    repo_id, [addition], revision=branch, free_memory=False, num_threads=1
                )
            sent += package.files[name]
            on_progress(Progress("upload", sent, package.size, name))
        operations = [*additions, *(CommitOperationDelete(path_in_repo=n) for n in stale)]
        with explained_upload(repo_id):
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=message or _message(package),
                revision=branch,
                parent_commit=head.sha,
            )
    page = f"{api.endpoint}/{repo_id}"
    return Pushed(
        repo_id,
        branch,
        page if branch == MAIN else f"{page}/tree/{branch}",
        commit.oid,
        not public,
        created,
        commit.oid != head.sha,
        package.files,
        tuple(stale),
    )


def check_name(repo_id: str) -> None:
    """Refuse an invalid repository name, before any work.

    Raises:
        UsageError: not `owner/name`, and no address.
    """
    if is_address(repo_id):
        return
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            "not a valid name on the Hub", where=repr(repo_id), hint="Write owner/name."
        ) from error
    if "/" not in repo_id:
        hint = f"Write owner/name: your-name/{repo_id}."
        raise UsageError("the repository's owner is missing", where=repo_id, hint=hint)


def refuse_hub_options(address: str, *, public: bool, branch: str, message: str) -> None:
    """Raise for options that a store has not.

    Raises:
        UsageError: names the first one.
    """
    given = {"--public": public, "--branch": branch != MAIN, "--message": bool(message)}
    flag = next((flag for flag, is_given in given.items() if is_given), None)
    if flag is not None:
        raise UsageError(f"{flag} is for the Hub: a store has no such thing", where=address)


def _repository(api: Any, repo_id: str, public: bool) -> bool:
    """Make sure that the repository exists with this visibility; whether it is new."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public)
        return True
    if not info.private and not public:
        hint = "Give --public to upload there all the same, or name another repository."
        raise UsageError(
            "the repository exists, and everybody can read it", where=repo_id, hint=hint
        )
    if info.private and public:
        hint = "Leave out --public, or make it public in its settings on the Hub first."
        raise UsageError("the repository exists and is private", where=repo_id, hint=hint)
    return False


def _branch(api: Any, repo_id: str, branch: str) -> None:
    if branch == MAIN:
        return
    refs = api.list_repo_refs(repo_id)
    if branch in {tag.name for tag in refs.tags}:
        raise UsageError(
            f"'{branch}' is a tag, and tags do not move", where=repo_id, hint="Name a branch."
        )
    if branch not in {existing.name for existing in refs.branches}:
        api.create_branch(repo_id, branch=branch)


def _check_card(package: Package, repo_id: str) -> None:
    """Let the Hub check the card, before gigabytes are sent.

    Raises:
        CorruptFileError: the metadata is invalid.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    # As ModelCard.validate does, which ignores HF_ENDPOINT before 2.0.
    address = f"{constants.ENDPOINT}/api/validate-yaml"
    payload = {"repoType": "model", "content": package.card}
    with explained_upload(repo_id, CARD):
        answer = get_session().post(address, json=payload, headers={"Accept": "text/plain"})
        if answer.status_code == 400:
            message = f"the Hub refuses its metadata: {_reasons(answer.text)}"
            hint = "Correct the lines between the first two ---."
            raise CorruptFileError(message, model=str(package.folder), file=CARD, hint=hint)
        hf_raise_for_status(answer)


def _reasons(answer: str) -> str:
    """The messages in the Hub's answer; the answer itself where it has none."""
    try:
        messages = [str(error["message"]) for error in json.loads(answer)["errors"]]
    except (ValueError, KeyError, TypeError):
        return answer
    return "; ".join(messages) or answer


def _stale(
    package: Package, remote_files: Mapping[str, Any], repo_id: str, overwrite: bool
) -> list[str]:
    """Weights on the branch that are not this model's, and would be loaded with it.

    Raises:
        UsageError: the branch has another model, and `overwrite` is not set.
    """
    weights = [name for name in remote_files if _is_weight(name)]
    if weights and not overwrite and not _same_merge(package, remote_files):
        hint = "--overwrite replaces it (its history stays); or name another, or a --branch."
        raise UsageError("holds another model", where=repo_id, hint=hint)
    return sorted(name for name in weights if name not in package.files)


def _is_weight(name: str) -> bool:
    """Weights that transformers would look for, and the index that says where they are."""
    if "/" in name:
        return False
    return name.endswith(".safetensors") or name == INDEX or name.startswith("pytorch_model")


def _same_merge(package: Package, remote_files: Mapping[str, Any]) -> bool:
    """Whether the branch has this merge: the reports are the same file."""
    remote_report = remote_files.get(REPORT)
    if remote_report is None:
        return False
    data = (package.folder / REPORT).read_bytes()
    if remote_report.lfs is not None:
        return bool(remote_report.lfs.sha256 == hashlib.sha256(data).hexdigest())
    return bool(remote_report.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _message(package: Package) -> str:
    report = json.loads((package.folder / REPORT).read_text(encoding="utf-8"))
    return f"{report['recipe']['method']} merge by merge-cli {report['merge_cli']}"


@contextmanager
def _bars(enabled: bool) -> Iterator[None]:
    """Show huggingface_hub's progress bars or not; hide its other output."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, hide = logging.get_verbosity(), not enabled and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()
