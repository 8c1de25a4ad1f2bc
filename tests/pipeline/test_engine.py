"""Workers die, hang, and lose their machines; no image is lost, none is labelled twice, and the guilty one is named.

Real Ray: a cluster of several nodes on this machine. What goes wrong is told by the images' names.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from conftest import labels_of, outcome, photograph, quarantined, scanned
from ray import cloudpickle
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayTaskError

from autolabel.manifests.cluster import ClusterFailed, cluster_address, ray_session
from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Accounts, Run, RunFolder
from autolabel.manifests.samples import Sample
from autolabel.manifests.settings import build_job
from autolabel.pipeline import label, prepare, ray_engine, ray_worker
from autolabel.pipeline.attempts import Attempt, excuse
from autolabel.pipeline.engine import EngineFailed, Limits, Work
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.predictor import Decoded, Refused, TeacherPredictor
from autolabel.pipeline.progress import Meter
from autolabel.pipeline.records import Row
from autolabel.pipeline.run import Labelling, generate
from autolabel.pipeline.units import Packed, Tally, Unit
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import BATCH_PIXELS, MemoryTaken

pytestmark = pytest.mark.thorough

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes have no copy of this file


class Fragile(TeacherPredictor):
    """A predictor that obeys the names of images."""

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        what, _, _ = sample.sample_id.partition("-")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(3600)
        if what == "raise":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if what == "slow":
            time.sleep(0.4)
        return super().decode(sample, unit, row)


def fragile(run: Run, device: str) -> Fragile:
    return Fragile(load_teacher(run.teacher, device=device), run.recipe)


def fragile_and_judged_early(run: Run, device: str) -> Fragile:
    """In a worker where two deaths convict an image; every further one would be a new process."""
    label.DEATHS = 2
    return fragile(run, device)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU."""
    small = {"object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    for _ in range(2):
        made.add_node(num_cpus=1, **small)
    yield made
    made.shutdown()


@pytest.fixture
def drive(city: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a manifest of images with the given names."""

    def make(*names: str) -> Path:
        photograph(city, tmp_path / "drive", names)
        return scanned(city, tmp_path / "drive")

    return make


class Counted(Fragile):
    """A predictor that leaves a line about every image that it decodes: the node, the process, the image.

    It is slow until there is a file "hurry" beside the run.
    """

    def __init__(self, run: Run, device: str) -> None:
        super().__init__(load_teacher(run.teacher, device=device), run.recipe)
        self.lines = run.path.parent / "computed"

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        with open(self.lines, "a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()} {os.getpid()} {sample.sample_id}\n")
        if not self.lines.with_name("hurry").exists():
            time.sleep(0.4)
        return super().decode(sample, unit, row)


def computed(asked: LabelJob) -> list[tuple[str, str, str]]:
    """What `Counted` has written: nodes, processes and images, in the order of their beginning."""
    lines = asked.out.parent / "computed"
    return [tuple(line.split()) for line in lines.read_text().splitlines()] if lines.exists() else []


def drain(cluster: Cluster, node: str, seconds: int = 60) -> None:
    """Tell Ray that a node will be taken back, as `ray drain-node` does."""
    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + seconds) * 1000)
    assert GcsClient(address=cluster.address).drain_node(node, preemption, "", deadline) == (True, "")


def alive(node: str) -> bool:
    return any(other["NodeID"] == node and other["Alive"] for other in ray.nodes())


def names(count: int, what: str = "ok") -> list[str]:
    return [f"{what}-{n:02d}" for n in range(count)]


def job(manifest: Path, teacher: Path, out: str = "run", **settings: Any) -> LabelJob:
    defaults = {"engine": "ray", "scales": (1.0,), "unit_size": 3, "max_quarantined": 1.0}
    paths = {"manifest": manifest, "teacher": teacher, "out": manifest.parent / out}
    return build_job(LabelJob, {**paths, **defaults, **settings})


def in_a_thread(work: Callable[[], Labelling]) -> Callable[[], Labelling]:
    """Start it; the function that is returned waits for what comes out. Ray's cluster belongs to the main thread."""
    box: list[Labelling | BaseException] = []

    def run() -> None:
        try:
            box.append(work())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Labelling:
        thread.join(400)
        (found,) = box
        if isinstance(found, BaseException):
            raise found
        return found

    return result


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def units_of(run: Path) -> int:
    return len(list((run / "units").glob("*.parquet")))


# --- the one image that is to blame -----------------------------------------------------------------------------------


def test_images_that_kill_or_hang_their_process_are_found_and_cost_only_themselves(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path
) -> None:
    manifest = drive(*names(7), "kill-it", "hang-it")  # in three units of three
    asked = job(manifest, teacher, address=cluster.address)
    notes: list[str] = []
    result = generate(asked, on_note=notes.append, predictor=fragile_and_judged_early, limits=Limits(stall_s=4))
    assert outcome(result) == (Accounts(asked=9, labelled=7, quarantined=2, left=0), 9, {}, False)
    why = "2 worker processes died or hung while they labelled it"
    assert quarantined(asked.out) == {"hang-it": why, "kill-it": why}
    assert any("no image finished in 4 s" in note for note in notes)
    assert any("ActorDiedError" in note for note in notes)
    assert not list((asked.out / "attempts").iterdir())
    # The others have the labels that they have without trouble.
    whole = job(drive(*names(7)), teacher, "whole", engine="local")
    (manifest.parent / "drive" / "kill-it.png").unlink()
    (manifest.parent / "drive" / "hang-it.png").unlink()
    generate(job(drive(), teacher, "whole", engine="local"))
    assert labels_of(asked.out) == labels_of(whole.out)


def test_without_ray_the_next_call_goes_on_carefully(drive: Callable[..., Path], teacher: Path) -> None:
    """The image kills the whole command; called again, it finds out which one it was."""
    asked = job(drive(*names(4), "kill-it"), teacher, engine="local", unit_size=64)
    code = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/pipeline']; from test_engine import *
for _ in range(5):
    child = os.fork()  # nothing but imports has happened yet, so that it is like a new process
    if not child:
        generate(job(Path(sys.argv[2]), Path(sys.argv[3]), engine='local', unit_size=64), predictor=fragile)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(asked.manifest), str(asked.teacher)]
    told = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert told.split() == [str(-signal.SIGKILL)] * 5  # once nobody looked, four times it was seen
    assert generate(asked, predictor=fragile).accounts == Accounts(5, 4, 1, 0)
    assert list(quarantined(asked.out)) == ["kill-it"]


def test_an_attempt_tells_what_earlier_processes_died_on(tmp_path: Path) -> None:
    unit = Unit("b512x512.000000", "b512x512", 0, ())
    first = Attempt(RunFolder(tmp_path), unit)
    assert not first.careful and not first.deaths
    first.end(committed=True)
    assert not (tmp_path / "attempts").exists()  # a unit at which nobody has died costs no file
    second = Attempt(RunFolder(tmp_path), unit, careful=True)  # its driver knows that the first one died
    assert second.careful and not second.deaths
    second.begin("a")
    second.begin("b")
    third = Attempt(RunFolder(tmp_path), unit)
    assert third.deaths == {"b": 1}
    third.begin("b")
    third.end(committed=False)  # left in order: not a death
    assert Attempt(RunFolder(tmp_path), unit).deaths == {"b": 1}
    with open(third.path, "a") as file:
        file.write('{"attempt": "x", "sam')  # died while it wrote
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(third.path.read_text().splitlines()[-1])
    last = Attempt(RunFolder(tmp_path), unit)
    assert last.careful and last.deaths == {"b": 1}
    last.begin("b")
    excuse(last.path)  # its machine was lost
    last = Attempt(RunFolder(tmp_path), unit)
    assert last.deaths == {"b": 1}
    last.end(committed=True)
    assert not last.path.exists() and not Attempt(RunFolder(tmp_path), unit).careful


def test_an_error_of_ours_is_tried_again_and_then_leaves_its_unit_for_later(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path
) -> None:
    asked = job(drive(*names(5), "raise-it"), teacher, address=cluster.address)
    result = generate(asked, predictor=fragile, limits=Limits(crashes=2))
    # The second worker is careful, and commits the two images of the unit that are not to blame.
    assert result.accounts == Accounts(asked=6, labelled=5, quarantined=0, left=1)
    assert result.failed == {"b512x512.000001": "RuntimeError: CUDA error: an illegal memory access was encountered"}
    mended = generate(replace(asked, machine=Machine("local")))  # by the usual predictor
    assert mended.accounts == Accounts(6, 6, 0, 0)


# --- machines come and go ---------------------------------------------------------------------------------------------


def test_a_lost_machine_costs_nothing_and_a_new_one_is_used(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path
) -> None:
    asked = job(drive(*names(24, "slow")), teacher, unit_size=2, address=cluster.address)
    notes: list[str] = []
    finish = in_a_thread(lambda: generate(asked, on_note=notes.append, predictor=fragile))
    wait_for(lambda: units_of(asked.out) >= 2)
    for node in [*cluster.worker_nodes]:
        cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    wait_for(lambda: units_of(asked.out) >= 5)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    assert outcome(finish()) == (Accounts(24, 24, 0, 0), 24, {}, False)
    assert any("its machine was lost" in note for note in notes)
    workers = RunFolder(asked.out).statistics()["worker"].to_pylist()
    assert len(set(workers)) >= 3  # from before, the replacement, and the one that joined
    undisturbed = job(asked.manifest, teacher, "undisturbed", engine="local", unit_size=2)
    generate(undisturbed)
    assert labels_of(asked.out) == labels_of(undisturbed.out)


@pytest.mark.slow
def test_a_machine_or_worker_that_is_told_to_leave_costs_no_image_and_hires_nobody(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path
) -> None:
    asked = job(drive(*names(70)), teacher, unit_size=10, address=cluster.address)
    notes: list[str] = []

    def told() -> list[str]:
        return [note for note in notes if not note.startswith("waiting for a worker")]  # this machine may be busy

    finish = in_a_thread(lambda: generate(asked, on_note=notes.append, predictor=Counted))
    wait_for(lambda: len({pid for _, pid, _ in computed(asked)}) == 2 and len(computed(asked)) >= 6)
    _, pid, _ = computed(asked)[-1]
    os.kill(int(pid), signal.SIGTERM)
    wait_for(lambda: len({pid for _, pid, _ in computed(asked)}) == 3)
    assert told() == []  # neither a failure nor a try
    home, _, _ = computed(asked)[-1]
    drain(cluster, home)
    wait_for(lambda: any("will be taken back" in note for note in notes))
    at_notice = len(computed(asked))
    wait_for(lambda: not alive(home))  # the node ends by itself when nobody works there
    assert len([node for node, _, _ in computed(asked)[at_notice:] if node == home]) <= 1
    cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id == home))
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    (asked.out.parent / "hurry").touch()
    assert outcome(finish()) == (Accounts(70, 70, 0, 0), 70, {}, False)
    assert sorted(image for _, _, image in computed(asked)) == names(70)  # each of them once
    assert told() == [
        "1 machine will be taken back: workers there finish the images under way, and others go on with their units"
    ]
    assert not list((asked.out / "attempts").glob("*"))


@pytest.mark.slow
def test_a_run_of_min_to_max_begins_with_min_and_goes_on_with_those_that_are_left(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(drive(*names(90)), teacher, unit_size=2, address=cluster.address, workers=(3, 9))
    monkeypatch.setattr(ray_engine, "_QUIET_S", 0)
    notes: list[str] = []
    finish = in_a_thread(lambda: generate(asked, on_note=notes.append, predictor=Counted))
    wait_for(lambda: bool(notes))
    assert notes[0].startswith("waiting for 3 workers, ") and computed(asked) == []
    added = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    wait_for(lambda: len({node for node, _, _ in computed(asked)}) == 4)
    for node in added:
        cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: any("going on with" in note for note in notes))
    (asked.out.parent / "hurry").touch()
    assert finish().accounts == Accounts(90, 90, 0, 0)
    assert "going on with 2 workers of at least 3, and waiting for more" in notes


def test_a_gpu_that_cannot_be_had_is_a_clear_message(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path
) -> None:
    asked = job(drive(*names(2)), teacher, device="cuda", precision="float32", address=cluster.address)
    message = r"^no worker started in 3 s: each needs 1 GPU and 1 CPU, the cluster has 0 GPU, \d CPU and .* of memory$"
    with pytest.raises(EngineFailed, match=message):  # a node that is gone counts for a while
        generate(asked, limits=Limits(start_s=3))


class LikeAGPU(Fragile):
    """A predictor on the CPU of a node that is said to have a GPU; it says so too."""

    def __init__(self, run: Run, device: str) -> None:
        super().__init__(load_teacher(run.teacher, device="cpu"), run.recipe)
        self.device = device

    def budget(self) -> dict[str, Any]:
        return {**super().budget(), "device": kind_here()}


def kind_here() -> str:
    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    return next(name for name in node["Resources"] if name.startswith("accelerator_type:")).partition(":")[2]


def precision_here() -> dict[str, str]:
    return {kind_here(): "float32"}


def precisions_that_differ() -> dict[str, str]:
    return {kind_here(): "float32" if kind_here() == "T4" else "bfloat16"}


def no_precision() -> dict[str, str]:
    raise ValueError("device 'cuda' was asked for, but this torch is built without CUDA")


def test_every_kind_of_gpu_of_a_cluster_settles_the_precision_and_labels(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(drive(*names(4, "slow")), teacher, unit_size=1, address=cluster.address)
    nodes = [
        cluster.add_node(
            num_cpus=1, num_gpus=1, resources={f"accelerator_type:{kind}": 1}, object_store_memory=80 * 2**20
        )
        for kind in ("H100", "T4")
    ]
    try:
        for question, message in (
            (precisions_that_differ, r"^the GPUs differ .*\(H100: bfloat16, T4: float32\)"),
            (no_precision, r"^(H100|T4) of the cluster: device 'cuda' was asked for, but this torch is built without"),
        ):
            monkeypatch.setattr(prepare, "gpu_precisions", question)
            with pytest.raises(ValueError, match=message):
                generate(asked)
        monkeypatch.setattr(prepare, "gpu_precisions", precision_here)
        notes: list[str] = []
        assert generate(asked, predictor=LikeAGPU, on_note=notes.append).accounts == Accounts(4, 4, 0, 0)
    finally:
        for node in nodes:
            cluster.remove_node(node)
    run = Run.open(asked.out)
    assert (run.recipe.device, run.recipe.precision, run.recipe.batch_pixels) == ("cuda", "float32", BATCH_PIXELS)
    assert sorted((b["device"], b["precision"]) for b in run.budgets) == [("H100", "float32"), ("T4", "float32")]
    assert len([note for note in notes if "kernels of two kinds of GPU round differently" in note]) == 1


@pytest.mark.parametrize("when", ["at its start", "in a unit"])
def test_a_gpu_that_others_have_filled_is_done_without_if_another_worker_works(tmp_path: Path, when: str) -> None:
    """Else one bad GPU of eight would end the run, or fail one unit after the other."""
    taken, fake, monitor = MemoryTaken("another process holds 70.0 GiB"), MagicMock(), MagicMock()
    fake.get.side_effect = RayTaskError("run", "", taken)
    work = Work(Packed("u", "b", 0, b"", tmp_path, tmp_path), ())
    loop = ray_engine._Loop(fake, MagicMock(limits=Limits(), least=None), iter(()), 9, monitor, threading.Event())
    loop.wanted = 2
    loop.live["good"] = ray_worker.Slot(object(), "node", work)

    def fail() -> None:
        slot, reference = ray_worker.Slot(object(), "node", work if when == "in a unit" else None), iter("x")
        loop.live[reference] = slot
        if slot.work:
            loop._advance(reference)
        else:
            loop._lose(reference, slot, str(taken), infrastructure=False)

    for _ in range(3):
        assert loop.fewer == 0
        fail()
    assert (loop.fewer, loop.wanted) == (1, 1)
    assert "going on with one worker less (" in monitor.note.call_args.args[0]
    del loop.live["good"]
    fail()
    fail()
    with pytest.raises(EngineFailed, match=r"another process holds 70\.0 GiB$"):
        fail()


def test_all_workers_that_have_something_to_tell_are_taken_at_once_and_a_last_tick_ends_a_unit(tmp_path: Path) -> None:
    fake, monitor = MagicMock(), MagicMock()
    fake.wait.side_effect = lambda waiting, num_returns, timeout: (waiting[:num_returns], waiting[num_returns:])
    fake.get.side_effect = [
        ray_worker.Tick(Tally(1)), ray_worker.Tick(Tally(2), {"device": "cpu"}), ray_worker.Tick(Tally(3), {})
    ]  # fmt: skip
    loop = ray_engine._Loop(fake, MagicMock(limits=Limits(), least=None), iter(()), 0, monitor, threading.Event())
    for name in "abc":
        work = Work(Packed(name, "b", 0, b"", tmp_path, tmp_path), ())
        loop.live[iter("x")] = ray_worker.Slot(object(), "node", work)
    for reference in loop._ready():
        loop._advance(reference)
    assert fake.wait.call_count == 1
    told = [(call.args[0], call.args[1].done, call.kwargs["whole"]) for call in monitor.unit.call_args_list]
    assert told == [("a", 1, False), ("b", 2, True), ("c", 3, True)]
    assert [slot.work.unit.name for slot in loop.live.values() if slot.work] == ["a"]  # nothing is left for the others


def test_a_unit_that_is_lost_is_taken_out_of_the_sum(tmp_path: Path) -> None:
    meter = Meter(RunFolder(tmp_path), ("road",), asked=9, wanted=9, before=Tally())
    meter.unit("a", Tally(3, 1, 20, Counter({0: 8})))
    meter.unit("b", Tally(2, 0, 10, Counter({0: 5})))
    meter.unit("a", Tally(), whole=True)  # its worker died
    assert (meter.now().done, meter.now().quarantined, meter.now().coverage) == (2, 0, 0.5)
    meter.unit("b", Tally(4, 0, 20, Counter({0: 5})), whole=True)
    assert (meter.now().done, meter.now().coverage) == (4, 0.25)


def test_workers_that_cannot_start_say_why(
    cluster: Cluster, drive: Callable[..., Path], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_worker.importlib.metadata, "version", lambda name: "0.0.0")
    with pytest.raises(EngineFailed, match=r"workers cannot start: .*a node has autolabel .*, the driver 0\.0\.0"):
        generate(job(drive(*names(2)), teacher, address=cluster.address))


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", r"nobody listens at 127\.0\.0\.1:1 "), ("ray://there:10001", "is a Ray Client address")],
)
def test_a_cluster_that_cannot_be_reached_is_told_before_ray_is_asked(
    drive: Callable[..., Path], teacher: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address(None) == address and cluster_address("here:1") == "here:1"
    with pytest.raises(ClusterFailed, match=message):
        generate(job(drive(*names(1)), teacher, device="cpu"))
    assert not ray.is_initialized()


# --- a private Ray ----------------------------------------------------------------------------------------------------


def test_other_users_cannot_enter_the_folder_of_a_private_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t-") as place:
        os.chmod(place, 0o777)
        monkeypatch.setenv("RAY_TMPDIR", place)
        with ray_session(None, tmp_path) as session:
            (sockets,) = Path(place).glob("*/*/session_[0-9]*/sockets")
            assert session.is_initialized() and os.listdir(sockets)
            private = sockets.relative_to(place).parts[0]
            assert stat.S_IMODE(Path(place, private).stat().st_mode) == 0o700
        assert os.listdir(place) == []


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup.\nThe raylet may be frozen."),
        TypeError("unsupported operand type(s)"),
        SystemExit(1),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ray_raises_when_it_starts_names_the_way_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(**settings: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    message = r"^cannot start or reach a local Ray \(.+\); without Ray: --engine local$"
    with pytest.raises(ClusterFailed, match=message), ray_session(None, tmp_path):
        pass


def test_a_folder_of_temporary_files_too_long_for_sockets_is_left_for_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("slurm_jobdir_" + "1" * 60)
    deep.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with ray_session(None, tmp_path) as session:
        assert session.is_initialized()
    assert os.listdir(deep) == []


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("d" * 60, "is too long for the path of a socket: expected at most 23 characters"),
        ("missing", "No such file or directory: "),
    ],
)
def test_a_folder_for_ray_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, reason: str
) -> None:
    base = tmp_path if len(folder) > 10 else Path("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", str(base / folder))
    with pytest.raises(ClusterFailed) as failure, ray_session(None, tmp_path):
        pass
    assert reason in str(failure.value) and str(base / folder) in str(failure.value)
    assert str(failure.value).endswith("name another folder in $RAY_TMPDIR; without Ray: --engine local")


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine_name", "how"), [("local", signal.SIGTERM), ("ray", signal.SIGINT)], ids=["local SIGTERM", "ray Ctrl-C"]
)
def test_a_stopped_run_keeps_the_images_that_are_done_within_a_unit(
    drive: Callable[..., Path], teacher: Path, engine_name: str, how: signal.Signals
) -> None:
    """One unit of 40 images: a stop in its middle loses none that is finished."""
    asked = job(drive(*names(40, "slow")), teacher, engine=engine_name, unit_size=64, workers=1)
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/pipeline']; from test_engine import *;"
        "asked = job(Path(sys.argv[2]), Path(sys.argv[3]), engine=sys.argv[4], unit_size=64, workers=1);"
        "say = lambda what: print(what, file=sys.stderr, flush=True);"
        "result = generate(asked, on_progress=lambda p: say(p.done), on_note=say, predictor=fragile);"
        "sys.exit(130 if result.stopped else 0)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(Path(__file__).parents[1]),
        str(asked.manifest),
        str(teacher),
        engine_name,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip().isdigit() and int(line) >= 3:
            break
    process.send_signal(how)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "stopping: images under way are finished" in rest
    done = labels_of(asked.out)
    assert 3 <= len(done) < 40
    result = generate(replace(asked, machine=Machine("local")))
    assert result.accounts == Accounts(40, 40, 0, 0) and result.done == 40 - len(done)
    assert done.items() <= labels_of(asked.out).items()
