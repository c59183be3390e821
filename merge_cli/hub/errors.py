"""huggingface_hub's exceptions as one sentence and what to do. Tokens are never part of it.

What the Hub, or the way to it, has against an upload: one sentence and what to do.

Like `checkpoint.hub_errors`, which speaks of downloads. Tokens are never part of it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

from merge_cli.errors import HubError, MergeCliError, ResourceError

_BUSY = 429
_FULL = (errno.ENOSPC, errno.EDQUOT)


class UnreachableError(HubError):
    """No answer, or not now: the failures for which the cache may stand in.

    Attributes:
        wait: seconds after which the Hub wants to be asked again; 0 where it does not say.
        why: a few words for a note.
    """

    wait = 0.0
    why = "the Hub cannot be reached"


@contextmanager
def explained(label: str, file: str = "") -> Iterator[None]:
    """Turn huggingface_hub's exceptions into one sentence and what to do."""
    from huggingface_hub import errors

    def problem(kind: type[HubError], what: str, hint: str) -> HubError:
        return kind(what, model=label, file=file, hint=hint)

    try:
        yield
    except errors.GatedRepoError as error:
        message = "access to this model must be asked for"
        hint = f"Accept its terms at {_page(label)}, then log in: hf auth login."
        raise problem(HubError, message, hint) from error
    except errors.RevisionNotFoundError as error:
        revision = label.partition("@")[2]
        raise problem(HubError, f"has no revision '{revision}'", f"See {_page(label)}.") from error
    except errors.RepositoryNotFoundError as error:
        message = "no such folder, and no such model on the Hub, or it is private"
        hint = "Check the spelling; for a private model log in (hf auth login) or set HF_TOKEN."
        raise problem(HubError, message, hint) from error
    except errors.LocalEntryNotFoundError as error:
        message = "is not in the cache, and the Hub cannot be reached"
        hint = "Connect, or download it beforehand with: hf download."
        raise problem(UnreachableError, message, hint) from error
    except errors.EntryNotFoundError as error:
        raise problem(HubError, "the repository has no such file", "") from error
    except errors.HFValidationError as error:
        message = "no such folder, and not a name that the Hub has"
        raise problem(HubError, message, "Write organisation/name or a path.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        message = f"the Hub answered with status {status}"
        if status >= 500 or status == _BUSY:
            wait = _retry_after(error.response.headers) if error.response is not None else 0.0
            when = f"in {wait:.0f} seconds" if wait else "later"
            hint = f"Try again {when}."
            if status == _BUSY:
                message += ": too many requests"
                hint += " Who is logged in (hf auth login) may ask more often."
            busy = UnreachableError(message, model=label, file=file, hint=hint)
            busy.wait, busy.why = wait, f"the Hub answered with status {status}"
            raise busy from error
        hint = "Check the name; log in again: hf auth login." if status in (401, 403) else ""
        raise problem(HubError, message, hint) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        message = f"no such folder, and the Hub cannot be reached ({type(error).__name__})"
        hint = "Check the path, or the connection. What is downloaded is kept."
        raise problem(UnreachableError, message, hint) from error
    except OSError as error:
        if error.errno in _FULL:
            message = "the disk of the Hub's cache is full"
            hint = "Free some space, or put it elsewhere with HF_HOME. What has arrived is kept."
            raise ResourceError(message, where=str(error.filename or ""), hint=hint) from error
        message = f"cannot be stored in the Hub's cache: {error}"
        raise problem(HubError, message, "See HF_HOME, which says where it is.") from error
    except UnicodeError as error:  # the exception quotes the token: it must not be passed on
        message = f"the Hub's token is not valid ({type(error).__name__})"
        raise problem(HubError, message, "Log in again: hf auth login.") from None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait, as the answer says: a number, a date, or when its quota begins anew."""
    from huggingface_hub import utils

    said = headers.get("Retry-After", "").strip()
    if said.isdecimal() and len(said) < 10:
        return float(said)
    if said:
        try:
            return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return 0.0
    parse = getattr(utils, "parse_ratelimit_headers", None)  # not in the oldest versions
    quota = parse(headers) if parse is not None else None
    return float(quota.reset_in_seconds) if quota is not None and quota.remaining == 0 else 0.0


def _page(label: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{label.partition('@')[0]}"


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
        message = f"the Hub's token is not valid ({type(error).__name__})"
        raise HubError(message, model=repo_id, hint=LOGIN) from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        message, hint = _words(_root(error))
        raise HubError(message, model=repo_id, file=file, hint=hint) from error


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
