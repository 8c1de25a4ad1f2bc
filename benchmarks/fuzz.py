"""Feed broken inputs to every reader, and to whole commands, and count what comes out.

python benchmarks/fuzz.py [--reads 100000] [--commands 2000] [--seed 0] [--only KIND,…] [--keep FOLDER]

Each input is a good file that one of benchmarks/mutators.py has broken. A reader must refuse it with a clear error of
its own, or read exactly what the good file holds (`same`); where a format carries no checksum, or the mutation wrote a
well-formed file, other content is no fault (`other`). A command must end with exit code 0, 2 or 3. Faults are

error     an exception that is nobody's refusal; a traceback, exit code 70 or a signal of a command
wrong     a blind mutation of a file with a checksum was read as something else; labels of whole images changed
slow      more than 5 s of CPU, or no end
large     a process of more than 2 GiB

Every kind runs in processes of its own. Case N of a kind follows from --seed alone; the inputs of faults are written to
--keep. Exit code 1 if there is any fault. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mutators
import numpy as np
from mutators import BLIND, Mutator
from PIL import Image

import autolabel.cli
import autolabel.pipeline.preview
import autolabel.pipeline.report.write
import autolabel.student.evaluate
import autolabel.student.train
from autolabel.manifests.class_map import load_class_map
from autolabel.manifests.images import decode_image, decode_label, read_size
from autolabel.manifests.label_space import CITYSCAPES, load_label_space
from autolabel.manifests.policy import REFERENCE, load_policy
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.shards import DamagedLabel
from autolabel.manifests.samples import load_manifest, open_manifest
from autolabel.manifests.scenes import draw_scene
from autolabel.manifests.wording import Table
from autolabel.pipeline.adopted import TABLE, Adopted
from autolabel.pipeline.analysis.audit_record import Audit
from autolabel.pipeline.attempts import Attempt
from autolabel.pipeline.records import parse_record
from autolabel.pipeline.units import Plan
from autolabel.teacher.checkpoints import DRAWN_STREETS, load_network, read_checkpoint, save_checkpoint

SLOW = 5.0  # seconds of CPU
PATIENCE = 60  # seconds of a clock until a command counts as one without end
LARGE = 2 << 30  # bytes
OUTCOMES = ("refused", "same", "other")
FAULTS = ("error", "wrong", "slow", "large")


@dataclass
class Counted:
    """What became of the cases of a kind. notes: the first of each fault, in words."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    cpu: float = 0.0
    peak: int = 0

    def fault(self, kind: str, note: str) -> None:
        """Count a fault, and remember the first few."""
        self.outcomes[kind] += 1
        if len(self.notes) < 12:
            self.notes.append(f"{kind}: {note}")

    @property
    def faults(self) -> int:
        """The number of faults."""
        return sum(self.outcomes[kind] for kind in FAULTS)


# --- the good files ---------------------------------------------------------------------------------------------------


def command(*words: object) -> None:
    """Run a command that must succeed."""
    result = autolabel.cli.main.main([str(word) for word in words], "autolabel", standalone_mode=False)
    assert not result, words


def draw_world(root: Path) -> None:
    """Fill a folder with one good file of every kind, made by the commands from four drawn photographs and one more."""
    for k, (v, suffix) in enumerate((("", "png"), ("", "jpg"), ("", "webp"), ("", "png"), ("v", "png"))):
        scene = draw_scene(k, height=64, width=64)
        for name, array, end in (("i", scene.image, suffix), ("l", scene.fine, "png"), ("c", scene.coarse, "png")):
            (root / (v + name)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / (v + name) / f"d_{k}.{end}")
    (root / "policy.toml").write_text(REFERENCE.to_toml())
    (root / "space.json").write_text(CITYSCAPES.to_json())
    own = "".join(f'"{name}" = ["{name}"]\n' for name in CITYSCAPES.names)
    (root / "classes.toml").write_text(f"[classes]\n{own}")
    known = read_checkpoint(DRAWN_STREETS)
    save_checkpoint(root / "teacher.pt", load_network(DRAWN_STREETS, known), arch=known.arch, space=CITYSCAPES)
    shutil.copy(DRAWN_STREETS, root / "teacher.safetensors")
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for v, name in (("", "m.parquet"), ("v", "v.parquet")):
            labels = ("--labels", f"{v}l", "--coarse", f"{v}c", "--label-ids", "source")
            command("manifest", "scan", f"{v}i", *labels, "--label-space", "cityscapes", "-o", name)
        run = ("generate", "m.parquet", "--teacher", "teacher.pt", "--scales", 1, "--unit-size", 2, "--engine", "local")
        command(*run, "--out", "run", "--keep-confidence", 6)
        command(*run, "--out", "png", "--store", "png")
        command("audit", "run", "--truth", "m.parquet")
        command(*ADOPT.split())


def picture_files() -> list[bytes]:
    """Photographs of all kinds that a folder may hold: those that are read, and those that must be refused."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 40, 3), np.uint8).astype(np.uint8))
    grey = Image.fromarray(rng.integers(0, 65535, (24, 40), np.uint16).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    ways: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "PNG", {}), (rgb, "JPEG", {}), (rgb, "WEBP", {}), (rgb, "WEBP", {"lossless": True}), (rgb, "BMP", {}),
        (rgb, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}), (rgb, "JPEG", {"exif": exif}),
        (rgb, "PNG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.convert("CMYK"), "TIFF", {}), (grey, "PNG", {}), (rgb.convert("L"), "JPEG", {}),
        (rgb.convert("RGBA"), "PNG", {}), (rgb.convert("P"), "PNG", {}), (rgb.convert("1"), "PNG", {}),
        (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb, "TIFF", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb, "MPO", {"save_all": True, "append_images": [rgb.rotate(180)]}), (rgb, "GIF", {}), (rgb, "AVIF", {}),
    ]  # fmt: skip
    files = [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)]
    for image, kind, more in ways:
        buffer = io.BytesIO()
        with contextlib.suppress(KeyError, OSError, ValueError):  # this Pillow cannot write it
            image.save(buffer, kind, **more)
            files.append(buffer.getvalue())
    return files


# --- readers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of input: good files, how they are broken, and how they are read.

    read: gets the bytes of a file, and returns something to compare. sound: True where the format carries a checksum
    that the reader looks at; it may depend on the good file. share: part of all reads.
    """

    name: str
    share: int
    files: Sequence[bytes]
    read: Callable[[bytes], Any]
    aware: Sequence[Mutator] = ()
    sound: Callable[[bytes], bool] = lambda data: True


def read_photograph(data: bytes, place: Path) -> Any:
    """Decode, and hold the reader of headers against the reader of pixels."""
    place.write_bytes(data)
    try:
        size = read_size(place)
    except ValueError:
        size = None
    image = decode_image(data)
    if size != image.shape[:2]:
        raise AssertionError(f"the header says {size}, the pixels are {image.shape[:2]}")
    return image.tobytes(), image.shape


def kinds(root: Path) -> list[Kind]:
    """All kinds of input, with the good files of a world."""
    scratch = Path(tempfile.mkdtemp(dir=root.parent))
    record = sorted((root / "run/units").glob("*.parquet"))[0]
    run, manifest = Run.open(root / "run"), open_manifest(root / "m.parquet")
    shards = [p for p in sorted((root / "run/labels.zarr").rglob("*")) if p.is_file() and p.suffix != ".json"]
    png = sorted((root / "png/labels").rglob("*.png"))[0]

    def at(path: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
        def put(data: bytes) -> Any:
            path.write_bytes(data)
            return read()

        return put

    def by_name(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        return at(scratch / name, lambda: read(scratch / name))

    def labels(folder: str) -> Any:
        opened = Run.open(root / folder).labels
        return {name: opened[name].tobytes() for name in opened}

    def plan(path: Path) -> Any:
        return list(Plan(path, 2, manifest.image_root, manifest.label_root))

    def weights(path: Path) -> Any:
        known = read_checkpoint(path)
        digest = hashlib.sha256()
        for name, tensor in sorted(load_network(path, known).state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().view(-1).numpy().tobytes())
        return known.arch, known.label_space, digest.hexdigest()

    def attempt(data: bytes) -> Any:
        unit = next(iter(Plan(run.plan_path, 2, manifest.image_root, manifest.label_root)))
        (scratch / "attempts").mkdir(exist_ok=True)
        (scratch / "attempts" / f"{unit.name}.jsonl").write_bytes(data)
        return Attempt(RunFolder(scratch), unit).careful

    def opened(path: Path) -> Any:
        found = load_manifest(path)
        return found.samples, found.label_space

    def record_of(path: Path) -> Any:
        table, shards = parse_record(path, path.read_bytes())
        return table.to_pylist(), shards

    files = {name: (root / name).read_bytes() for name in ("m.parquet", "policy.toml", "space.json", "run/run.json")}
    files["classes.toml"], adopted = (root / "classes.toml").read_bytes(), root / "adopted" / TABLE
    files |= {name: (root / name).read_bytes() for name in ("teacher.pt", "teacher.safetensors", "run/audit.json")}
    note = b'{"attempt": "0123456789ab"}\n{"attempt": "0123456789ab", "sample": "d_0"}\n'
    return [
        Kind("photograph", 40, picture_files(), lambda data: read_photograph(data, scratch / "p"), [mutators.picture],
             lambda data: data.startswith(b"\x89PNG")),
        Kind("label", 15, [(root / "l" / f"d_{k}.png").read_bytes() for k in range(4)],
             lambda data: decode_label(data, CITYSCAPES, ids="source").tobytes(), [mutators.png]),
        Kind("manifest", 12, [files["m.parquet"]], by_name("m.parquet", opened), [mutators.parquet]),
        Kind("policy", 6, [files["policy.toml"]], by_name("p.toml", lambda p: load_policy(str(p))), [mutators.toml],
             lambda data: False),
        Kind("label space", 6, [files["space.json"]], by_name("s.json", lambda p: load_label_space(str(p))),
             [mutators.json_text], lambda data: False),
        Kind("class map", 4, [files["classes.toml"]], by_name("c.toml", lambda p: load_class_map(str(p))),
             [mutators.toml], lambda data: False),
        Kind("adopted PNGs", 3, [adopted.read_bytes()],
             at(adopted, lambda: Adopted.of(RunFolder(root / "adopted"))), [mutators.parquet]),
        Kind("run.json", 4, [files["run/run.json"]], at(root / "run/run.json", lambda: Run.open(root / "run")),
             [mutators.json_text]),
        Kind("record", 4, [record.read_bytes()], by_name("r.parquet", record_of), [mutators.parquet]),
        Kind("plan", 4, [run.plan_path.read_bytes()], by_name(run.plan, plan), [mutators.noise]),
        Kind("audit.json", 3, [files["run/audit.json"]], by_name("audit.json", Audit.read), [mutators.json_text],
             lambda data: False),
        Kind("attempts", 2, [note], attempt, [mutators.noise], lambda data: False),
        Kind("Zarr shard", 2, [shards[0].read_bytes()], at(shards[0], lambda: labels("run")), [mutators.number]),
        Kind("PNG of a run", 1, [png.read_bytes()], at(png, lambda: labels("png")), [mutators.png]),
        Kind("checkpoint", 1, [files["teacher.pt"]], by_name("c.pt", weights), [mutators.checkpoint]),
        Kind("safetensors", 1, [files["teacher.safetensors"]], by_name("c.safetensors", weights),
             [mutators.safetensors]),
    ]  # fmt: skip


def refusal(error: BaseException) -> bool:
    """True for an error with words of its own: one of ours, a plain ValueError, or one of the system with its file."""
    if not str(error).strip():
        return False
    return type(error).__module__.startswith("autolabel.") or type(error) is ValueError or isinstance(error, OSError)


class Overtime(BaseException):
    """A reader takes too long."""


def _overtime(*_: object) -> None:
    raise Overtime


def fuzz_reads(kind: Kind, cases: int, seed: int, keep: Path | None, counted: Counted) -> Iterator[None]:
    """Read broken inputs of one kind in this process; yields after every case."""
    signal.signal(signal.SIGPROF, _overtime)
    good: dict[int, Any] = {}
    for place, data in enumerate(kind.files):
        with contextlib.suppress(ValueError):  # else it is a kind of file that must be refused
            good[place] = kind.read(data)
    for case in range(cases):
        dice = random.Random(f"{seed} {kind.name} {case}")
        place = dice.randrange(len(kind.files))
        data = kind.files[place]
        aware = bool(kind.aware) and dice.random() < 0.5
        broken = dice.choice(kind.aware if aware else BLIND)(dice, data)
        faults, began = counted.faults, time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SLOW)
        try:
            found = kind.read(broken)
            if place in good and found == good[place]:
                counted.outcomes["same"] += 1
            elif aware or not kind.sound(data) or broken[:8] != data[:8]:
                counted.outcomes["other"] += 1
            else:
                counted.fault("wrong", f"case {case} was read as something else")
        except Overtime:
            counted.fault("slow", f"case {case} took {time.process_time() - began:.1f} s of CPU")
        except Exception as error:
            if refusal(error):
                counted.outcomes["refused"] += 1
            else:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                counted.fault("error", f"case {case}: {type(error).__name__} at {where}: {str(error)[:100]}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        counted.tried += 1
        if keep and counted.faults > faults:
            (keep / f"{kind.name.replace(' ', '-')}-{case}").write_bytes(broken)
        yield


# --- whole commands ---------------------------------------------------------------------------------------------------

ADOPT = (
    "adopt l --manifest m.parquet --out adopted --label-space cityscapes --label-ids source --classes classes.toml"
    " --max-quarantined 1"
)
GENERATE = "generate m.parquet --teacher teacher.pt --scales 1 --unit-size 2 --engine local --max-quarantined 1"
SCAN = "manifest scan i --label-space space.json --labels l --coarse c --label-ids source -o new.parquet"
# A command, how often, and the files that may be broken for it.
COMMANDS = (
    (SCAN, 6, ("i/d_0.png", "i/d_1.jpg", "i/d_2.webp", "l/d_0.png", "c/d_1.png", "space.json")),
    ("manifest show m.parquet", 3, ("m.parquet",)),
    ("manifest fuse m.parquet run/manifest.parquet -o fused.parquet --drop-worst 20%", 4,
     ("m.parquet", "run/manifest.parquet", "run/stats/review.parquet", "run/run.json")),
    (f"{GENERATE} --out new --policy policy.toml", 5,
     ("m.parquet", "i/d_0.png", "i/d_1.jpg", "i/d_2.webp", "c/d_1.png", "policy.toml", "teacher.pt")),
    (f"{GENERATE} --out run --keep-confidence 6", 6,
     ("run/run.json", "run/units/*", "run/plan-*", "run/labels.zarr/**/*", "run/confidence.zarr/**/*", "run/stats/*",
      "i/d_0.png", "run/manifest.parquet", "run/progress.json", "m.parquet")),
    (f"{GENERATE} --out png --store png", 3, ("png/labels/**/*", "png/units/*", "png/run.json", "png/plan-*")),
    (f"{GENERATE} --out new --dry-run", 1, ("m.parquet", "teacher.pt", "i/d_0.png")),
    ("stats run", 3, ("run/stats/*", "run/manifest.parquet", "run/run.json")),
    ("verify run", 4, ("run/**/*",)),
    (ADOPT, 4, ("adopted/**/*", "l/d_0.png", "classes.toml", "m.parquet", "i/d_0.png")),
    ("verify adopted --repair", 2, ("adopted/**/*", "l/d_1.png")),
    ("verify png --repair", 3, ("png/**/*",)),
    ("report run --images 2", 2,
     ("run/stats/*", "run/run.json", "run/progress.json", "run/audit.json", "run/units/*", "i/d_0.png",
      "run/labels.zarr/**/*")),
    ("audit run --truth m.parquet", 2,
     ("run/units/*", "m.parquet", "l/d_0.png", "run/stats/*", "run/labels.zarr/**/*")),
    ("relabel run --policy policy.toml --out re", 2, ("run/units/*", "run/top.zarr/**/*", "run/run.json", "m.parquet")),
    ("diff run png", 1, ("run/units/*", "png/labels/**/*", "run/labels.zarr/**/*", "run/stats/*")),
    ("evaluate teacher.safetensors m.parquet --scales 1", 2,
     ("teacher.safetensors", "m.parquet", "l/d_0.png", "i/d_1.jpg")),
    ("train m.parquet --val v.parquet --out t --steps 1 --batch-size 2 --crop 32x32", 1, ("m.parquet", "l/d_0.png")),
)  # fmt: skip
BY_SUFFIX: dict[str, Sequence[Mutator]] = {
    ".png": [mutators.png], ".jpg": [mutators.jpeg], ".json": [mutators.json_text], ".toml": [mutators.toml],
    ".parquet": [mutators.parquet], ".pt": [mutators.checkpoint], ".safetensors": [mutators.safetensors],
}  # fmt: skip


def run_forked(words: Sequence[str], log: Path) -> tuple[int, float, int]:
    """Run a command in a copy of this process: its exit code (negative: a signal), seconds of CPU, peak memory."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, 1)
            os.dup2(target, 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            os.environ["TMPDIR"] = tempfile.tempdir = str(log.parent)
            autolabel.cli.main.main(list(words), "autolabel")
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    _, state, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(state), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def labels_in(run: Path) -> dict[str, bytes]:
    """The labels of a run that can be read; nothing if it cannot be opened. What is damaged says so to its reader."""
    found: dict[str, bytes] = {}
    with contextlib.suppress(Exception):
        labels = Run.open(run).labels
        for name in labels:
            with contextlib.suppress(DamagedLabel):
                found[name] = labels[name].tobytes()
    return found


def fuzz_commands(root: Path, cases: int, seed: int, keep: Path | None, counted: Counted) -> Iterator[None]:
    """Run commands on a world of which one file is broken; yields after every case."""
    pristine, log = root.with_name("pristine"), root.with_name("log")
    good = {name: labels_in(root / name) for name in ("run", "png")}
    chosen = [entry for entry in COMMANDS for _ in range(entry[1])]
    for case in range(cases):
        dice = random.Random(f"{seed} commands {case}")
        line, _, patterns = dice.choice(chosen)
        shutil.rmtree(root)
        shutil.copytree(pristine, root)
        os.chdir(root)
        target = dice.choice([path for path in sorted(Path().glob(dice.choice(patterns))) if path.is_file()])
        aware = BY_SUFFIX.get(target.suffix, ())
        mutate = dice.choice(aware if aware and dice.random() < 0.5 else BLIND)
        target.write_bytes(mutate(dice, target.read_bytes()))
        code, cpu, peak = run_forked(line.split(), log)
        text, faults = log.read_text(errors="replace"), counted.faults
        about = f"case {case}: `{line.partition(' --')[0]}` with {target} ({mutate.__name__})"
        if code not in (0, 2, 3) or "Traceback" in text:
            words = text.strip().splitlines() or [""]
            counted.fault("slow" if code == -signal.SIGALRM else "error", f"{about}: exit {code}, {words[-1][:160]}")
        elif code == 2 and not any(part.startswith("autolabel: ") for part in text.splitlines()):
            counted.fault("error", f"{about}: exit 2 without a line that says why")
        else:
            counted.outcomes["refused" if code else "same"] += 1
            name = line.rpartition("--out ")[2].partition(" ")[0]
            if (
                not code
                and name in good
                and target.parts[0] == name
                and labels_in(Path(name)).items() - good[name].items()
            ):
                counted.fault("wrong", f"{about}: exit 0, and other labels than before")
        if cpu > SLOW:
            counted.fault("slow", f"{about}: {cpu:.1f} s of CPU")
        if peak > LARGE:
            counted.fault("large", f"{about}: {peak / 2**30:.1f} GiB")
        counted.tried, counted.cpu, counted.peak = counted.tried + 1, counted.cpu + cpu, max(counted.peak, peak)
        if keep and counted.faults > faults:
            shutil.copytree(root, keep / f"command-{case}", dirs_exist_ok=True)
        yield


# --- the whole --------------------------------------------------------------------------------------------------------


def in_own_process(name: str, work: Callable[[Counted], Iterator[None]]) -> Counted:
    """Do the cases in a forked process, and return what was counted, also when the process dies."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        counted, status = Counted(), 1
        try:
            with os.fdopen(writing, "wb") as pipe:
                for number, _ in enumerate(work(counted), start=1):
                    if number % 50 == 0:
                        pickle.dump(counted, pipe)
                        pipe.flush()
                used = resource.getrusage(resource.RUSAGE_SELF)
                counted.cpu += used.ru_utime + used.ru_stime
                counted.peak = max(counted.peak, used.ru_maxrss * 1024)
                pickle.dump(counted, pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    counted = Counted()
    with os.fdopen(reading, "rb") as pipe, contextlib.suppress(EOFError):
        while True:
            counted = pickle.load(pipe)  # our own child's
    _, state = os.waitpid(pid, 0)
    if state:
        end = os.waitstatus_to_exitcode(state)
        counted.fault("error", f"the process of {name!r} ended with {end} after case {counted.tried} or up to 49 more")
    if counted.peak > LARGE:
        counted.fault("large", f"{counted.peak / 2**30:.1f} GiB")
    return counted


def table(results: dict[str, Counted]) -> Table:
    """The counts, kind by kind."""
    rows = [
        [name, f"{c.tried:,}", *(f"{c.outcomes[k]:,}" for k in (*OUTCOMES, *FAULTS)), f"{c.cpu:.0f} s",
         f"{c.peak / 2**30:.2f}"]
        for name, c in results.items()
    ]  # fmt: skip
    counts = [sum(c.outcomes[k] for c in results.values()) for k in (*OUTCOMES, *FAULTS)]
    tried, cpu = sum(c.tried for c in results.values()), sum(c.cpu for c in results.values())
    peak = max(c.peak for c in results.values()) / 2**30
    rows.append(["all", f"{tried:,}", *(f"{n:,}" for n in counts), f"{cpu:.0f} s", f"{peak:.2f}"])
    header = ["input", "tried", *OUTCOMES, *FAULTS, "CPU", "peak GiB"]
    return Table("broken inputs, and what became of them", header, rows, last_is_total=True)


def main() -> None:
    """Fuzz, print the table and the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--commands", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds, separated by commas; `commands` is one")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that went wrong")
    asked = parser.parse_args()
    only = [name.strip() for name in asked.only.split(",") if name.strip()]
    if asked.keep:
        asked.keep.mkdir(parents=True, exist_ok=True)
    results: dict[str, Counted] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder, "world")
        draw_world(root)
        shutil.copytree(root, root.with_name("pristine"))
        every = [kind for kind in kinds(root) if not only or kind.name in only]
        whole = sum(kind.share for kind in every)
        for kind in every:
            cases = asked.reads * kind.share // whole
            results[kind.name] = in_own_process(
                kind.name, functools.partial(fuzz_reads, kind, cases, asked.seed, asked.keep)
            )
            shutil.rmtree(root)  # the reader may have left its last broken file there
            shutil.copytree(root.with_name("pristine"), root)
        if not only or "commands" in only:
            work = lambda c: fuzz_commands(root, asked.commands, asked.seed, asked.keep, c)  # noqa: E731
            results["commands"] = in_own_process("commands", work)
    print(table(results))
    for name, counted in results.items():
        for note in counted.notes:
            print(f"{name}: {note}")
    sys.exit(1 if any(counted.faults for counted in results.values()) else 0)


if __name__ == "__main__":
    main()
