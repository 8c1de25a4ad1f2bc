"""What is computed twice when machines are taken back: `python benchmarks/preemptions.py [--times 20]`.

A Ray cluster on this machine (a head without CPUs, two nodes of one CPU) and `generate` as a process of its own, with
a teacher that takes `--seconds` for an image. At random moments a machine is announced to be taken back and goes when
nobody works there any more; or it goes at once; or a worker, or the command itself without Ray, gets a signal. A
machine that is gone is replaced, a command is called again. Every process notes each image that it begins: an image
that is noted twice has been computed twice, or was under way when its process ended.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos import NODE, ray_cluster
from engine import checkpoint, tiny_images

from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Sample
from autolabel.manifests.settings import build_job
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.predictor import Decoded, Refused, TeacherPredictor
from autolabel.pipeline.records import Row
from autolabel.pipeline.run import generate
from autolabel.pipeline.units import Unit
from autolabel.teacher.loading import load_teacher

UNIT, NOTICE_S = 64, 60


class Slow(TeacherPredictor):
    """A predictor that takes its time and notes what it begins; a file "hurry" beside the run makes it refuse all."""

    def __init__(self, run: Run, seconds: float) -> None:
        assert run.teacher is not None
        super().__init__(load_teacher(run.teacher, device="cpu"), run.recipe)
        self.notes, self.seconds = run.path.parent / "begun", seconds

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        """Note the process and the image."""
        with open(self.notes, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {sample.sample_id}\n")
        if self.notes.with_name("hurry").exists():
            return Refused(row, "it came too late")
        time.sleep(self.seconds)
        return super().decode(sample, unit, row)


@dataclass
class Command:
    """One run and the command that labels it. gone: seconds from each word or signal until its machine was free."""

    folder: Path
    line: list[str]
    gone: list[float] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(self.line, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def begun(self) -> list[tuple[int, str]]:
        """The processes and images that were noted."""
        notes = self.folder / "begun"
        lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
        return [(int(process), image) for process, image in (line.split() for line in lines)]

    def wait_for_work(self, process: subprocess.Popen[bytes], pause: float) -> None:
        """Wait until images are begun, and then a while."""
        known = len(self.begun())
        while len(self.begun()) <= known:
            if process.poll() is not None:
                raise RuntimeError(f"the command ended too soon: {self.folder / 'log'}")
            time.sleep(0.05)
        time.sleep(pause)

    def again(self) -> Counter[int]:
        """The images that were begun again, counted by the process that had begun them before."""
        last: dict[str, int] = {}
        lost: Counter[int] = Counter()
        for process, image in self.begun():
            if image in last:
                lost[last[image]] += 1
            last[image] = process
        return lost


def label(manifest: str, teacher: str, out: str, address: str, seconds: float) -> int:
    """Be the command."""
    paths = {"manifest": Path(manifest), "teacher": Path(teacher), "out": Path(out)}
    engine = {"engine": "ray", "address": address} if address else {"engine": "local", "workers": 1}
    asked = build_job(LabelJob, {**paths, **engine, "scales": (1.0,), "device": "cpu", "unit_size": UNIT})
    result = generate(asked, predictor=lambda run, device: Slow(run, seconds), on_note=print)
    return 130 if result.stopped else int(bool(result.failed or result.accounts.left))


# --- how machines, workers and commands go ----------------------------------------------------------------------------


def with_notice(cluster: Any, dice: random.Random) -> float:
    """Announce that a machine will be taken back, and return after how long nobody worked there any more."""
    raylet: Any = importlib.import_module("ray._raylet")
    autoscaler: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    node = dice.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id))
    spot = autoscaler.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    started = time.monotonic()
    deadline = int(1000 * (time.time() + NOTICE_S))
    raylet.GcsClient(address=cluster.address).drain_node(node.node_id, spot, "spot", deadline)
    while not any(kind == "raylet" for kind, _ in node.dead_processes()):  # an idle one ends by itself
        time.sleep(0.05)
        if time.monotonic() - started > NOTICE_S:
            raise RuntimeError("somebody still works on a machine that is taken back")
    seconds = time.monotonic() - started
    replace(cluster, node)
    return seconds


def without_notice(cluster: Any, dice: random.Random) -> float:
    """Kill everything on a machine."""
    replace(cluster, dice.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id)))
    return 0.0


def replace(cluster: Any, node: Any) -> None:
    """Remove a machine, and bring another one."""
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)


def on_ray(command: Command, go: Callable[[], float], times: int, pause: float, dice: random.Random) -> None:
    """Let one machine or worker after the other go while a command labels."""
    process = command.start()
    try:
        for _ in range(times):
            command.wait_for_work(process, dice.uniform(0, pause))
            command.gone.append(go())
        (command.folder / "hurry").touch()
        if process.wait(300):
            raise RuntimeError(f"the command failed: {command.folder / 'log'}")
    finally:
        process.kill()
        process.wait()


def a_worker(command: Command) -> float:
    """Send SIGTERM to the worker that has begun an image last."""
    process, _ = command.begun()[-1]
    started = time.monotonic()
    os.kill(process, signal.SIGTERM)
    while Path(f"/proc/{process}").exists():
        time.sleep(0.02)
    return time.monotonic() - started


def the_command(command: Command, number: signal.Signals, times: int, pause: float, dice: random.Random) -> None:
    """Send a signal to the command, and call it again."""
    for _ in range(times):
        process = command.start()
        try:
            command.wait_for_work(process, dice.uniform(0, pause))
            started = time.monotonic()
            process.send_signal(number)
            process.wait(NOTICE_S)
            command.gone.append(time.monotonic() - started)
        finally:
            process.kill()
            process.wait()
    (command.folder / "hurry").touch()
    if command.start().wait(300):
        raise RuntimeError(f"the command failed: {command.folder / 'log'}")


def row(name: str, command: Command, images: int) -> None:
    """Print what a run has lost."""
    lost = command.again()
    if len({image for _, image in command.begun()}) != images:
        raise RuntimeError(f"{command.folder}: not every image was labelled")
    times = len(command.gone)
    print(
        f"| {name} | {times} | {lost.total()} | {lost.total() / times:.2f} | {max(lost.values(), default=0)} |"
        f" {statistics.median(command.gone):.1f} |",
        flush=True,
    )


@contextmanager
def scratch(out: Path | None) -> Iterator[Path]:
    """A folder for images and runs."""
    with ExitStack() as stack:
        if out:
            out.mkdir(parents=True)
        yield out or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="that each kind of end happens")
    parser.add_argument("--seconds", type=float, default=0.5, help="of an image")
    parser.add_argument("--pause", type=float, default=8, help="seconds of work, at most, before the next end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder for images and runs; without it nothing is kept")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs, without Ray")
    parser.add_argument("--label", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.label:
        manifest, teacher, out, address = asked.label
        sys.exit(label(manifest, teacher, out, address, asked.seconds))
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        asked.times, asked.seconds, asked.pause = 1, 0.05, 0.2
    dice = random.Random(asked.seed)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch(asked.out))
        images = int(asked.times * (200 if asked.smallest else 64 / asked.seconds)) + UNIT
        manifest, teacher = tiny_images(folder, images), checkpoint(folder)

        def command(name: str, address: str) -> Command:
            place = folder / name.replace(" ", "-")
            place.mkdir()
            words = [sys.executable, __file__, "--seconds", asked.seconds, "--label", manifest, teacher, place / "run"]
            return Command(place, [*map(str, words), address])

        print(f"\n### Images of {asked.seconds:g} s, units of {UNIT}\n")
        print("| goes | times | images begun again | each time | at most, by one process | median s until it is gone |")
        print("|---|---:|---:|---:|---:|---:|")
        signals = {"the command, by SIGTERM": signal.SIGTERM, "the command, by SIGKILL": signal.SIGKILL}
        for name, number in list(signals.items())[: 1 if asked.smallest else 2]:
            run = command(name, "")
            the_command(run, number, asked.times, asked.pause, dice)
            row(name, run, images)
        if asked.smallest:
            return
        ray_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        cluster = stack.enter_context(ray_cluster(ray_folder))
        run = command("a worker of Ray, by SIGTERM", cluster.address)
        on_ray(run, lambda: a_worker(run), asked.times, asked.pause, dice)
        row("a worker of Ray, by SIGTERM", run, images)
        for name, go in (
            ("a machine of Ray, with notice", with_notice), ("a machine of Ray, without notice", without_notice)
        ):  # fmt: skip
            run = command(name, cluster.address)
            on_ray(run, lambda go=go: go(cluster, dice), asked.times, asked.pause, dice)  # type: ignore[misc]
            row(name, run, images)


if __name__ == "__main__":
    main()
