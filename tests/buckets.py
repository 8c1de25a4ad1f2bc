"""Buckets for tests: a server on loopback, a proxy before it that can disturb, and the variables by which it is found.

moto answers in every install; SeaweedFS and Azurite where `weed` and `azurite-blob` are on the PATH. No test reaches
beyond loopback: clients are led to these servers by their variables, also for the metadata of cloud machines.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from fault_proxy import FaultProxy
from object_servers import SERVERS, Server, surroundings

_SERVERS: dict[str, tuple[Server, object]] = {}


@dataclass(frozen=True)
class Place:
    """A new bucket behind a proxy, found by this process and its children. url: s3://NAME or az://NAME."""

    server: Server
    proxy: FaultProxy
    url: str

    def environment(self, **changes: str | None) -> dict[str, str]:
        """The variables of a child, changed; None takes one away."""
        return changed(dict(os.environ), changes)


def changed(variables: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Variables with some of them replaced; None takes one away."""
    merged = {**variables, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def server_of(kind: str) -> Server:
    """The server of this kind, started by the first test that asks and ended with the process."""
    if kind not in _SERVERS:
        import atexit

        running = SERVERS[kind]()
        _SERVERS[kind] = (running.__enter__(), running)
        atexit.register(running.__exit__, None, None, None)
    return _SERVERS[kind][0]


@contextmanager
def place(kind: str = "moto", **changes: str | None) -> Iterator[Place]:
    """A new bucket; this process finds it while the block lasts. changes: to the variables of the server."""
    server = server_of(kind)
    url = server.make_bucket(f"t{uuid.uuid4().hex[:12]}")
    before = 2 if server.scheme == "az" else 1
    with FaultProxy(server.endpoint, one_by_one=not server.atomic, before=before) as proxy:
        variables = changed(server.environment(proxy.url), changes)
        with surroundings(variables):
            yield Place(server, proxy, url)


def upload(folder: Path, url: str) -> None:
    """Put every file below a folder into a bucket, at its relative path."""
    from autolabel.manifests import storage
    from autolabel.manifests.locations import location

    root = location(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write(root / path.relative_to(folder).as_posix(), path.read_bytes())
