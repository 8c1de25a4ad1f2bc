"""A bucket that refuses, lies or fails costs labels, prints a secret, or ends in a traceback instead of one line.

moto answers; what it never says comes from the proxy before it, in the words of S3.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from buckets import Place, place, upload
from click.testing import Result
from conftest import ROOT, autolabel, labels_of
from PIL import Image

from autolabel.manifests import storage
from autolabel.manifests.locations import location

sys.path.append(str(ROOT / "benchmarks"))
from fault_proxy import BLIND, DELAY, HUGE, OMIT, WRITES, Request, Rule, s3_error
from object_servers import KEY_ID, NOWHERE, SECRET

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


RIGHTS = "the credentials may not do this; a bucket whose requester pays wants AWS_REQUEST_PAYER=true"
REGION = "the bucket lies in another region: set AWS_REGION to it"
UNCONDITIONAL = (
    "URL/run: this storage knows no conditional writes (If-None-Match, If-Match), without which two drivers could mix"
    " their labels: use a newer version of it, or another bucket for --out"
)
CASES = {
    "expired credentials": (
        Rule(s3_error(400, "ExpiredToken", "The provided token has expired.")),
        "URL/images.parquet: cannot look at it: ExpiredToken (The provided token has expired): renew the credentials,"
        " then run the same again",
    ),
    "unknown credentials": (
        Rule(s3_error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.",
                      extra=f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId>")),
        "URL/images.parquet: cannot look at it: InvalidAccessKeyId (The AWS Access Key Id you provided does not exist"
        " in our records): check the credentials",
    ),
    "wrong credentials": (
        Rule(s3_error(403, "SignatureDoesNotMatch", "The request signature we calculated does not match",
                      extra=f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><StringToSign>{SECRET}</StringToSign>")),
        "URL/images.parquet: cannot look at it: SignatureDoesNotMatch (The request signature we calculated does not"
        " match): check the credentials",
    ),
    "another region": (
        Rule(s3_error(301, "PermanentRedirect", "The bucket you are attempting to access must be addressed using the"
                      " specified endpoint.", ("x-amz-bucket-region", "eu-west-1"),
                      extra="<Endpoint>b.s3.eu-west-1.amazonaws.com</Endpoint>")),
        f"URL/images.parquet: cannot look at it: the server redirects to another address: {REGION}",
    ),
    "another region that signs otherwise": (
        Rule(s3_error(400, "AuthorizationHeaderMalformed", "The authorization header is malformed; the region"
                      " 'us-east-1' is wrong; expecting 'eu-west-1'", extra="<Region>eu-west-1</Region>")),
        "URL/images.parquet: cannot look at it: AuthorizationHeaderMalformed (The authorization header is malformed;"
        f" the region 'us-east-1' is wrong; expecting 'eu-west-1'): {REGION}",
    ),
    "a clock that is an hour late": (
        Rule(s3_error(403, "RequestTimeTooSkewed", "The difference between the request time and the current time is"
                      " too large.", extra="<RequestTime>20261126T170000Z</RequestTime>")),
        "URL/images.parquet: cannot look at it: RequestTimeTooSkewed (The difference between the request time and the"
        " current time is too large): set this machine's clock",
    ),
    "no right to read": (
        Rule(DENIED, READS), f"URL/images.parquet: cannot look at it: AccessDenied (Access Denied): {RIGHTS}"
    ),
    "a requester who should pay": (
        Rule(DENIED, unless="x-amz-request-payer"),
        f"URL/images.parquet: cannot look at it: AccessDenied (Access Denied): {RIGHTS}",
    ),
    "a read-only bucket": (Rule(DENIED, WRITES), f"URL/run: cannot write it: AccessDenied (Access Denied): {RIGHTS}"),
    "conditional writes that are refused": (
        Rule(s3_error(501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
             ("create", "replace")),
        UNCONDITIONAL,
    ),
    "conditions that are ignored": (Rule(BLIND, ("create", "replace")), UNCONDITIONAL),
    "If-Match that is ignored": (Rule(BLIND, ("replace",)), UNCONDITIONAL),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bucket_that_cannot_serve_is_refused_in_one_line_and_nothing_is_left(
    case: str, bucket: Place, teacher: Path
) -> None:
    rule, words = CASES[case]
    before = objects(bucket)
    bucket.proxy.rules = [rule]
    assert refused_run(bucket, teacher) == words
    assert objects(bucket) == before


def test_a_run_that_was_refused_goes_on_when_the_bucket_serves(
    bucket: Place, teacher: Path, quiet: dict[str, bytes]
) -> None:
    bucket.proxy.rules = [Rule(DENIED, WRITES)]
    refused_run(bucket, teacher)
    assert run_in(bucket, teacher).exit_code == 0
    assert labels_of(location(f"{bucket.url}/run")) == quiet


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "URL/images.parquet: cannot look at it: no credentials were found: set them as for the cloud's own tools"
            " (docs/storage.md), or AWS_SKIP_SIGNATURE=true for open data",
        ),
        (
            {"AWS_ENDPOINT_URL": f"http://{NOWHERE}"},
            f"URL/images.parquet: cannot look at it: no answer from http://{NOWHERE} after 5 retries (error sending"
            " request): check the network, and the endpoint if one is set",
        ),
        (
            {"AWS_ENDPOINT_URL": f"http://me:{SECRET}@host"},
            "URL: AWS_ENDPOINT_URL is 'http://…@host': expected an address such as https://host",
        ),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "URL: AWS_ENDPOINT_URL is 'localhost:9000': expected an address such"
         " as https://host"),
    ],
    ids=("no credentials", "nobody there", "a secret in the endpoint", "no address"),
)  # fmt: skip
def test_an_environment_that_leads_nowhere_is_told_in_one_line(
    changes: dict[str, str | None], words: str, teacher: Path
) -> None:
    with place(**changes) as bucket:
        result = run_in(bucket, teacher)
    assert result.exit_code == 2
    assert result.stderr.replace(bucket.url, "URL") == f"autolabel: {words}\n"
    assert SECRET not in result.output and KEY_ID not in result.output


def test_a_missing_bucket_is_named(bucket: Place, teacher: Path) -> None:
    result = label(f"{bucket.url}/images.parquet", "s3://there-is-none/run", teacher)
    missing = "NoSuchBucket (The specified bucket does not exist): make the bucket, or correct its name"
    told = f"autolabel: s3://there-is-none/%s: cannot list it: {missing}\n"
    assert (result.exit_code, result.stderr) == (2, told % "run")
    result = label("s3://there-is-none/images", f"{bucket.url}/run", teacher)
    assert (result.exit_code, result.stderr) == (2, told % "images")


def test_open_data_is_read_without_credentials_and_unsigned(
    images: Path, teacher: Path, tmp_path: Path, quiet: dict[str, bytes]
) -> None:
    anonymous = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_SKIP_SIGNATURE": "true"}
    with place(**anonymous) as bucket:
        name, client = bucket.url.removeprefix("s3://"), bucket.server.client()
        client.put_bucket_acl(Bucket=name, ACL="public-read")
        for path in images.parent.rglob("*.p*"):
            key = path.relative_to(images.parent).as_posix()
            client.put_object(Bucket=name, Key=key, Body=path.read_bytes(), ACL="public-read")
        result = label(f"{bucket.url}/images.parquet", str(tmp_path / "run"), teacher)
        assert result.exit_code == 0, result.output
        assert bucket.proxy.passed and not any(one.signed for one in bucket.proxy.passed)
    assert labels_of(tmp_path / "run") == quiet


def test_a_requester_pays_when_he_says_so(bucket: Place, images: Path, teacher: Path, quiet: dict[str, bytes]) -> None:
    with place(AWS_REQUEST_PAYER="true") as paid:
        paid.proxy.rules = [Rule(DENIED, unless="x-amz-request-payer")]
        upload(images.parent, paid.url)
        assert run_in(paid, teacher).exit_code == 0
        assert labels_of(location(f"{paid.url}/run")) == quiet
        assert paid.proxy.done == {}


def test_a_bucket_that_lets_nobody_remove_gets_the_same_run(
    bucket: Place, teacher: Path, quiet: dict[str, bytes]
) -> None:
    bucket.proxy.rules = [Rule(DENIED, ("delete",))]
    result = run_in(bucket, teacher)
    assert result.exit_code == 0, result.output
    assert labels_of(location(f"{bucket.url}/run")) == quiet
    again = run_in(bucket, teacher)
    assert again.exit_code == 0 and "nothing was to be done" in again.output
    assert bucket.proxy.done["answer 403"] >= 1
    require_no_secrets(bucket, result.output + again.output)


KEYS = ("a b.png", "a%2Fb.png", "ünïcödé 日本.png", "plus+and&and=.png", "hash#question?.png", "c..d.png")


def test_images_under_any_key_are_labelled(images: Path, teacher: Path, quiet: dict[str, bytes]) -> None:
    with place() as bucket:
        for path, key in zip(sorted(images.iterdir()), KEYS, strict=True):
            storage.write(location(f"{bucket.url}/odd/folder here") / key, path.read_bytes())
        result = label(f"{bucket.url}/odd", f"{bucket.url}/a run/über", teacher, "--label-space", "cityscapes")
        assert result.exit_code == 0, result.output
        found = labels_of(location(f"{bucket.url}/a run/über"))
    assert sorted(found.values()) == sorted(quiet.values())
    assert len(found) == len(KEYS)


@pytest.mark.parametrize("key", ["odd//a.png", "odd/../a.png", "odd/./a.png"])
def test_a_key_that_no_path_can_have_is_named(key: str, bucket: Place, teacher: Path) -> None:
    name = bucket.url.removeprefix("s3://")
    bucket.server.client().put_object(Bucket=name, Key=key, Body=b"")
    result = label(f"{bucket.url}/odd", f"{bucket.url}/run", teacher, "--label-space", "cityscapes")
    assert (result.exit_code, result.stderr) == (
        2,
        f"autolabel: {bucket.url}/odd: cannot list it: the key '{key}' names no file, for its empty part, '.' or '..':"
        " rename or remove that object\n",
    )


def quarantine(bucket: Place) -> dict[str, str]:
    bucket.proxy.rules = []
    with storage.reading(location(f"{bucket.url}/run/quarantine.parquet")) as file:
        rows = pq.read_table(io.BytesIO(file.read())).to_pylist()
    return {row["sample_id"]: row["reason"] for row in rows}


def test_an_image_of_five_gib_is_refused_by_its_size_before_its_bytes_are_read(
    bucket: Place, teacher: Path, quiet: dict[str, bytes]
) -> None:
    bucket.proxy.rules = [Rule(HUGE, key="images/c.png")]
    result = run_in(bucket, teacher, "--max-quarantined", 1)
    assert result.exit_code == 0, result.output
    assert sum(one.received for one in bucket.proxy.passed if one.fault == HUGE) < 2**25
    assert quarantine(bucket) == {"c": "5368709120 bytes: expected at most 1073741824"}
    assert labels_of(location(f"{bucket.url}/run")) == {name: quiet[name] for name in "abdef"}


def test_an_image_that_was_replaced_after_the_plan_is_quarantined_with_the_reason(
    bucket: Place, images: Path, teacher: Path, quiet: dict[str, bytes]
) -> None:
    name = bucket.url.removeprefix("s3://")
    smaller = io.BytesIO()
    Image.new("RGB", (64, 32)).save(smaller, "PNG")

    def swap(request: Request) -> None:
        bucket.server.client().put_object(Bucket=name, Key=request.key, Body=smaller.getvalue())

    bucket.proxy.rules = [Rule(DELAY, ("get",), key="images/c.png", times=1, before=swap)]
    result = run_in(bucket, teacher, "--max-quarantined", 1)
    assert result.exit_code == 0, result.output
    assert quarantine(bucket) == {"c": "the image is 64 x 32 but its manifest says 192 x 96: scan again"}
    assert labels_of(location(f"{bucket.url}/run")) == {name: quiet[name] for name in "abdef"}


def test_listings_that_omit_what_was_just_written_cost_nothing(
    bucket: Place, teacher: Path, quiet: dict[str, bytes]
) -> None:
    bucket.proxy.rules, bucket.proxy.fresh = [Rule(OMIT, ("list",))], 600
    first = run_in(bucket, teacher, "--limit", 4)
    assert first.exit_code == 0, first.output
    for _ in range(2):
        again = run_in(bucket, teacher)
        assert again.exit_code == 0, again.output
    assert bucket.proxy.done[OMIT] >= 1
    bucket.proxy.rules = []
    assert run_in(bucket, teacher).exit_code == 0
    assert labels_of(location(f"{bucket.url}/run")) == quiet
    assert autolabel("verify", f"{bucket.url}/run").exit_code == 0
