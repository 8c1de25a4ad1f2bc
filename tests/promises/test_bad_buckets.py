"""A bucket that refuses, lies or fails costs labels, prints a secret, or ends in a traceback instead of one line.

moto answers; what it never says comes from the proxy before it, in the words of S3.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import Place, place, upload
from click.testing import Result
from conftest import ROOT, autolabel, labels_of

from autolabel.manifests import storage
from autolabel.manifests.locations import location

sys.path.append(str(ROOT / "benchmarks"))
from fault_proxy import BLIND, WRITES, Rule, s3_error
from object_servers import KEY_ID, SECRET

READS = ("get", "head", "list")
DENIED = s3_error(403, "AccessDenied", "Access Denied")


@pytest.fixture(scope="module")
def images(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six images, all different, and the manifest of it beside it."""
    from conftest import photograph, scanned

    folder = tmp_path_factory.mktemp("bucket") / "images"
    photograph(city, folder, "abcdef")
    scanned(city, folder)
    return folder


@pytest.fixture(scope="module")
def quiet(images: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The labels that an undisturbed run on a disk makes of the images."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    assert label(str(images.with_suffix(".parquet")), str(out), teacher).exit_code == 0
    return labels_of(out)


@pytest.fixture
def bucket(images: Path) -> Iterator[Place]:
    """A bucket with the images and their manifest."""
    with place() as found:
        upload(images.parent, found.url)
        yield found


def label(source: str, out: str, teacher: Path | str, *more: object) -> Result:
    return autolabel("generate", source, "--teacher", teacher, "--out", out, "--scales", "1", "--unit-size", 2,
                     "--engine", "local", *more)  # fmt: skip


def run_in(bucket: Place, teacher: Path, *more: object) -> Result:
    return label(f"{bucket.url}/images.parquet", f"{bucket.url}/run", teacher, *more)


def refused_run(bucket: Place, teacher: Path, *more: object) -> str:
    """The one line with which a run in a bucket is refused; no secret is in it."""
    result = run_in(bucket, teacher, *more)
    assert result.exit_code in (1, 2), result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("autolabel: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    require_no_secrets(bucket, result.output)
    return lines[0].removeprefix("autolabel: ").replace(bucket.url, "URL")


def require_no_secrets(bucket: Place, text: str) -> None:
    """No credentials in what was printed, nor in any object of the bucket."""
    said = [text.encode()] + [storage.read(path) for path in objects(bucket) if "images/" not in str(path)]
    assert not any(secret.encode() in part for secret in (SECRET, KEY_ID) for part in said)


def objects(bucket: Place) -> list[Path]:
    bucket.proxy.rules = []
    return storage.list(location(bucket.url), recursive=True)


CASES = {
    "expired credentials": Rule(s3_error(400, "ExpiredToken", "The provided token has expired.")),
    "unknown credentials": Rule(
        s3_error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.",
                 extra=f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId>")
    ),
    "wrong credentials": Rule(
        s3_error(403, "SignatureDoesNotMatch", "The request signature we calculated does not match",
                 extra=f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><StringToSign>{SECRET}</StringToSign>")
    ),
    "another region": Rule(
        s3_error(301, "PermanentRedirect", "The bucket you are attempting to access must be addressed using the specified"
                 " endpoint. Please send all future requests to this endpoint.",
                 ("x-amz-bucket-region", "eu-west-1"), extra="<Endpoint>b.s3.eu-west-1.amazonaws.com</Endpoint>")
    ),
    "a skewed clock": Rule(
        s3_error(403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.")
    ),
    "no right to read": Rule(DENIED, READS),
    "a read-only bucket": Rule(DENIED, WRITES),
    "a requester who pays": Rule(DENIED, unless="x-amz-request-payer"),
    "no conditional put": Rule(
        s3_error(501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
        ("create", "replace"),
    ),
    "conditions that are ignored": Rule(BLIND, ("create", "replace")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_words(case: str, bucket: Place, teacher: Path) -> None:
    bucket.proxy.rules = [CASES[case]]
    import time

    t = time.time()
    print(case, "->", refused_run(bucket, teacher), time.time() - t, bucket.proxy.done)
