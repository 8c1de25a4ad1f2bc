"""On a GPU, a label depends on the image and the recipe alone: batches have one planned size, and are always full.

A teacher on the CPU goes the way of a GPU here. If this fails, a run that was resumed, cut otherwise or short of memory
has other labels than one that was not, and nobody can tell which are right.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import buckets
import pyarrow.parquet as pq
import pytest
import torch
from conftest import labels_of, photograph, quarantined, scanned
from PIL import Image

from autolabel.manifests.locations import location
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.pipeline import prepare
from autolabel.pipeline.attempts import note_path
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.label import Labeller
from autolabel.pipeline.predictor import Decoded, TeacherPredictor
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.run import Labelling, generate
from autolabel.pipeline.units import Plan
from autolabel.teacher import memory
from autolabel.teacher.decide import Prediction
from autolabel.teacher.device import DeviceMemory
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import BATCH_PIXELS, HELPERS, Gate, MemoryTaken, planned_batch
from autolabel.teacher.predict import Teacher

NAMES = tuple(f"street{n}" for n in range(9))
WIDE = ("bridge0", "bridge1")  # of another size, and between the others by name


class LikeAGPU(TeacherPredictor):
    """A teacher on the CPU that is fed as a GPU is. It raises at the image `bad`, and says how much fits."""

    def __init__(self, teacher: Teacher, run: Run, bad: str = "", fitting: int = 2) -> None:
        super().__init__(teacher, run.recipe)
        self.device, self.bad, self.fitting = "cuda", bad, fitting

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        if any(one.row.sample_id == self.bad for one in batch):
            raise KeyError("colour")
        return super().predict(batch)

    def in_flight(self, size: tuple[int, int], *, most: int) -> int:
        self._in_flight.setdefault(size, min(most, self.fitting))
        return super().in_flight(size, most=most)


@pytest.fixture(scope="module", autouse=True)
def planned() -> Iterator[None]:
    """Runs of this file plan batches as those on a GPU do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "batch_pixels", lambda device: BATCH_PIXELS)
        yield


@pytest.fixture(scope="module")
def place(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two sizes; "street3x" is damaged."""
    folder = tmp_path_factory.mktemp("batches")
    photograph(city, folder / "drive", [*WIDE, *NAMES, "street3x"])
    for path in (folder / "drive").iterdir():
        Image.open(path).resize((128, 48) if path.stem in WIDE else (96, 48)).save(path)
    scanned(city, folder / "drive")
    damaged = folder / "drive" / "street3x.png"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    return folder


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The images that every computed batch was given, and the number that it was filled up to."""
    seen: list[tuple[int, int]] = []
    predict = Teacher._predict_batch

    def spy(self: Teacher, images: Any, batch: int, **settings: Any) -> Any:
        seen.append((len(images), batch))
        return predict(self, images, batch, **settings)

    monkeypatch.setattr(Teacher, "_predict_batch", spy)
    return seen


def job(place: Path, teacher: Path, out: Path, **settings: Any) -> LabelJob:
    return LabelJob(
        place / "drive.parquet", teacher, out, (1.0,), device="cpu", max_quarantined=1.0, **settings
    )  # fmt: skip


def label(asked: LabelJob, *, retry: bool = False, **settings: Any) -> Labelling:
    asked = replace(asked, portion=replace(asked.portion, retry_quarantined=retry))
    knows = load_teacher(asked.teacher, device="cpu")
    return generate(asked, predictor=lambda run, device: LikeAGPU(knows, run, **settings))


def test_more_threads_than_cores_wait_for_images_in_a_bucket(
    place: Path, teacher: Path, city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    begin = Labeller._begin_threads

    def spy(self: Labeller, count: int) -> None:
        threads.append(count)
        begin(self, count)

    monkeypatch.setattr(Labeller, "_begin_threads", spy)
    monkeypatch.setattr("autolabel.pipeline.label.cores", lambda: 1)
    label(job(place, teacher, tmp_path / "disk", unit_size=6))
    assert set(threads) == {1}
    threads.clear()
    with buckets.place() as bucket:
        buckets.upload(place / "drive", f"{bucket.url}/drive")
        manifest = scanned(city, location(bucket.url) / "drive")
        label(replace(job(place, teacher, tmp_path / "far", unit_size=6), manifest=manifest))
    assert threads[:2] == [1, HELPERS]
    assert labels_of(tmp_path / "far") == labels_of(tmp_path / "disk")


def rows_of(run: Path) -> dict[str, dict[str, Any]]:
    """The statistics of every labelled image and class, without times and places."""
    found: dict[str, dict[str, Any]] = {}
    for table in ("images", "classes"):
        for row in pq.read_table(run / "stats" / f"{table}.parquet").to_pylist():
            kept = {k: v for k, v in row.items() if k not in ("worker", "unit") and not k.endswith(("_ms", "_index"))}
            found[f"{table} {row['sample_id']} {row.get('class_id')}"] = kept
    return found


@pytest.fixture(scope="module")
def expected(place: Path, teacher: Path) -> Path:
    """A run in one unit that nothing disturbed."""
    asked = job(place, teacher, place / "expected")
    assert label(asked).accounts == Accounts(12, 11, 1, 0)
    return asked.out


def test_nine_images_planned_at_eight_are_two_full_batches(
    place: Path, teacher: Path, tmp_path: Path, batches: list[tuple[int, int]]
) -> None:
    asked = job(place, teacher, tmp_path / "run", portion=Portion(only="street?"))
    label(asked)
    assert [batch for batch in batches if batch != (1, 1)] == [(8, 8), (1, 8)]  # (1, 1) is the probe
    run = Run.open(asked.out)
    assert (run.recipe.batch_pixels, run.budgets[0]["images_at_once"]) == (BATCH_PIXELS, {"48x96": 8})
    assert run.budgets[0]["batches_in_flight"]["48x96"] in (1, 2)


def careful(asked: LabelJob) -> None:
    """Somebody has died at the only unit, before any image."""
    label(replace(asked, portion=Portion(limit=1)))
    run = Run.open(asked.out)
    (unit,) = (Plan(run.plan_path, 64, run.path, run.path)[0],)
    note_path(run, unit).parent.mkdir()
    note_path(run, unit).write_text(json.dumps({"attempt": "an earlier one"}) + "\n")


def limited(asked: LabelJob) -> None:
    for limit in (2, 5, 6):
        label(replace(asked, portion=Portion(limit=limit)))


@pytest.mark.parametrize(
    ("settings", "before", "how"),
    [
        pytest.param({"unit_size": 3}, None, {}, id="units of three"),
        pytest.param({"unit_size": 3}, None, {"fitting": 1}, id="memory for one batch"),
        pytest.param({}, limited, {}, id="limited and resumed"),
        pytest.param({}, careful, {}, id="one by one, after a death"),
        pytest.param({}, None, {"bad": "street4"}, id="a neighbour that raises"),
    ],
)
def test_labels_and_statistics_are_those_of_a_run_that_nothing_disturbed(
    place: Path, teacher: Path, tmp_path: Path, expected: Path, batches: list[tuple[int, int]],
    settings: dict[str, Any], before: Callable[[LabelJob], None] | None, how: dict[str, Any],
) -> None:  # fmt: skip
    asked = job(place, teacher, tmp_path / "run", **settings)
    if before:
        before(asked)
    label(asked, **how)
    left_out = how.get("bad", "nobody")
    assert labels_of(asked.out) == {n: x for n, x in labels_of(expected).items() if n != left_out}
    assert rows_of(asked.out) == {n: x for n, x in rows_of(expected).items() if left_out not in n}
    assert {full for _, full in batches} <= {1, 8}
    assert sorted(quarantined(asked.out)) == sorted({"street3x", left_out} - {"nobody"})


def full(patch: pytest.MonkeyPatch, *, meeting: int | None = None) -> list[int]:
    """From now on every batch finds too little memory, or only the first ones of so many `meeting` on the device.

    Returns the number of batches that were under way, for each batch that is computed.
    """
    predict, lock, under_way, found = Teacher._predict_batch, threading.Lock(), list[int](), list[int]()
    met = threading.Barrier(meeting or 1, timeout=60)

    def crowded(self: Teacher, images: Any, batch: int, **settings: Any) -> Any:
        if batch == 1:  # the probe
            return predict(self, images, batch, **settings)
        with lock:
            first = meeting is None or len(under_way) < meeting
            under_way.append(1)
            found.append(sum(under_way))
        try:
            if first:
                met.wait()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return predict(self, images, batch, **settings)
        finally:
            with lock:
                under_way[under_way.index(1)] = 0

    patch.setattr(Teacher, "_predict_batch", crowded)
    return found


def test_two_batches_that_do_not_fit_together_cost_no_image(
    place: Path, teacher: Path, tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is tried again alone, and from then on batches of that size go one after the other."""
    found = full(monkeypatch, meeting=2)
    asked = job(place, teacher, tmp_path / "run", portion=Portion(only="street*"))
    label(asked)
    assert found[:2] == [1, 2] and set(found[2:]) == {1}
    assert labels_of(asked.out) == {n: x for n, x in labels_of(expected).items() if n in NAMES}
    assert list(quarantined(asked.out)) == ["street3x"]
    assert Run.open(asked.out).budgets[0]["batches_in_flight"] == {"48x96": 1}


@pytest.mark.parametrize(
    ("held", "taken"), [(60 << 30, True), (1 << 29, False)], ids=["another process holds the rest", "nobody else"]
)
def test_an_image_is_to_blame_for_a_full_gpu_only_if_nobody_else_is(
    place: Path, teacher: Path, tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch, held: int, taken: bool
) -> None:
    with monkeypatch.context() as patch:
        full(patch)
        patch.setattr(
            memory, "device_memory", lambda device: DeviceMemory(80 << 30, 1 << 28, (80 << 30) - (1 << 28) - held)
        )
        asked = job(place, teacher, tmp_path / "run", portion=Portion(only="street0"))
        if taken:
            with pytest.raises(MemoryTaken, match=r"^not enough memory on cpu now for 8 images of 96 x 48 at scale 1 "):
                label(asked)
            assert not (asked.out / "units").exists()
        else:
            label(asked)
            assert "street0" in quarantined(asked.out)
    label(asked, retry=True)
    assert labels_of(asked.out)["street0"] == labels_of(expected)["street0"]


def test_an_image_whose_tensors_no_gpu_can_count_is_quarantined(place: Path, teacher: Path, tmp_path: Path) -> None:
    asked = job(place, teacher, tmp_path / "run")
    knows = load_teacher(teacher, device="cpu")
    budget = knows.budget(scales=(1.0,))
    monster = replace(budget, elements_per_pixel=2**31 / (8 * 48 * 128), free_bytes=1 << 50)  # of the wider ones only
    knows._budgets = {key: monster for key in knows._budgets}
    generate(asked, predictor=lambda run, device: LikeAGPU(knows, run))
    reasons = quarantined(asked.out)
    assert sorted(reasons) == [*WIDE, "street3x"]
    assert reasons["bridge0"] == (
        "an image of 128 x 48 at scale 1 makes a tensor of 2.1e+09 numbers, and kernels of cpu count to 2^31:"
        " leave that scale out, or cut the image into pieces"
    )


def test_a_resumed_run_keeps_the_batches_it_began_with(
    place: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[tuple[int, int]]
) -> None:
    asked = job(place, teacher, tmp_path / "run", portion=Portion(limit=1))
    label(asked)
    monkeypatch.setattr(prepare, "batch_pixels", lambda device: 10 * BATCH_PIXELS)
    label(replace(asked, portion=Portion(limit=3)))
    assert Run.open(asked.out).recipe.batch_pixels == BATCH_PIXELS
    assert {full for _, full in batches} == {1, 8}


@pytest.mark.parametrize(
    ("height", "width", "scales", "pixels", "expected"),
    [
        pytest.param(1024, 2048, (0.5, 1.0, 2.0), BATCH_PIXELS, 1, id="just one"),
        pytest.param(1023, 2048, (0.5, 1.0, 2.0), 2 * BATCH_PIXELS, 2, id="two and a little more"),
        pytest.param(720, 1280, (0.5, 1.0, 2.0), BATCH_PIXELS, 2, id="two"),
        pytest.param(1024, 2048, (1.0,), BATCH_PIXELS, 4, id="five would fit: four"),
        pytest.param(48, 96, (1.0,), BATCH_PIXELS, 8, id="never more than eight"),
        pytest.param(8000, 8000, (1.0,), BATCH_PIXELS, 1, id="larger than a batch"),
        pytest.param(48, 96, (1.0,), 0, 1, id="on a CPU"),
    ],
)
def test_a_planned_batch_is_a_power_of_two_of_images(
    height: int, width: int, scales: tuple[float, ...], pixels: int, expected: int
) -> None:
    assert planned_batch(height, width, scales=scales, pixels=pixels) == expected


def test_who_wants_to_compute_alone_waits_for_the_others_and_they_for_him() -> None:
    gate, order = Gate(torch.device("cpu")), list[str]()
    inside, out = threading.Event(), threading.Event()

    def first() -> None:
        with gate.shared():
            inside.set()
            out.wait()
            order.append("first")

    def second() -> None:
        with gate.alone():
            order.append("alone")

    def third() -> None:
        with gate.shared():
            order.append("third")

    threads = [threading.Thread(target=first), threading.Thread(target=second), threading.Thread(target=third)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    while not gate._waiting:
        time.sleep(0.001)
    threads[2].start()
    out.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "alone", "third"]


def test_a_run_of_a_gpu_is_relabelled_without_one_and_keeps_its_batches(
    place: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(place, teacher, tmp_path / "run", keep_confidence=4)
    label(asked)
    run = Run.open(asked.out)
    assert run.recipe.confidence_edges
    replace(run, recipe=replace(run.recipe, device="cuda", precision="bfloat16")).save()
    monkeypatch.setattr(prepare, "batch_pixels", lambda device: 10 * BATCH_PIXELS)
    again = relabel(Run.open(asked.out), Policy(threshold=run.recipe.confidence_edges[1]), out=tmp_path / "again").run
    now = again.recipe
    assert (now.device, now.precision, now.batch_pixels) == ("cuda", "bfloat16", BATCH_PIXELS)
    assert set(again.labels) == set(run.labels)
