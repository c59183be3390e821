"""fsspec's file system of an address, and its exceptions as messages.

fsspec finds credentials as each store's own tools do: AWS_ACCESS_KEY_ID and ~/.aws, Google's
default credentials, ~/.netrc. None of them is ever part of an address.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from merge_cli.errors import MergeCliError, RemoteError, ResourceError

WEB = ("http", "https")
_EXTRA = "pip install 'merge-cli[remote]'"
_PACKAGES = {"gs": "pip install gcsfs", "gcs": "pip install gcsfs", "az": "pip install adlfs",
             "abfs": "pip install adlfs"}  # fmt: skip
_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3_ANON=true "
    "reads public buckets.",
    "gs": "Log in: gcloud auth application-default login.",
    "http": "Put the server's login into ~/.netrc.",
    "https": "Put the server's login into ~/.netrc.",
}
_DENIED = (401, 403)
_GONE = (404, 410)
_BUSY = (408, 429)


class UnreachableError(RemoteError):
    """The store does not answer, or not now: what was asked may be asked again."""


class AbsentError(RemoteError):
    """There is no such file or folder (404)."""


class DeniedError(RemoteError):
    """It may not be read (403); a bucket also says so of what is not there."""


def protocol_of(address: str) -> str:
    return address.partition("://")[0]


def check_address(address: str) -> None:
    """Refuse an address that would carry a secret into recipes and reports.

    Raises:
        RemoteError: it has a password, or a query such as a signature.
    """
    parts = urlsplit(address)
    if "@" in parts.netloc or (parts.query and parts.scheme in WEB):
        message = "an address with a login or a query, which reports would repeat"
        plain = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        hint = f"Write {plain}. {_CREDENTIALS.get(parts.scheme, _CREDENTIALS['https'])}"
        raise RemoteError(message, model=plain, hint=hint)


def open_filesystem(address: str) -> Any:
    """The file system of an address.

    Raises:
        RemoteError: an address that carries a secret, or of a kind that nobody knows.
        ResourceError: the package for it is not installed.
    """
    check_address(address)
    protocol = protocol_of(address)
    install = _PACKAGES.get(protocol, _EXTRA)
    try:
        import fsspec
    except ImportError as error:
        message = f"{protocol}:// needs fsspec, which is not installed"
        raise ResourceError(message, where=address, hint=f"Install it: {_EXTRA}.") from error
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in WEB:
        options["client_kwargs"] = {"trust_env": True}  # proxies, and logins of ~/.netrc
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        message = f"{protocol}:// needs a package that is not installed"
        raise ResourceError(message, where=address, hint=f"Install it: {install}.") from error
    except ValueError as error:
        hint = "Write s3://, gs://, https://, or a path."
        raise RemoteError(f"no kind of address: {protocol}://", model=address, hint=hint) from error


@contextmanager
def explained(address: str, file: str = "") -> Iterator[None]:
    """Turn what fsspec and its packages raise into messages."""
    try:
        yield
    except MergeCliError:
        raise
    except Exception as error:  # each package has exceptions of its own
        raise _as_message(error, address, file) from error


def _as_message(error: Exception, address: str, file: str) -> RemoteError:
    where: dict[str, str] = {"model": address, "file": file}
    status = _status(error)
    if isinstance(error, PermissionError) or status in _DENIED:
        hint = _CREDENTIALS.get(protocol_of(address), "")
        return DeniedError("access is denied (403)", **where, hint=hint)
    kind = type(error).__name__
    if "Credential" in kind:  # botocore's and Google's have no class in common
        hint = _CREDENTIALS.get(protocol_of(address), "")
        return RemoteError("there are no credentials to read it with", **where, hint=hint)
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if is_missing and (status in _GONE or error.__cause__ is None):  # else aiohttp's are behind it
        return AbsentError("no such file or folder there (404)", **where, hint="Check the address.")
    if kind == "FileExpired":
        return changed(address, file)
    if isinstance(error, ValueError) and re.search("range|more bytes", str(error)):
        message = "the server does not answer requests for parts of a file (Range)"
        return RemoteError(message, **where, hint="Download it, and name the file on disk.")
    if status is not None and 400 <= status < 500 and status not in _BUSY:
        return RemoteError(f"the server answered with status {status}", **where)
    origin = error.__cause__ or error
    text = str(origin).strip().partition("\n")[0] or type(origin).__name__
    reason = f"status {status}" if status else text
    message = f"cannot be reached ({reason[:120]})"
    hint = "Check the connection. The download resumes."
    return UnreachableError(message, **where, hint=hint)


def changed(address: str, file: str) -> RemoteError:
    """The error for a file of which there is another version now."""
    message = "has changed since the plan was made: its ETag or time is another"
    hint = "Run the command again: it reads the new version."
    return RemoteError(message, model=address, file=file, hint=hint)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an exception, or what it comes from, has."""
    while error is not None:
        status = getattr(error, "status", None)
        response = getattr(error, "response", None)
        if status is None and isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
