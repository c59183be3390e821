"""What the Hub, or the way to it, has against an upload: one sentence and what to do.

Like `checkpoint.hub_errors`, which speaks of downloads. Tokens are never part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from merge_cli.errors import HubError, MergeCliError

LOGIN = "Log in with a token that may write: hf auth login, or set HF_TOKEN."
_AGAIN = "Run the same command again: what is uploaded is kept."


@contextmanager
def explained_upload(repo_id: str, file: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except MergeCliError:
        raise
    except UnicodeError as error:  # the exception quotes the token: it must not be passed on
        what = f"the Hub's token is not valid ({type(error).__name__})"
        raise HubError(what, model=repo_id, hint=LOGIN) from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        what, hint = _words(_root(error))
        raise HubError(what, model=repo_id, file=file, hint=hint) from error


def _root(error: BaseException) -> BaseException:
    """What is behind `RuntimeError: Error while uploading 'x' to the Hub`."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _words(error: BaseException) -> tuple[str, str]:
    """What is wrong, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub may not be asked (HF_HUB_OFFLINE)", "Unset it and run the command again."
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such branch", "Give an existing branch, or leave out --revision."
    if isinstance(error, errors.HFValidationError):
        return "not a name that the Hub can have", "Write owner/name."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        said = str(error.server_message or "").strip().rstrip(".")
        told = f" ({said})" if said else ""
        if status in (401, 403):
            return f"the Hub does not let this token write there{told}", LOGIN
        if isinstance(error, errors.RepositoryNotFoundError):
            return "no such repository, or this token may not see it", LOGIN
        if status == 409:
            return "the name is taken by a repository that this token may not see", "Name another."
        if status == 412:
            return "the branch has moved during the upload", _AGAIN
        if status == 429:
            return "the Hub asks to slow down (status 429)", f"Wait some minutes. {_AGAIN}"
        if status >= 500:
            return f"the Hub answered with status {status}{told}", f"Try again later. {_AGAIN}"
        return f"the Hub answered with status {status}{told}", ""
    if isinstance(error, errors.HTTPError | ConnectionError | TimeoutError):
        return f"the Hub cannot be reached ({type(error).__name__})", _AGAIN
    if isinstance(error, OSError):
        return f"a file cannot be read: {error}", _AGAIN
    return f"the upload broke off: {error}", _AGAIN
