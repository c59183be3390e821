"""Messages for huggingface_hub's exceptions, of downloads and of uploads.

Each says in one sentence what is wrong, and then what to do. A message never has a token in it.
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
LOGIN = "Log in with a token that may write: hf auth login, or set HF_TOKEN."
_RERUN = "Run the same command again: the upload resumes."


class UnreachableError(HubError):
    """The Hub does not answer, or is busy: the cache may be used instead.

    Attributes:
        wait: seconds until the Hub takes the next request; 0 where it does not say.
        why: the reason, for a note.
    """

    wait = 0.0
    why = "the Hub cannot be reached"


@contextmanager
def explained(label: str, file: str = "") -> Iterator[None]:
    """Turn huggingface_hub's exceptions in a download into messages."""
    from huggingface_hub import errors

    def problem(kind: type[HubError], text: str, hint: str) -> HubError:
        return kind(text, model=label, file=file, hint=hint)

    try:
        yield
    except errors.GatedRepoError as error:
        message = "this model is gated: access must be requested"
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
        message = "no such folder, and not a valid name on the Hub"
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
                hint += " Logged-in users (hf auth login) may send more requests."
            busy = UnreachableError(message, model=label, file=file, hint=hint)
            busy.wait, busy.why = wait, f"the Hub answered with status {status}"
            raise busy from error
        hint = "Check the name; log in again: hf auth login." if status in (401, 403) else ""
        raise problem(HubError, message, hint) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        message = f"no such folder, and the Hub cannot be reached ({type(error).__name__})"
        hint = "Check the path, or the connection. The download resumes."
        raise problem(UnreachableError, message, hint) from error
    except OSError as error:
        if error.errno in _FULL:
            message = "the disk of the Hub's cache is full"
            hint = "Free some space, or move the cache with HF_HOME. The download resumes."
            raise ResourceError(message, where=str(error.filename or ""), hint=hint) from error
        message = f"cannot be stored in the Hub's cache: {error}"
        raise problem(HubError, message, "HF_HOME sets the cache's folder.") from error
    except UnicodeError as error:  # the exception quotes the token: it must not be passed on
        message = f"the Hub's token is not valid ({type(error).__name__})"
        raise problem(HubError, message, "Log in again: hf auth login.") from None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the answer's headers: a number, a date, or the time until a new quota."""
    from huggingface_hub import utils

    retry_after = headers.get("Retry-After", "").strip()
    if retry_after.isdecimal() and len(retry_after) < 10:
        return float(retry_after)
    if retry_after:
        try:
            return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return 0.0
    parse = getattr(utils, "parse_ratelimit_headers", None)  # not in the oldest versions
    quota = parse(headers) if parse is not None else None
    return float(quota.reset_in_seconds) if quota is not None and quota.remaining == 0 else 0.0


def _page(label: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{label.partition('@')[0]}"


@contextmanager
def explained_upload(repo_id: str, file: str = "") -> Iterator[None]:
    """Turn huggingface_hub's exceptions in an upload into messages."""
    from huggingface_hub import errors

    try:
        yield
    except MergeCliError:
        raise
    except UnicodeError as error:  # the exception quotes the token: it must not be passed on
        message = f"the Hub's token is not valid ({type(error).__name__})"
        raise HubError(message, model=repo_id, hint=LOGIN) from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        message, hint = _message_and_hint(_root(error))
        raise HubError(message, model=repo_id, file=file, hint=hint) from error


def _root(error: BaseException) -> BaseException:
    """The cause of `RuntimeError: Error while uploading 'x' to the Hub`."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _message_and_hint(error: BaseException) -> tuple[str, str]:
    """The message and the hint for an exception."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)", "Unset it and run the command again."
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such branch", "Give an existing branch, or leave out --revision."
    if isinstance(error, errors.HFValidationError):
        return "not a valid name on the Hub", "Write owner/name."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        server_message = str(error.server_message or "").strip().rstrip(".")
        details = f" ({server_message})" if server_message else ""
        if status in (401, 403):
            return f"this token may not write there{details}", LOGIN
        if isinstance(error, errors.RepositoryNotFoundError):
            return "no such repository, or this token may not see it", LOGIN
        if status == 409:
            return "the name is taken by a repository that this token may not see", "Name another."
        if status == 412:
            return "the branch has moved during the upload", _RERUN
        if status == 429:
            return "the Hub asks to slow down (status 429)", f"Wait some minutes. {_RERUN}"
        if status >= 500:
            return f"the Hub answered with status {status}{details}", f"Try again later. {_RERUN}"
        return f"the Hub answered with status {status}{details}", ""
    if isinstance(error, errors.HTTPError | ConnectionError | TimeoutError):
        return f"the Hub cannot be reached ({type(error).__name__})", _RERUN
    if isinstance(error, OSError):
        return f"a file cannot be read: {error}", _RERUN
    return f"the upload broke off: {error}", _RERUN
