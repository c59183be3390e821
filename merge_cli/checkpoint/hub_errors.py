"""huggingface_hub's exceptions as one sentence and what to do. Tokens are never part of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from merge_cli.errors import HubError


class UnreachableError(HubError):
    """No answer, or not now: the failures for which the cache may stand in."""


@contextmanager
def explained(label: str, file: str = "") -> Iterator[None]:
    """Turn huggingface_hub's exceptions into one sentence and what to do."""
    from huggingface_hub import errors

    def problem(kind: type[HubError], what: str, hint: str) -> HubError:
        return kind(what, model=label, file=file, hint=hint)

    try:
        yield
    except errors.GatedRepoError as error:
        what = "access to this model must be asked for"
        hint = f"Accept its terms at {_page(label)}, then log in: hf auth login."
        raise problem(HubError, what, hint) from error
    except errors.RevisionNotFoundError as error:
        revision = label.partition("@")[2]
        raise problem(HubError, f"has no revision '{revision}'", f"See {_page(label)}.") from error
    except errors.RepositoryNotFoundError as error:
        what = "no such folder, and no such model on the Hub, or it is private"
        hint = "Check the spelling; for a private model log in (hf auth login) or set HF_TOKEN."
        raise problem(HubError, what, hint) from error
    except errors.LocalEntryNotFoundError as error:
        what = "is not in the cache, and the Hub cannot be reached"
        hint = "Connect, or download it beforehand with: hf download."
        raise problem(UnreachableError, what, hint) from error
    except errors.EntryNotFoundError as error:
        raise problem(HubError, "the repository has no such file", "") from error
    except errors.HFValidationError as error:
        what = "no such folder, and not a name that the Hub has"
        raise problem(HubError, what, "Write organisation/name or a path.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what = f"the Hub answered with status {status}"
        if status >= 500:
            raise problem(UnreachableError, what, "Try again later.") from error
        hint = "Check the name; log in again: hf auth login." if status in (401, 403) else ""
        raise problem(HubError, what, hint) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        what = f"no such folder, and the Hub cannot be reached ({type(error).__name__})"
        hint = "Check the path, or the connection. What is downloaded is kept."
        raise problem(UnreachableError, what, hint) from error
    except OSError as error:
        what = f"cannot be stored in the Hub's cache: {error}"
        raise problem(HubError, what, "See HF_HOME, which says where it is.") from error
    except UnicodeError as error:  # the exception quotes the token: it must not be passed on
        what = f"the Hub's token is not valid ({type(error).__name__})"
        raise problem(HubError, what, "Log in again: hf auth login.") from None


def _page(label: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{label.partition('@')[0]}"
