"""What a run costs beside its labels when it has millions: `python benchmarks/millions.py [--images N …]`.

Manifest and records are made up, and no image is there, so nothing is decoded, computed or encoded. Three tables, each
number from a process of its own: a run planned, its names checked, and resumed when all its chapters are closed; its
tables published, ranked and summed up by `stats`, from records that are made up; two manifests joined.
`--published N …` sets how many images are published (14 KB of disk each), `--fused N …` how many each of the two
manifests lists. `--smallest` makes all of it in seconds, and its numbers mean nothing.

The disk is the machine's own; CPU is that of the process and of those that it started.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import resource as limits
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autolabel.manifests import storage
from autolabel.manifests.fuse import fuse
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.machine import cores
from autolabel.manifests.metadata import metadata_bytes
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.chapters import UNITS_OF_A_CHAPTER, Leaf, Totals, create_chapter
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.ledger import Ledger
from autolabel.manifests.samples import open_manifest, writing_rows
from autolabel.manifests.schemas import MANIFEST_SCHEMA
from autolabel.manifests.tables import parts_of, table_bytes
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.analysis.stats import summarise
from autolabel.pipeline.cutting import gained, write_plan
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.names import require_png_names
from autolabel.pipeline.parts import Heading, write_part
from autolabel.pipeline.prepare import survey
from autolabel.pipeline.publish import publish
from autolabel.pipeline.rows import RECORD_SCHEMA
from autolabel.pipeline.units import Plan

SHARD = 64
HEIGHT, WIDTH = 1024, 2048
CLASSES, CENTROIDS = 8, 40  # rows of a street scene of this size
ROWS = 16_384


def write_images(path: Path, count: int, *, start: int = 0, source: str = "none") -> None:
    """A manifest of images that are not there, with names as long as those of Cityscapes, 3,000 in a town."""
    about = metadata_bytes(
        path, space=CITYSCAPES, image_root=path.parent, label_root=path.parent, provenance={}, runs=[]
    )
    with writing_rows(path, about) as add:
        for first in range(start, start + count, ROWS):
            numbers = np.arange(first, min(start + count, first + ROWS))
            towns = [f"town_{k:05d}" for k in numbers // 3000]
            names = [f"{town}_{k:09d}_000019" for town, k in zip(towns, numbers, strict=True)]
            images = [f"leftImg8bit/train_extra/{name[:10]}/{name}_leftImg8bit.png" for name in names]
            size = len(numbers)
            columns: dict[str, Any] = {
                "sample_id": names, "image": images, "height": np.full(size, HEIGHT, np.int32),
                "width": np.full(size, WIDTH, np.int32), "split": ["train_extra"] * size, "group": towns,
                "source": [source] * size, "label_ids": ["train"] * size, "weight": np.ones(size, np.float32),
            }  # fmt: skip
            if source != "none":
                columns["label"] = [f"{source}/{name[:10]}/{name}_labelIds.png" for name in names]
            add(
                pa.table(
                    [pa.array(columns[f.name]) if f.name in columns else pa.nulls(size, f.type)
                     for f in MANIFEST_SCHEMA],
                    schema=MANIFEST_SCHEMA,
                )
            )  # fmt: skip


def new_run(folder: Path) -> Run:
    """A run of the planned images, with a teacher that nobody has."""
    job = LabelJob(folder / "images.parquet", TeacherName.of(folder / "teacher.pt"), folder, unit_size=SHARD)
    recipe = Recipe(
        "0" * 64, job.window, job.class_map, (1.0,), job.flip, "ocr", None, job.policy, None, False, "float32", "cpu",
        1 << 25, "zarr", SHARD, job.compile, CITYSCAPES,
    )  # fmt: skip
    plan = next(folder.glob("plan-*.arrow")).name
    run = Run(folder, recipe, job.manifest, "0" * 64, plan, job.teacher, "local", {}, "x86_64", state="running")
    run.save()
    return run


def write_chapters(run: Run, plan: Plan, *, records: bool) -> None:
    """Close all chapters, with records that are made up, or with counts alone and none."""
    rng = np.random.default_rng(0)
    kept = Counter({c: HEIGHT * WIDTH * SHARD // CLASSES for c in range(CLASSES)})
    for number in range(len(plan) // UNITS_OF_A_CHAPTER):
        first, pages = number * UNITS_OF_A_CHAPTER, []
        for unit in range(first, first + UNITS_OF_A_CHAPTER):
            count = plan.count(unit)
            data = record(plan, unit, rng) if records else b"-"
            pages.append(Leaf(plan.name(unit), 0, data, Totals(count, 0, HEIGHT * WIDTH * count, kept)))
        create_chapter(run.path, number, pages)


def record(plan: Plan, unit: int, rng: np.random.Generator) -> bytes:
    """A record of a unit with as many classes and centroids as street scenes have, and random numbers."""
    packed = plan.packed(unit)
    names = packed.ids()
    size = len(names)

    def column(field: pa.Field, count: int) -> pa.Array:
        if pa.types.is_string(field.type):
            return pa.array([field.name] * count, field.type)
        if pa.types.is_floating(field.type):
            return pa.array(rng.random(count)).cast(field.type)
        if pa.types.is_fixed_size_list(field.type):
            values = pa.array(rng.integers(0, 10**5, count * field.type.list_size))
            return pa.FixedSizeListArray.from_arrays(values, field.type.list_size)
        return pa.array(rng.integers(0, 256, count)).cast(field.type)

    def nested(field: pa.Field, each: int) -> pa.Array:
        inner = field.type.value_type
        columns = [column(inner.field(k), size * each) for k in range(inner.num_fields)]
        at = [inner.field(k).name for k in range(inner.num_fields)].index("class_id")
        columns[at] = pa.array(np.tile(np.arange(each) % CLASSES, size), pa.int32())
        offsets = pa.array(np.arange(size + 1) * each, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, fields=list(inner)))

    known = {
        "sample_id": pa.array(names), "height": pa.array([HEIGHT] * size, pa.int32()),
        "width": pa.array([WIDTH] * size, pa.int32()), "status": pa.array(["labelled"] * size),
        "label": pa.array([f"labels.zarr/{packed.bucket}"] * size), "unit": pa.array([packed.name] * size),
        "label_index": pa.array(np.arange(packed.first_row, packed.first_row + size)),
        "image_fingerprint": pa.array([f"{n:016x}" for n in rng.integers(0, 2**60, size)]),
    }  # fmt: skip
    each = {"classes": CLASSES, "centroids": CENTROIDS}
    columns = [
        known[f.name] if f.name in known else nested(f, each[f.name]) if f.name in each else column(f, size)
        for f in RECORD_SCHEMA
    ]
    return table_bytes(pa.table(columns, schema=RECORD_SCHEMA).replace_schema_metadata({b"shards": b"{}"}))


# --- steps, each in a process of its own ------------------------------------------------------------------------------


def opened(folder: Path) -> tuple[Run, Plan]:
    """The run and its plan."""
    run = Run.open(folder)
    return run, Plan(run.plan_path, SHARD, folder, folder)


def make(folder: Path, count: int) -> None:
    """Write the manifest."""
    write_images(folder / "images.parquet", count)


def plan(folder: Path, _: int) -> None:
    """Cut the manifest into units."""
    write_plan(folder, open_manifest(folder / "images.parquet"), SHARD)
    new_run(folder)


def names(folder: Path, _: int) -> None:
    """Check the names that labels would have as PNGs."""
    manifest = open_manifest(folder / "images.parquet")
    require_png_names(folder, lambda: (table["image"] for table in manifest.tables(("image",))))


def compare(folder: Path, _: int) -> None:
    """Compare the plan with the manifest, as verify does, and generate with a manifest that has changed."""
    assert not gained(opened(folder)[1], open_manifest(folder / "images.parquet"))


def close(folder: Path, _: int) -> None:
    """Close all chapters, without records."""
    write_chapters(*opened(folder), records=False)


def resume(folder: Path, count: int) -> None:
    """Open the plan, and find what is left: the last units, which are in no chapter."""
    run, units = opened(folder)
    left = survey(run, Portion(), units)
    assert left.before.done + left.wanted == count
    assert len(left.units) == len(units) % UNITS_OF_A_CHAPTER


def records(folder: Path, _: int) -> None:
    """Close all chapters, with records that are made up."""
    write_chapters(*opened(folder), records=True)


def published(folder: Path, count: int) -> None:
    """Publish the run."""
    run, units = opened(folder)
    accounts, digests = publish(run, units, folder, {})
    assert accounts.labelled + accounts.left == count
    dataclasses.replace(run, accounts=accounts, tables_sha256=digests, state="partial").save()


def alone(folder: Path, _: int) -> None:
    """Make the tables of one chapter, or of all units where there is none, in this process."""
    run, units = opened(folder)
    write_part(run, units, Ledger(folder), (0, range(min(UNITS_OF_A_CHAPTER, len(units)))), Heading(folder, {}))


def stats(folder: Path, _: int) -> None:
    """Sum up the run."""
    summarise(folder)


def sources(folder: Path, count: int) -> None:
    """Write two manifests to join, of fine and of automatic labels; half of the ids are in both."""
    write_images(folder / "fine.parquet", count, source="fine")
    write_images(folder / "auto.parquet", count, start=count // 2, source="auto")


def joined(folder: Path, count: int) -> None:
    """Join them. The names of the images stand for what is in them, which is not there to read."""
    storage.fingerprint = lambda path: hashlib.sha256(path.name.encode()).hexdigest()[:16]
    assert fuse([folder / "fine.parquet", folder / "auto.parquet"], folder / "fused.parquet").samples == count * 2 - (
        count - count // 2
    )


STEPS: dict[str, Callable[[Path, int], None]] = {
    "make": make, "plan": plan, "names": names, "compare": compare, "close": close, "resume": resume,
    "records": records, "publish": published, "again": published, "alone": alone, "stats": stats,
    "sources": sources, "fuse": joined,
}  # fmt: skip


def measured(step: str, folder: Path, count: int) -> dict[str, float]:
    """Seconds, CPU seconds and peak MiB of a step, and of the largest process that it started."""
    made = subprocess.run(
        [sys.executable, __file__, "--step", step, str(folder), str(count)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(made.stdout.strip().splitlines()[-1])
    return found


def in_this_process(step: str, folder: Path, count: int) -> None:
    """Take a step, and print what it took."""
    started, cpu = time.perf_counter(), time.process_time()
    STEPS[step](folder, count)
    children = limits.getrusage(limits.RUSAGE_CHILDREN)
    itself = limits.getrusage(limits.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "s": time.perf_counter() - started,
                "cpu": time.process_time() - cpu + children.ru_utime + children.ru_stime,
                "peak": itself.ru_maxrss / 1024,
                "child": children.ru_maxrss / 1024,
            }
        )
    )


def size(*paths: Path) -> float:
    """MiB of files, or of all files in folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def planning(counts: list[int]) -> None:
    """Print the table of planning and resuming."""
    print(f"\n### A run planned and resumed, units of {SHARD}\n")
    print("| images | units | step | s | CPU s | peak MiB | MiB on disk |\n|---:|---:|---|---:|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for step in ("make", "plan", "names", "compare", "close", "resume"):
                took = measured(step, folder, count)
                disk = {
                    "make": size(folder / "images.parquet"), "plan": size(*folder.glob("plan-*")),
                    "close": size(folder / "chapters"),
                }.get(step)  # fmt: skip
                units = -(-count // SHARD)
                told = "–" if disk is None else f"{disk:.1f}"
                print(
                    f"| {count:,} | {units:,} | {step} | {took['s']:.1f} | {took['cpu']:.1f} | {took['peak']:.0f}"
                    f" | {told} |",
                    flush=True,
                )


def publishing(counts: list[int]) -> None:
    """Print the table of publishing."""
    print(f"\n### Its tables published by {cores()} processes, {CLASSES} classes and {CENTROIDS} centroids an image\n")
    print("| images | step | s | CPU s | peak MiB | of a process MiB | parts | MiB on disk |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for step in ("make", "plan"):
                measured(step, folder, count)
            for step in ("records", "alone", "publish", "again", "stats"):
                took = measured(step, folder, count)
                parts = len(parts_of(folder / "stats" / "images.parquet"))
                disk = {"records": size(folder / "chapters"), "publish": size(folder / "stats")}.get(step)
                told = "–" if disk is None else f"{disk:.0f}"
                print(
                    f"| {count:,} | {step} | {took['s']:.1f} | {took['cpu']:.1f} | {took['peak']:.0f}"
                    f" | {took['child']:.0f} | {parts} | {told} |",
                    flush=True,
                )


def fusing(counts: list[int]) -> None:
    """Print the table of joining."""
    print("\n### Two manifests joined, half of whose images are the same\n")
    print("| images in each | step | s | CPU s | peak MiB | MiB on disk |\n|---:|---|---:|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for step in ("sources", "fuse"):
                took = measured(step, folder, count)
                print(
                    f"| {count:,} | {step} | {took['s']:.1f} | {took['cpu']:.1f} | {took['peak']:.0f}"
                    f" | {size(*folder.glob('fused.parquet' if step == 'fuse' else '*.parquet')):.1f} |",
                    flush=True,
                )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[1_000_000, 20_000_000])
    parser.add_argument("--published", type=int, nargs="*", default=[256_000, 1_024_000])
    parser.add_argument("--fused", type=int, nargs="*", default=[250_000, 1_000_000])
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # name, folder, images
    asked = parser.parse_args()
    if asked.step:
        step, folder, count = asked.step
        in_this_process(step, Path(folder), int(count))
        return
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        asked.images, asked.published, asked.fused = [130], [130], [130]
    planning(asked.images)
    publishing(asked.published)
    fusing(asked.fused)


if __name__ == "__main__":
    main()
