"""The plan of a run: which sample belongs to which unit. If this fails, a label lands in another picture's row.

What is planned stays where it is when the manifest grows, and whatever else changes is named and refused.
"""

from __future__ import annotations

import fnmatch
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autolabel.manifests.label_space import load_label_space
from autolabel.manifests.samples import Sample, open_manifest, writing_manifest
from autolabel.manifests.tables import BadTable
from autolabel.pipeline.cutting import extend_plan, gained, write_plan
from autolabel.pipeline.names import require_distinct
from autolabel.pipeline.units import Plan, in_part, matcher


def sample(number: int, height: int = 300, width: int = 400, root: Path = Path("/drive")) -> Sample:
    return Sample(f"s{number:04d}", root / "images" / f"s{number:04d}.png", height, width, "train", "town")


def manifest(folder: Path, samples: list[Sample]) -> Path:
    path = folder / "m.parquet"
    space = load_label_space("cityscapes")
    with writing_manifest(path, space, image_root=Path("/drive"), label_root=Path("/drive")) as write:
        write(samples)
    return path


def planned(folder: Path, samples: list[Sample], unit_size: int) -> Plan:
    file = open_manifest(manifest(folder, samples))
    return Plan(write_plan(folder, file, unit_size), unit_size, file.image_root, file.label_root)


def shape(plan: Plan) -> list[tuple[str, int, list[str]]]:
    return [(u.name, u.first_row, [s.sample_id for s in u.samples]) for u in plan]


def test_the_samples_of_a_bucket_fill_its_units_in_the_manifests_order(tmp_path: Path) -> None:
    sizes = [(300, 400), (512, 512), (600, 400)]  # the first two round up to one bucket
    samples = [sample(n, *sizes[n % 3]) for n in range(7)]
    plan = planned(tmp_path, samples, 2)
    assert shape(plan) == [
        ("b512x512.000000", 0, ["s0000", "s0001"]),
        ("b512x512.000001", 2, ["s0003", "s0004"]),
        ("b1024x512.000000", 0, ["s0002", "s0005"]),
        ("b512x512.000002", 4, ["s0006"]),
    ]
    assert plan.rows() == {"b512x512": 5, "b1024x512": 2}
    assert plan.samples == 7 and len(plan) == 4
    assert [s for u in plan for s in u.samples if s.sample_id == "s0004"] == [samples[4]]
    assert [plan.name(k) for k in range(4)] == [u.name for u in plan]


@pytest.mark.parametrize("unit_size", [1, 2, 3, 64, 256])
def test_every_sample_is_in_one_unit_whatever_its_size(tmp_path: Path, unit_size: int) -> None:
    rng = random.Random(unit_size)
    samples = [sample(n, rng.choice([1, 511, 512, 513, 1024]), rng.choice([1, 513, 2048])) for n in range(500)]
    plan = planned(tmp_path, samples, unit_size)
    assert sorted((s for u in plan for s in u.samples), key=lambda s: s.sample_id) == samples
    assert len({u.name for u in plan}) == len(plan)
    for unit in plan:
        assert unit.first_row % unit_size == 0 and 1 <= len(unit.samples) <= unit_size
    short = [u for u in plan if len(u.samples) < unit_size]
    assert len(short) <= len({u.bucket for u in plan})  # only the last one of a bucket


def test_unreadable_samples_are_in_the_plan_and_have_no_rows_in_the_store(tmp_path: Path) -> None:
    plan = planned(tmp_path, [sample(0), sample(1, 0, 0)], 2)
    assert sorted(u.bucket for u in plan) == ["b0x0", "b512x512"]
    assert plan.rows() == {"b512x512": 1}


def test_a_grown_manifest_adds_units_and_moves_nothing(tmp_path: Path) -> None:
    old = [sample(n) for n in range(0, 10, 2)] + [sample(90, 0, 0)]
    plan = planned(tmp_path, old, 2)
    before = shape(plan)
    grown = [sample(n) for n in range(10)] + [sample(90, 0, 0), sample(91, 0, 0)]
    file = open_manifest(manifest(tmp_path, grown))
    after = Plan(extend_plan(plan, file), 2, file.image_root, file.label_root)
    assert after.path != plan.path and shape(plan) == before and after.samples == plan.samples + 6
    assert shape(after)[: len(before)] == before
    assert sorted(shape(after)[len(before) :]) == [
        ("b0x0.000001", 2, ["s0091"]),
        ("b512x512.000003", 6, ["s0001", "s0003"]),  # row 5 stays free: that shard may be written already
        ("b512x512.000004", 8, ["s0005", "s0007"]),
        ("b512x512.000005", 10, ["s0009"]),
    ]
    assert extend_plan(after, file) == after.path and not gained(after, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[1:], r"1 samples of this run are not in .*m\.parquet any more \(the first is 's0000'\)"),
        (lambda s: [replace(s[0], height=301), *s[1:]], r"sample 's0000' .* \(height was 300, now 301\)"),
        (
            lambda s: [replace(s[0], image=Path("/drive/images/x.png")), *s[1:]],
            r"\(image was 'images/s0000\.png', now 'images/x\.png'\)",
        ),
        (
            lambda s: [replace(s[0], coarse_label=Path("/drive/c.png")), *s[1:]],
            r"\(coarse_label was None, now 'c\.png'\)",
        ),
    ],
    ids=["gone", "resized", "renamed", "other coarse label"],
)
def test_a_changed_manifest_is_refused_with_what_differs(tmp_path: Path, change: object, message: str) -> None:
    samples = [sample(n) for n in range(4)]
    plan = planned(tmp_path, samples, 2)
    with pytest.raises(ValueError, match=message):
        extend_plan(plan, open_manifest(manifest(tmp_path, change(samples))))  # type: ignore[operator]
    assert list(tmp_path.glob("plan*")) == [plan.path]


def test_a_sample_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lists sample 's0003' more than once"):
        planned(tmp_path, [sample(n) for n in (1, 2, 3, 4, 3)], 2)
    require_distinct(lambda: [["a", "b"], ["c"]], str)
    with pytest.raises(ValueError, match=r"^b$"):
        require_distinct(lambda: [["a", "b"], ["c", "b", "d"]], str)


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -100])
def test_a_cut_plan_is_an_error(tmp_path: Path, cut: int) -> None:
    path = planned(tmp_path, [sample(n) for n in range(9)], 2).path
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadTable, match=r"plan-[0-9a-f]{8}\.arrow is damaged"):
        Plan(path, 2, tmp_path, tmp_path)


def test_a_flipped_bit_is_noticed_before_arrow_reads_it(tmp_path: Path) -> None:
    """Arrow trusts its files: some bits would end the process."""
    path = planned(tmp_path, [sample(n) for n in range(9)], 2).path
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(BadTable, match="its checksum is another"):
            Plan(path, 2, tmp_path, tmp_path)


def test_a_plan_of_another_unit_size_is_not_believed(tmp_path: Path) -> None:
    path = planned(tmp_path, [sample(n) for n in range(9)], 3).path
    with pytest.raises(BadTable, match="it has units of 3 samples, not of 2"):
        Plan(path, 2, tmp_path, tmp_path)


def test_every_unit_belongs_to_exactly_one_part() -> None:
    assert [[k for k in range(10) if in_part(k, (i, 3))] for i in (1, 2, 3)] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert all(in_part(k, None) for k in range(10))


def test_the_option_only_matches_globs() -> None:
    names = ["aachen_000000", "aachen_000001", "bochum_000000", "a/b/c"]
    for glob in ("aachen_*", "*000000", "[ab]*", "a/?/c", "nothing"):
        assert [n for n in names if matcher(glob)(n)] == fnmatch.filter(names, glob)
    assert all(matcher(None)(n) for n in names)


@pytest.mark.thorough
def test_planning_takes_no_more_memory_for_many_samples_than_for_few(tmp_path: Path) -> None:
    """Fifty times the samples; what grows are eight bytes each, to notice a sample that is listed twice."""
    grown = []
    for count in (2_000, 100_000):
        path = tmp_path / f"{count}.parquet"
        space = load_label_space("cityscapes")
        with writing_manifest(path, space, image_root=Path("/drive"), label_root=Path("/drive")) as write:
            for first in range(0, count, 10_000):
                write([sample(n) for n in range(first, min(first + 10_000, count))])
        code = (
            "import resource, sys; from pathlib import Path; from autolabel.manifests.samples import open_manifest;"
            "from autolabel.pipeline.cutting import write_plan; from autolabel.pipeline.units import Plan;"
            "m = open_manifest(sys.argv[1]); p = write_plan(Path(sys.argv[1]).parent, m, 64);"
            "plan = Plan(p, 64, m.image_root, m.label_root); assert sum(len(u.samples) for u in plan) == plan.samples;"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        grown.append(int(done.stdout) / 1024)
    few, many = grown
    assert many - few < 60  # MiB; as objects, the samples alone would take 150
