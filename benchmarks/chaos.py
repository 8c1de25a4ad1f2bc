"""Kill workers, machines and commands while labels are made, and compare what comes out with an undisturbed run.

python benchmarks/chaos.py [--kills 200] [--pause 2.5] [--seed 0] [--images 300] [--spare] [--out DIR]
python benchmarks/chaos.py --ordered [COMMAND ...]      kills before every change of a file, see ordered_kills.py

A Ray cluster on this machine (a head without CPUs, two nodes of one CPU) and `autolabel generate` as a process of its
own. SIGKILL comes at random moments: half to actors, a quarter to nodes (a new one joins at once), a quarter to the
command, which is then started again. A run that is done is checked, and the next one begins in another folder: Zarr or
PNG, now and then without Ray, until all kills are spent. Exit code 1 if anything differs from the undisturbed run.
Linux only: workers are found through /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from autolabel.manifests import storage
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.labels import LABELS, zarr_folder
from autolabel.manifests.run.shards import DamagedLabel
from autolabel.manifests.samples import save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import write_city
from autolabel.manifests.schemas import STATISTICS
from autolabel.pipeline.label import DEATHS
from autolabel.pipeline.records import all_rows
from autolabel.pipeline.verify import verify
from autolabel.teacher.checkpoints import DRAWN_STREETS

SHARD = 4  # images of a unit
ANY_TIME = 0.25  # share of kills that also come while no worker has a unit: commands, nodes and workers are starting
CHECK_EVERY = 5  # kills
KINDS = "actor node driver actor local actor node actor driver actor node actor driver actor node actor".split()
LOCAL_KILLS = 4  # of one run without Ray: only the command itself can be killed
RUNS = (("ray", "zarr"), ("local", "png"), ("ray", "png"), ("ray", "zarr"), ("local", "zarr"), ("ray", "png"))
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
TIMINGS = ("decode_ms", "infer_ms", "encode_ms", "worker")  # may differ between two runs; nothing else may
LIVE = ("progress.json", ".lock")  # written by every call
DIED = "worker processes died or hung"


# --- what is labelled -------------------------------------------------------------------------------------------------


def draw(root: Path, images: int) -> tuple[Path, Path]:
    """A manifest of drawn street scenes with coarse labels, five of them damaged, and the teacher of such scenes."""
    data = root / "data"
    write_city(data, seed=1, fine=0, coarse=images, val=0, height=96, width=192)
    photographs = sorted((data / "leftImg8bit" / "train_extra").rglob("*.png"))
    dice = random.Random(0)
    no_png, empty, *later = dice.sample(photographs, 5)
    no_png.write_bytes(b"no image at all")
    empty.write_bytes(b"")
    save_manifest(root / "coarse.parquet", scan(data, layout="cityscapes", splits=["train_extra"])[0])
    short, flipped, gone = later  # since they were scanned
    short.write_bytes(short.read_bytes()[:2000])
    noise = bytearray(flipped.read_bytes())
    noise[len(noise) // 2] ^= 1
    flipped.write_bytes(noise)
    gone.unlink()
    return root / "coarse.parquet", DRAWN_STREETS


@dataclass
class Driver:
    """One run folder and its command. process: the command that runs.

    seen: attempts at each unit, by their tags. most: attempts at one of the units that are not committed yet.
    """

    folder: Path
    engine: str
    store: str
    command: list[str]
    seen: dict[str, set[str]] = field(default_factory=dict)
    most: int = 0
    process: int = 0
    started: float = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        self.started = time.time()
        with open(self.log, "ab") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.process = process.pid
        return process

    def at_work(self) -> set[int]:
        """The command itself, if it has a unit: without Ray it is its own worker."""
        counters = RunFolder(self.folder).progress_path
        busy = _changed(counters) > self.started and json.loads(counters.read_bytes())["workers"]
        return {self.process} if busy else set()

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def look(self) -> None:
        """Remember who was at which unit after a death: the notes go when the unit is committed."""
        self.most = 0
        for path in RunFolder(self.folder).attempts.glob("*.jsonl"):
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                continue
            tags = {line.split('"')[3] for line in lines if line.startswith('{"attempt": "')}
            self.seen.setdefault(path.stem, set()).update(tags)
            self.most = max(self.most, len(tags))

    def begun_again(self) -> int:
        """How often a unit was begun again; label PNGs are noted without a death, too."""
        return sum(len(tags) - (self.store == "png") for tags in self.seen.values())


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def make_run(folder: Path, engine: str, store: str, manifest: Path, teacher: Path, address: str | None) -> Driver:
    options = {"teacher": teacher, "out": folder, "engine": engine, "store": store}
    options |= {"unit-size": SHARD, "max-quarantined": 1} | ({"address": address} if address else {})
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return Driver(folder, engine, store, [sys.executable, "-m", "autolabel.cli", "generate", str(manifest), *words])


# --- what must not differ ---------------------------------------------------------------------------------------------


def label_bytes(run: Path) -> dict[str, bytes | None]:
    """Every committed label, read back with its checksum; None for one that is damaged."""
    found: dict[str, bytes | None] = {}
    labels = Run.open(run).labels
    for name in labels:
        try:
            found[name] = labels[name].tobytes()
        except DamagedLabel:
            found[name] = None
    return found


def wrong_labels(run: Path, expected: dict[str, bytes | None]) -> tuple[list[str], int]:
    """Committed labels that differ from the expected ones, and how many were compared."""
    found = label_bytes(run) if (run / "run.json").is_file() else {}
    wrong = [name for name, label in found.items() if label is None or label != expected.get(name)]
    return [f"the label of {name} is another" for name in wrong], len(found)


def differences(run: Path, quiet: Path) -> list[str]:
    """What a finished run has otherwise than an undisturbed one of the same store. Both are finished.

    Tables are compared as sorted rows, without the columns `TIMINGS`.
    """
    found = [f"verify: {fault}" for fault in verify(run).faults]
    found += wrong_labels(run, label_bytes(quiet))[0]
    expected, there = _files(quiet), _files(run)
    found += [f"{name} is missing" for name in expected.keys() - there.keys()]
    found += [f"{name} is left over" for name in there.keys() - expected.keys()]
    found += [
        f"{name} has other bytes"
        for name in expected.keys() & there.keys()
        if name.startswith((f"{zarr_folder(LABELS)}/", f"{LABELS}/")) and expected[name] != there[name]
    ]
    tables = ("manifest.parquet", "quarantine.parquet", *(f"stats/{name}.parquet" for name in STATISTICS))
    found += [f"the rows of {name} differ" for name in tables if _rows(run / name) != _rows(quiet / name)]
    names = [row.sample_id for row in all_rows(run, ["sample_id"])]
    opened = Run.open(run)
    asked = _column(opened.input_manifest, "sample_id")
    if sorted(names) != sorted(asked):
        found.append(f"records name {len(names)} samples, {len(set(names))} of them different, of {len(asked)}")
    accounts = opened.accounts
    if (
        accounts is None
        or not accounts.balanced()
        or accounts.left
        or accounts.asked != len(asked)
        or opened.state != "complete"
    ):
        found.append(f"the accounts are {accounts}, {opened.state}")
    return [f"{run.name}: {what}" for what in found]


def _files(run: Path) -> dict[str, str]:
    """The sha256 of every file by its name; without the generations of records, which tell how often they were made."""
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    return {re.sub(r"^(units/.+)\.\d+\.parquet$", r"\1.parquet", name): storage.sha256(files[name]) for name in files}


def _rows(table: Path) -> list[str]:
    if not table.is_file():
        return []
    found = pq.read_table(table)
    return sorted(map(repr, found.drop_columns([n for n in TIMINGS if n in found.column_names]).to_pylist()))


def _column(table: Path, name: str) -> list[Any]:
    return list(pq.read_table(table, columns=[name])[name].to_pylist())


# --- killing ----------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """One SIGKILL. hit: processes that had a unit and lost it; before: how many had one. back: seconds to as many."""

    kind: str
    hit: set[int]
    before: int
    at: float
    back: float | None = None


@dataclass
class Pause:
    """Seconds until the next kill. They pass while a worker has a unit, or always."""

    left: float
    any_time: bool


def processes(raylets: set[int]) -> dict[int, str]:
    """Worker processes with an actor of ours, by number: `ray::Worker.run` while they have a unit."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            status = Path(entry.path, "stat").read_text()
            title = Path(entry.path, "cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:  # it has ended
            continue
        if int(status.rpartition(")")[2].split()[1]) in raylets and title.startswith("ray::Worker"):
            found[int(entry.name)] = title.strip()
    return found


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@contextmanager
def ray_cluster(folder: Path) -> Iterator[Any]:
    """A head and two nodes, which keep their files in `folder`; only this process and its children know the token."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    os.environ.update(RAY_raylet_start_wait_time_s="120", RAY_TMPDIR=str(folder))
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


class Chaos:
    """Deals the kills, and keeps account of what they did."""

    def __init__(self, cluster: Any, asked: argparse.Namespace) -> None:
        self.cluster, self.pause, self.spare, self.dice = cluster, asked.pause, asked.spare, random.Random(asked.seed)
        deck = [KINDS[k % len(KINDS)] for k in range(asked.kills)]
        self.dice.shuffle(deck)
        self.cards = {
            "ray": [kind for kind in deck if kind != "local"],
            "local": [kind for kind in deck if kind == "local"],
        }
        self.kills: list[Kill] = []
        self.ends: Counter[str] = Counter()  # of commands that nobody killed
        self.faults: list[str] = []
        self.compared = self.restarts = 0

    def disturb(self, run: Driver, expected: dict[str, bytes | None]) -> None:
        """Start a run, and keep on killing until it is done."""
        cards = self.cards[run.engine]
        enough = max(0, len(cards) - LOCAL_KILLS) if run.engine == "local" else 0
        pause, waiting = self._pause(), list[Kill]()
        driver, now = run.start(), time.monotonic()
        try:
            while (code := driver.poll()) != 0:
                if code is not None:
                    self._ended(run, code)
                    driver = run.start()
                run.look()
                busy = self._busy(run)
                before, now = now, time.monotonic()
                pause.left -= now - before if busy or pause.any_time else 0
                if len(cards) > enough and pause.left <= 0:
                    pause = self._pause()
                    kill = self._kill(run, driver)
                    if kill is not None:
                        cards.pop()
                        self.kills.append(kill)
                        waiting.append(kill)
                        if len(self.kills) % CHECK_EVERY == 0:
                            self.compare(run, expected)
                    if driver.poll() == -signal.SIGKILL:
                        self.restarts += 1
                        driver, waiting = run.start(), waiting[-1:]
                    now = time.monotonic()
                waiting = [one for one in waiting if one.hit and one.back is None]
                for one in waiting:
                    if len(busy - one.hit) >= one.before:
                        one.back = now - one.at
                time.sleep(0.03)
        finally:
            driver.kill()
            driver.wait()

    def compare(self, run: Driver, expected: dict[str, bytes | None]) -> None:
        wrong, compared = wrong_labels(run.folder, expected)
        self.faults += [f"{run.folder.name}: {what}" for what in wrong]
        self.compared += compared

    def _pause(self) -> Pause:
        return Pause(self.dice.expovariate(1 / self.pause), self.dice.random() < ANY_TIME)

    def _ended(self, run: Driver, code: int) -> None:
        """A command ended by itself before its work was done: it is started again, but not for ever."""
        last = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        self.ends[f"exit code {code}: {' '.join(last)}"] += 1
        self.restarts += 1
        if self.ends.total() > 20:
            raise RuntimeError(f"commands keep ending by themselves: {self.ends}")

    def _actors(self) -> dict[int, str]:
        return processes({raylet(node) for node in self.cluster.worker_nodes})

    def _busy(self, run: Driver) -> set[int]:
        """Processes that have a unit."""
        return run.at_work() if run.engine == "local" else at_work(self._actors())

    def _kill(self, run: Driver, driver: subprocess.Popen[bytes]) -> Kill | None:
        """Do what the last card says; None where there is nothing to kill at this moment."""
        kind = self.cards[run.engine][-1]
        before, actors = self._busy(run), self._actors()
        if self.spare and run.most >= DEATHS:  # the first death is not noted, each of the next three may hit an image
            return None
        if driver.poll() is not None or (kind == "actor" and not actors):
            return None
        at = time.monotonic()
        if kind in ("driver", "local"):
            hit = before
            driver.kill()
            driver.wait()
        elif kind == "node":
            node = self.dice.choice(sorted(self.cluster.worker_nodes, key=raylet))
            hit = at_work(processes({raylet(node)}))
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(**NODE)
        else:
            victim = self.dice.choice(sorted(actors))
            hit = before & {victim}
            os.kill(victim, signal.SIGKILL)
        return Kill(kind, hit, len(before), at)


def at_work(actors: dict[int, str]) -> set[int]:
    return {number for number, title in actors.items() if title.endswith(".run")}


# --- all of it --------------------------------------------------------------------------------------------------------


def finish(run: Driver, quiet: Path) -> list[str]:
    """What is wrong with a run that is done, and with the same command once more."""
    found = differences(run.folder, quiet)
    before = _files(run.folder)
    again = subprocess.run(run.command, capture_output=True, text=True, check=False)
    if again.returncode or "nothing was to be done" not in again.stdout:
        found.append(f"{run.folder.name}: the same command once more said {again.stdout}{again.stderr}")
    after = _files(run.folder)
    touched = [name for name in _files(quiet) if name not in LIVE and before.get(name) != after.get(name)]
    return found + [f"{run.folder.name}: the same command once more changed {name}" for name in touched]


def chaos(out: Path, asked: argparse.Namespace, ray_folder: Path) -> bool:
    """Everything, printed; whether nothing was wrong."""
    manifest, teacher = draw(out, asked.images)
    quiet: dict[str, Path] = {}
    for store in ("zarr", "png"):
        undisturbed = make_run(out / f"quiet-{store}", "local", store, manifest, teacher, None)
        subprocess.run(undisturbed.command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        quiet[store] = undisturbed.folder
    expected = label_bytes(quiet["zarr"])
    runs: list[Driver] = []
    innocent = 0
    with ray_cluster(ray_folder) as cluster:
        started = time.monotonic()
        dealer = Chaos(cluster, asked)
        for engine, store in cycle(RUNS):
            if not any(dealer.cards.values()):
                break
            if not dealer.cards[engine]:
                continue
            address = cluster.address if engine == "ray" else None
            run = make_run(out / f"run-{len(runs):02d}-{engine}-{store}", engine, store, manifest, teacher, address)
            runs.append(run)
            dealer.disturb(run, expected)
            dealer.compare(run, expected)
            dealer.faults += finish(run, quiet[store])
            innocent += sum(DIED in why for why in _column(run.folder / "quarantine.parquet", "reason"))
            print(
                f"{time.monotonic() - started:5.0f} s  {run.folder.name}: {len(dealer.kills)} kills so far", flush=True
            )
    show(dealer, runs, asked.images, innocent, time.monotonic() - started)
    return not dealer.faults


def show(dealer: Chaos, runs: list[Driver], images: int, innocent: int, seconds: float) -> None:
    print("\n| kills of | kills | hit a worker that had a unit | median s until as many have one again |")
    print("|---|---:|---:|---:|")
    names = {"actor": "an actor", "node": "a node", "driver": "the command", "local": "the command, without Ray"}
    for kind, name in names.items():
        some = [kill for kill in dealer.kills if kill.kind == kind]
        back = [kill.back for kill in some if kill.back is not None]
        median = f"{statistics.median(back):.1f}" if back else "–"
        print(f"| {name} | {len(some)} | {sum(bool(kill.hit) for kill in some)} | {median} |")
    again = sum(run.begun_again() for run in runs)
    engines = Counter(f"{run.engine} {run.store}" for run in runs)
    print(f"\nruns: {len(runs)} of {images} images ({', '.join(f'{n} {name}' for name, n in engines.items())})")
    print(f"commands started again: {dealer.restarts}, of them ended by themselves: {dealer.ends.total()}")
    for why, times in dealer.ends.items():
        print(f"  {times} x {why}")
    print(f"units begun again: {again}; images labelled again: at most {SHARD * again} of {len(runs) * images}")
    print(f"labels compared: {dealer.compared}")
    print(f"images quarantined that are not to blame: {innocent}")
    print(f"differences: {len(dealer.faults)}")
    for fault in dealer.faults:
        print(f"  {fault}")
    print(f"seconds: {seconds:.0f}", flush=True)


def main() -> None:
    """Kill, compare, print."""
    if sys.argv[1:2] == ["--ordered"]:
        script = Path(__file__).with_name("ordered_kills.py")
        os.execv(sys.executable, [sys.executable, str(script), *sys.argv[2:]])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pause", type=float, default=2.5, help="seconds until the next kill, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--spare", action="store_true", help="kill no unit so often that an innocent image is blamed")
    parser.add_argument("--out", type=Path, help="a new folder for images and runs; without it nothing is kept")
    asked = parser.parse_args()
    with ExitStack() as stack:
        ray_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        out = asked.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        well = chaos(out.absolute(), asked, ray_folder)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
