"""Kill a command right before every file that it creates, renames or removes, one after the other.

python benchmarks/ordered_kills.py [COMMAND ...] [--every 1] [--full] [--out DIR]

Without names it does all: generate, generate-png, grown, relabel, repair, export, export-hf, scan, fuse, train, audit,
report, compare. A command runs in a forked copy of this process, which has imported everything, and an audit hook of
Python sees what it is about to do to the files of its folder. SIGKILL comes there; with --full every new file is
refused from there on, as a full disk would. Then the same command is made again. It must succeed, and leave the files
of a command that nobody disturbed: the same labels, rows and weights but for times and rates, and nothing beside them.
Exit code 1 if anything differs. Linux and macOS.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked copy has no other thread

import pyarrow.parquet as pq
import torch

import autolabel.cli
import autolabel.manifests.fuse
import autolabel.pipeline.analysis.audit
import autolabel.pipeline.export
import autolabel.pipeline.preview
import autolabel.pipeline.relabel
import autolabel.pipeline.report.write
import autolabel.pipeline.source
import autolabel.pipeline.verify
import autolabel.student.comparison.compare
import autolabel.student.evaluate
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.manifests.scenes import write_city
from autolabel.teacher.checkpoints import DRAWN_STREETS

TIMINGS = ("decode_ms", "infer_ms", "encode_ms", "worker")  # columns that may differ
RATES = {  # keys of JSON and of checkpoints that may differ: times, rates, memory, drivers, checksums that follow
    "budgets", "crc32c", "decode_ms", "encode_ms", "eta_s", "fence", "images_per_s", "infer_ms", "seconds",
    "tables_sha256", "updated",
}  # fmt: skip
SEVERAL = re.compile(r"pictures-[0-9a-f]{12}")  # a folder of pictures has a new name every time
GENERATION = re.compile(r"(?<=\.)\d+\.(?=parquet$)")  # in the name of a commit record
CREATES = {"open": 0, "os.link": 1, "os.mkdir": 0}  # events of Python, and which argument is the path
REMOVES = {"os.remove": 0, "os.rmdir": 0}

IMAGES = "city/leftImg8bit/train_extra"
TINY = ["--steps", "2", "--batch-size", "2", "--crop", "64x64", "--validations", "2"]

Words = list[str]


@dataclass(frozen=True)
class Case:
    """A command that is disturbed, and those that follow once it has been made again.

    `before` fills the folder in which it works.
    """

    command: Words
    then: Sequence[Words] = ()
    before: Callable[[Path], object] = lambda place: None


@dataclass
class Account:
    """The outcome of all kills of a case."""

    name: str
    kills: int = 0
    resumed: int = 0
    equal: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


# --- a command in a copy of this process ------------------------------------------------------------------------------


class Watch:
    """Counts the changes that a command is about to make to files below `place`, and disturbs it at one of them."""

    def __init__(self, place: Path, at: int, full: bool) -> None:
        self.place, self.at, self.full, self.changes = f"{place}{os.sep}", at, full, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See an event of Python, as `sys.addaudithook` says."""
        where = {**CREATES, **REMOVES, "os.rename": 1}.get(event)
        if where is None or (event == "open" and not arguments[2] & os.O_CREAT):
            return
        path = arguments[where]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.abspath(os.fsdecode(path))
        there = os.path.lexists(name)
        if not name.startswith(self.place) or (event in CREATES and there) or (event in REMOVES and not there):
            return
        self.changes += 1
        if self.full:
            if 0 < self.at <= self.changes and event in CREATES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        elif self.changes == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def call(words: Words, log: Path, *, place: Path, at: int = 0, full: bool = False) -> tuple[int, str, int]:
    """Run a command; return its exit code, what it printed, and the number of changes. at: where it is disturbed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.close(reader)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            watch = Watch(place, at, full)
            sys.addaudithook(watch)
            try:
                autolabel.cli.main.main(words, "autolabel")
            except SystemExit as leaving:
                status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            os.write(writer, str(watch.changes).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as told:
        changes = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, log.read_text(errors="replace"), int(changes or 0)


# --- what must not differ ---------------------------------------------------------------------------------------------


def outcome(place: Path) -> dict[str, object]:
    """Every file below a folder by its name, as a value that is the same for two commands that did the same."""
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        name = SEVERAL.sub("pictures", path.relative_to(place).as_posix())
        name = GENERATION.sub("", name)  # a command that was killed has committed a unit more often
        if path.is_file():
            found[f"{name} twice" if name in found else name] = content(path)
    return found


def content(path: Path) -> object:
    """A file's content without times and rates."""
    if path.name.startswith(".lock") or path.name == "progress.json":
        return ""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        rows = table.drop_columns([name for name in TIMINGS if name in table.column_names]).to_pylist()
        return sorted(map(repr, rows)), json.loads((table.schema.metadata or {}).get(b"autolabel", b"null"))
    if path.suffix == ".json" and not path.parent.name.startswith("b"):
        return without_rates(json.loads(path.read_bytes()))
    if path.suffix == ".pt":
        return without_rates(torch.load(path, weights_only=True))
    if path.suffix == ".jsonl":
        return [without_rates(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".html":
        return re.sub(r"[\d.,]+ (images/s|s\b)", r"\1", SEVERAL.sub("pictures", path.read_text()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_rates(value: Any) -> object:
    """A nested value without the keys `RATES`; tensors as digests."""
    if isinstance(value, dict):
        return {str(key): without_rates(inner) for key, inner in value.items() if key not in RATES}
    if isinstance(value, list | tuple):
        return [without_rates(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()
    return repr(value)


def differences(now: dict[str, object], quiet: dict[str, object]) -> list[str]:
    """The files that differ, in words."""
    found = [f"{name} is missing" for name in quiet.keys() - now.keys()]
    found += [f"{name} is left over" for name in now.keys() - quiet.keys()]
    return found + [f"{name} differs" for name in quiet.keys() & now.keys() if quiet[name] != now[name]]


# --- the commands -----------------------------------------------------------------------------------------------------


class World:
    """Drawn streets of 64 x 64 pixels, their manifests, and what commands begin with."""

    def __init__(self, root: Path) -> None:
        self.root, self.place, self.log = root, root / "place", root / "log"
        write_city(root / "city", 1, fine=4, coarse=7, val=2, height=64, width=64, truth=root / "truth")
        self.place.mkdir()
        for name, split in (("fine", "train"), ("coarse", "train_extra"), ("val", "val")):
            self.must(["manifest", "scan", f"{root}/city", "--split", split, "-o", f"{root}/{name}.parquet"])
        truth = ["--labels", f"{root}/truth", "--label-space", "cityscapes", "--label-ids", "source"]
        self.must(["manifest", "scan", f"{root}/{IMAGES}", *truth, "-o", f"{root}/truth.parquet"])
        coarse = load_manifest(root / "coarse.parquet")
        self.few = replace(coarse, samples=coarse.samples[:4])
        self.kept(self.place)
        shutil.copytree(self.place, root / "source")
        (root / "strict.toml").write_text('name = "strict"\nthreshold = 0.7\n')

    def must(self, words: Words) -> None:
        """Run a command that nobody disturbs."""
        code, said, _ = call(words, self.log, place=self.place)
        if code:
            raise RuntimeError(f"autolabel {' '.join(words)} ended with {code}:\n{said}")

    def generate(self, source: Path, out: Path, *more: str) -> Words:
        """The command that labels images, in units of three."""
        words = ["generate", str(source), "--teacher", str(DRAWN_STREETS), "--out", str(out), "--engine", "local"]
        return [*words, "--scales", "1", "--unit-size", "3", *more]

    def kept(self, place: Path) -> None:
        """A run with kept confidence."""
        self._once("kept", place, self.generate(self.root / "coarse.parquet", place / "run", "--keep-confidence", "8"))

    def begun(self, place: Path) -> None:
        """A run over the first images of a manifest that has then grown."""
        save_manifest(place / "coarse.parquet", self.few)
        self._once("begun", place, self.generate(place / "coarse.parquet", place / "run"))
        save_manifest(place / "coarse.parquet", load_manifest(self.root / "coarse.parquet"))

    def damaged(self, place: Path) -> None:
        """A run whose shard, record, table and store have gone bad."""
        self.kept(place)
        run = place / "run"
        shard, record, *_ = *sorted(run.glob("labels.zarr/*/c.0*")), *sorted(run.glob("units/*000001*"))
        for path in (shard, record, run / "stats" / "images.parquet"):
            path.write_bytes(path.read_bytes()[:-9] + b"123456789")
        (run / "labels.zarr" / "zarr.json").unlink()

    def reported(self, place: Path) -> None:
        """A run with a report."""
        self.kept(place)
        self._once("reported", place, ["report", str(place / "run"), "--images", "2"])

    def students(self, place: Path) -> None:
        """Students that are trained, but not compared yet."""
        self._once("students", place, self.compare(place))
        for path in (*place.glob("compare/*.json"), *place.glob("compare/*.html")):
            path.unlink()

    def compare(self, place: Path) -> Words:
        """The command that compares students of two steps."""
        root = self.root
        words = ["compare", "--fine", f"{root}/fine.parquet", "--coarse", f"{root}/coarse.parquet", "--auto"]
        words += [f"{root}/source/run", "--val", f"{root}/val.parquet", "--out", f"{place}/compare"]
        return [*words, *TINY]

    def _once(self, name: str, place: Path, words: Words) -> None:
        """Fill the folder with what a command leaves, made the first time."""
        made = self.root / name
        if not made.exists():
            self.must(words)
            shutil.copytree(place, made)
        else:
            shutil.copytree(made, place, dirs_exist_ok=True)

    def cases(self) -> dict[str, Case]:
        """Every command that is disturbed."""
        root, place = self.root, self.place
        run = place / "run"
        source = root / "source" / "run"
        audit = ["audit", str(run), "--truth", f"{root}/truth.parquet"]
        again = self.generate(root / "coarse.parquet", run, "--keep-confidence", "8")
        fuse = [
            "manifest",
            "fuse",
            f"{root}/fine.parquet",
            f"{source}/manifest.parquet",
            "-o",
            f"{place}/fused.parquet",
        ]
        export = ["export", str(source), "-o", f"{place}/sent", "--to"]
        scan = ["manifest", "scan", f"{root}/city", "--split", "train", "-o", f"{place}/scanned.parquet"]
        train = ["train", f"{root}/fine.parquet", "--val", f"{root}/val.parquet", "--out", f"{place}/student", *TINY]
        return {
            "generate": Case(self.generate(root / IMAGES, run, "--keep-confidence", "8")),
            "generate-png": Case(self.generate(root / "coarse.parquet", run, "--store", "png")),
            "grown": Case(self.generate(place / "coarse.parquet", run), before=self.begun),
            "relabel": Case(["relabel", str(source), "--policy", f"{root}/strict.toml", "--out", str(run)]),
            "repair": Case(["verify", str(run), "--repair"], then=[again], before=self.damaged),
            "export": Case([*export, "cityscapes"]),
            "export-hf": Case([*export, "hf"]),
            "scan": Case(scan),
            "fuse": Case(fuse),
            "train": Case(train),
            "audit": Case(audit, before=self.kept),
            "report": Case(["report", str(run), "--images", "3"], before=self.reported),
            "compare": Case(self.compare(place), before=self.students),
        }


# --- all of it --------------------------------------------------------------------------------------------------------


def begin(world: World, case: Case, *, at: int = 0, full: bool = False) -> tuple[int, str, int]:
    """Run the command of a case in a folder that is as it was before, and return what `call` does."""
    for path in world.place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    case.before(world.place)
    return call(case.command, world.log, place=world.place, at=at, full=full)


def disturb(world: World, name: str, *, every: int, full: bool) -> Account:
    """Disturb a case at each of its changes, make it again, and compare."""
    case, account, started = world.cases()[name], Account(name), time.monotonic()
    code, said, changes = begin(world, case)
    if code:
        raise RuntimeError(f"{name} ended with {code}:\n{said}")
    for words in case.then:
        world.must(words)
    quiet = outcome(world.place)
    for at in range(1, changes + 1, every):
        code, said, _ = begin(world, case, at=at, full=full)
        if code == 0 and not full:  # counters are written by time: there were fewer changes than before
            continue
        account.kills += 1
        clear = code == 0 or (code == 2 and "No space left" in said and "free some space" in said)
        if not clear if full else code != -signal.SIGKILL:
            account.faults.append(f"{name}, change {at}: ended with {code}: {said[-300:]}")
            continue
        for words in (case.command, *case.then):
            code, said, _ = call(words, world.log, place=world.place)
            if code:
                account.faults.append(f"{name}, change {at}: {words[0]} again ended with {code}: {said[-300:]}")
                break
        else:
            account.resumed += 1
            wrong = differences(outcome(world.place), quiet)
            account.equal += not wrong
            account.faults += [f"{name}, change {at}: {what}" for what in wrong]
    account.seconds = time.monotonic() - started
    return account


def main() -> None:
    """Disturb, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*")
    parser.add_argument("--every", type=int, default=1, help="disturb at every so manieth change only")
    parser.add_argument("--full", action="store_true", help="a full disk instead of a kill")
    parser.add_argument("--out", type=Path, help="a new folder to work in; without it nothing is kept")
    asked = parser.parse_args()
    with ExitStack() as stack:
        out = asked.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out.mkdir(parents=True, exist_ok=True)
        world = World(out.resolve())
        accounts = []
        for name in asked.commands or world.cases():
            accounts.append(disturb(world, name, every=asked.every, full=asked.full))
            print(f"{accounts[-1].seconds:5.0f} s  {name}: {accounts[-1].kills}", file=sys.stderr, flush=True)
    print(f"| command | {'full disks' if asked.full else 'kills'} | resumed | equal |\n|---|---:|---:|---:|")
    for one in accounts:
        print(f"| {one.name} | {one.kills} | {one.resumed} | {one.equal} |")
    numbers = (sum(getattr(one, name) for one in accounts) for name in ("kills", "resumed", "equal"))
    print(f"| all | {' | '.join(map(str, numbers))} |")
    faults = [fault for one in accounts for fault in one.faults]
    print(f"\ndifferences: {len(faults)}", *faults, sep="\n  ", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
