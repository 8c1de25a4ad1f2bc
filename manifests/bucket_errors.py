"""The words for requests to a bucket that fail: one line with the place, the server's reason and what to do.

obstore's own messages hold addresses and pages of debugging; no secret may leave here, in whatever form it came.
"""

from __future__ import annotations

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_CODE = re.compile(r"<Code>([^<]*)</Code>|\"(?:code|reason)\": ?\"?([A-Za-z0-9]+)")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>|\"message\": ?\"([^\"]*)\"")
_STATUS = re.compile(r"status code: (\d{3}) ?([A-Za-z ]*)")
_KEY = re.compile(
    r"invalid path: (?:Error parsing )?Path \"(.*?)\" ?(?:contained|:)|parsing Path \"(.*?)\":", re.DOTALL
)
_UNREACHED = re.compile(
    r"Error performing [A-Z]+ (\S+) in .*?(?:, after (\d+) retries.*?)?- HTTP error: (.*)", re.DOTALL
)
_UNSIGNED = re.compile(r"169\.254\.169\.254|latest/api/token|computeMetadata|metadata|credential", re.IGNORECASE)
_RENEW = "renew the credentials, then run the same again"
_REGION = "the bucket lies in another region: set AWS_REGION to it"
_RIGHTS = "the credentials may not do this; a bucket whose requester pays wants AWS_REQUEST_PAYER=true"
_CHECK = "check the credentials"
_CREDENTIALS = "set them as for the cloud's own tools (docs/storage.md), or AWS_SKIP_SIGNATURE=true for open data"
# What to do about an error, by its code, or by its status where there is no code: the answer to HEAD has none.
_ADVICE = {
    "NoSuchBucket": "make the bucket, or correct its name",
    "ContainerNotFound": "make the container, or correct its name",
    "ExpiredToken": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "InvalidToken": _RENEW,
    "InvalidAccessKeyId": _CHECK,
    "SignatureDoesNotMatch": _CHECK,
    "AuthenticationFailed": _CHECK,
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "AccessDenied": _RIGHTS,
    "AuthorizationPermissionMismatch": _RIGHTS,
    "NotImplemented": "this storage lacks what a run needs (docs/storage.md)",
    "SlowDown": "it is asked too often; run the same again, with fewer workers",
    "301": _REGION,
    "400": "the credentials may have expired, or the bucket lies in another region than AWS_REGION says",
    "401": _CHECK,
    "403": _RIGHTS,
}


class BucketError(OSError):
    """A bucket refused a request, or could not be reached; one line says which, why and what to do."""

    def __str__(self) -> str:
        # A loading process of torch sends its errors as one text.
        return super().__str__() if self.filename is None else f"{self.filename}: {self.strerror}"


_LONGEST = 60.0  # seconds after which no lost request is made again; the last one may take half a minute more
ANSWERED: set[tuple[str, ...]] = set()  # scheme and name of the buckets that have answered this process


def library() -> Any:
    """Return obstore, loaded late: most people label files of their own disk."""
    try:
        import obstore
    except ImportError as error:
        raise ValueError("places in buckets need obstore: pip install 'autolabel[buckets]'") from error
    return obstore


def exceptions() -> Any:
    """Return obstore's errors."""
    library()
    import obstore.exceptions

    return obstore.exceptions


def insist(what: str, place: Path, request: Callable[[], T], *, tries: int) -> T:
    """Make a request, and make it again when its connection is lost.

    obstore itself does so with reads and plain writes, but with no conditional write, listing or removal.
    """
    pause, until = 0.1, time.monotonic() + _LONGEST
    for left in range(tries - 1, -1, -1):
        try:
            with told(what, place):
                return request()
        except BucketError as error:
            if error.errno != errno.ECONNRESET:
                raise
            if not left or time.monotonic() > until:
                ANSWERED.discard(place.parts[:2])
                raise
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, 10.0)
    raise AssertionError


@contextlib.contextmanager
def told(what: str, place: Path) -> Iterator[None]:
    """Raise errors of requests as an OSError of one line, which names the place and holds no secrets.

    What tells that a condition was not met comes through. ECONNRESET: the connection was lost, and nobody has tried
    again.
    """
    errors = exceptions()
    try:
        yield
        ANSWERED.add(place.parts[:2])
    except (errors.AlreadyExistsError, errors.PreconditionError):
        ANSWERED.add(place.parts[:2])
        raise
    except FileNotFoundError as error:
        ANSWERED.add(place.parts[:2])
        if error.errno is not None:
            raise
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            raise BucketError(errno.ENOENT, f"cannot {what} it: {reason(error)}", str(place)) from None
        raise FileNotFoundError(errno.ENOENT, "no such object", str(place)) from None
    except PermissionError as error:
        if error.errno is not None:
            raise
        raise BucketError(errno.EACCES, f"cannot {what} it: {reason(error)}", str(place)) from None
    except errors.BaseError as error:
        tried = re.search(r"after \d+ retries", str(error)) is not None
        if tried:  # it was waited for: what the command has still to do is not
            ANSWERED.discard(place.parts[:2])
        lost = "HTTP error" in str(error) and not tried
        refused = isinstance(error, (errors.PermissionDeniedError, errors.UnauthenticatedError))
        number = errno.EACCES if refused else errno.ECONNRESET if lost else errno.EIO
        raise BucketError(number, f"cannot {what} it: {reason(error)}", str(place)) from None


def reason(error: BaseException) -> str:
    """The server's own code and message, or the library's first line, and what to do."""
    text = str(error).partition("\n\nDebug source")[0]
    code = next((found[1] or found[2] for found in [_CODE.search(text)] if found), "")
    message = next((found[1] or found[2] for found in [_MESSAGE.search(text)] if found), "")
    status, unreached, key = _STATUS.search(text), _UNREACHED.search(text), _KEY.search(text)
    if code:
        return _advised(f"{code} ({message.rstrip('.')})" if message else code, _ADVICE.get(code, ""))
    if _UNSIGNED.search(text):
        return _advised("no credentials were found", _CREDENTIALS)
    if "redirect" in text:
        return _advised("the server redirects to another address", _REGION)
    if status:
        return _advised(f"{status[1]} {status[2]}".strip(), _ADVICE.get(status[1], ""))
    if key:
        told = f"the key {key[1] or key[2]!r} names no file, for its empty part, '.' or '..'"
        return _advised(told, "rename or remove that object")
    if unreached:
        where = re.match(r"https?://[^/?@]+", unreached[1])
        tries = f" after {unreached[2]} retries" if unreached[2] else ""
        told = f"no answer from {where[0] if where else 'the server'}{tries} ({unreached[3].strip()})"
        return _advised(told, "check the network, and the endpoint if one is set")
    return re.sub(r"\s+", " ", re.sub(r"\?\S*", "?…", text))[:300]


def _advised(told: str, advice: str) -> str:
    return f"{told}: {advice}" if advice else told
