"""The clients of buckets: addresses, credentials and patience, as the environment of a process says."""

from __future__ import annotations

import errno
import os
import re
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from autolabel.manifests.bucket_errors import ANSWERED, BucketError, library, reason
from autolabel.manifests.locations import BucketPath

_ENDPOINTS = {  # by what the environment asks for
    "s3": {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"},
    "gs": {"GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"},
    "az": {"AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"},
}
# obstore draws each pause between `init_backoff` and `base` times the one before. Before a bucket has answered once, a
# name, address or credential is more likely wrong than a server away: then a second or two are enough.
_RETRIES: dict[bool, dict[str, Any]] = {
    True: {
        "max_retries": 10,
        "retry_timeout": timedelta(seconds=90),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 4},
    },
    False: {
        "max_retries": 5,
        "retry_timeout": timedelta(seconds=8),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
    },
}
_TIMES: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "15m"}

_first_user: int | None = None  # the process whose threads do the requests


def client_of(place: BucketPath, *, patient: bool | None = None) -> Any:
    """The client of a bucket. patient: with a server that is away; by default with a bucket that has answered.

    Raises BucketError in a process that was forked from one which had clients.
    """
    global _first_user
    if _first_user is None:
        _first_user = os.getpid()
    elif _first_user != os.getpid():
        raise BucketError(
            errno.ENOTSUP,
            "a forked process cannot use its parent's connections: start it with multiprocessing_context='spawn'",
            str(place),
        )
    return _client(place.scheme, place.bucket, patient=_is_known(place) if patient is None else patient)


def tries_for(place: BucketPath) -> int:
    """How often a request is made whose connection is lost."""
    return 1 + int(_RETRIES[_is_known(place)]["max_retries"])


def _is_known(place: BucketPath) -> bool:
    """Return True once the bucket has answered this process."""
    return place.parts[:2] in ANSWERED


@lru_cache(64)
def _client(scheme: str, bucket: str, *, patient: bool) -> Any:
    library()
    import obstore.store

    connect: Any = obstore.store.from_url
    options = dict(_TIMES) if patient else {**_TIMES, "read_timeout": "10s"}
    for name in _ENDPOINTS[scheme]:
        endpoint = os.environ.get(name, "")
        if endpoint and not re.fullmatch(r"https?://[^\s/?#@]+[^\s?#@]*", endpoint):
            said = re.sub(r"//.*@|\?.*", "//…@", endpoint, flags=re.DOTALL)
            raise BucketError(
                errno.EINVAL, f"{name} is {said!r}: expected an address such as https://host", f"{scheme}://{bucket}"
            )
        if endpoint.startswith("http://"):
            options["allow_http"] = True
    try:
        return connect(
            f"{scheme}://{bucket}", client_options=options, retry_config=_RETRIES[patient], **_credentials(scheme)
        )
    except Exception as error:
        raise BucketError(errno.EINVAL, reason(error), f"{scheme}://{bucket}") from None


def _credentials(scheme: str) -> dict[str, Any]:
    """boto3's own search for credentials where boto3 is installed, which knows profiles and single sign-on.

    obstore alone finds those of the environment, of web identities, containers and instances.
    """
    asked = ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
    profile = any(os.environ.get(name) for name in asked) or Path("~/.aws/credentials").expanduser().is_file()
    if scheme != "s3" or os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE") or not profile:
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    return {"credential_provider": Boto3CredentialProvider()}
