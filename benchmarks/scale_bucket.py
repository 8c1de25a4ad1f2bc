"""What labelling costs in a bucket: `python benchmarks/scale_bucket.py [--size HxW] [--latency MS …]`.

Units of 64 images beside a device that sleeps. Images and run folder lie on a disk, then in a bucket of moto's server,
in a process of its own behind a proxy that lets every request wait and counts them. All else is real, as in feed.py.

"Pause" is the time between the last image of a unit and the first of the next, in which the device has nothing to do:
the last label, the commit, the first image. Images are small, so that nearly all of it is waiting. Requests and bytes
are those of a worker, so without plan, progress, lock, chapters and tables. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any

import feed
import numpy as np
from fault_proxy import FaultProxy, Passed
from numpy.typing import NDArray
from object_servers import moto, surroundings

from autolabel.manifests import storage
from autolabel.manifests.locations import location
from autolabel.manifests.policy import PAPER

CASE = feed.Case("paper", PAPER, suffix="jpg")
FULL = feed.Extent((128, 256), 8, 64, 6, 0.03)
SMALLEST = feed.Extent((64, 128), 2, 3, 2, 0.002)
LATENCIES = (0, 25, 50, 100)  # ms


def serve(pipe: Connection) -> None:
    """A server and the proxy before it, which does what it is told until the pipe ends."""
    with moto() as server, FaultProxy(server.endpoint, one_by_one=True) as proxy:
        server.make_bucket("scale")
        pipe.send(server.environment(proxy.url))
        while (told := pipe.recv()) is not None:
            proxy.latency = told
            pipe.send(list(proxy.passed))
            proxy.passed.clear()


@dataclass
class Bucket:
    """The server in its process, as this process knows it."""

    pipe: Connection

    def take(self, *, latency: float) -> list[Passed]:
        """Return the requests since the last call, and let those that follow wait so many seconds."""
        self.pipe.send(latency)
        passed: list[Passed] = self.pipe.recv()
        return passed


@contextmanager
def bucket() -> Iterator[Bucket]:
    """Run the server. The process is forked, before this one has threads: it would import torch once more."""
    process_of = multiprocessing.get_context("fork")
    ours, theirs = process_of.Pipe()
    process = process_of.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    with surroundings(ours.recv()):
        yield Bucket(ours)
    ours.send(None)
    process.join()


def row(name: str, latency: str, found: feed.Found, requests: Sequence[Passed], extent: feed.Extent) -> str:
    """The cells of a case."""
    batches = len(found.worked) // extent.units
    starts = range(batches, len(found.worked), batches)
    pause = mean(found.worked[n][0] - found.worked[n - 1][1] for n in starts)
    others = [one for one in requests if not one.key.startswith("images/") and not one.key.endswith("progress.json")]
    kinds = ("create", "put", "replace", "get", "head", "list", "delete")
    counts = {kind: sum(one.operation == kind for one in others) / extent.units for kind in kinds}
    writes, reads = (sum(counts[kind] for kind in some) for some in (kinds[:3], kinds[3:6]))
    cells = [
        f"{writes:.2f}",
        f"{reads:.2f}",
        f"{counts['delete']:.2f}",
        f"{sum(x.sent for x in others) / found.images:.0f}",
    ]
    shown = cells if requests else ["–"] * len(cells)
    return (
        f"| {name} | {latency} | {100 * found.busy:.1f} % | {pause:.2f} | {found.rate:.2f} | {found.cpu:.1f} |"
        f" {' | '.join(shown)} |"
    )


def measure(extent: feed.Extent, latencies: Sequence[float]) -> None:
    """Print the table."""
    print(
        "| where | latency ms | device busy | pause between units s | images/s | CPU ms an image | writes a unit |"
        " reads a unit, without images | deletes a unit | bytes written an image |\n|---|---:|" + "---:|" * 8
    )
    with tempfile.TemporaryDirectory() as place, bucket() as server:
        maps: list[NDArray[np.uint8]] = feed.label_maps(None, extent)
        folder = Path(place)
        root = folder / "images"
        root.mkdir()
        feed.write_files(root, None, maps, extent)
        (folder / "disk").mkdir()
        print(row("a disk", "0", feed.measured(folder / "disk", root, CASE, maps, extent), (), extent), flush=True)
        there = location("s3://scale")
        for path in sorted(root.glob("*.jpg")):
            storage.write(there / "images" / path.name, path.read_bytes())
        for latency in latencies:
            here = folder / f"{latency:g}"
            here.mkdir()
            found = feed.measured(
                here, there / "images", CASE, maps, extent, out=there / f"run-{latency:g}",
                begin=lambda: server.take(latency=latency / 1000),  # noqa: B023 - called at once
            )  # fmt: skip
            requests = server.take(latency=0)
            print(row("a bucket", f"{latency:g}", found, requests, extent), flush=True)


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="height x width of the images")
    parser.add_argument("--latency", type=float, nargs="+", default=LATENCIES, metavar="MS", help="of every request")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked: Any = parser.parse_args()
    extent = SMALLEST if asked.smallest else FULL
    if asked.smallest:
        print("--smallest: these numbers mean nothing\n")
        asked.latency = (1,)
    if asked.size:
        height, width = map(int, asked.size.split("x"))
        extent = replace(extent, size=(height, width))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{extent.units} units of {extent.unit} images, {1000 * extent.sleep:.0f} ms each{load}\n")
    measure(extent, asked.latency)


if __name__ == "__main__":
    main()
