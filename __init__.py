"""Label street images with a trained teacher, and train better students on the labels.

    import autolabel as al

    run = al.generate("drive/", teacher="teacher/best.pt", out="runs/auto")
    run.labels["drive_000019"]                                 # (H, W) uint8, 255 = ignore
    print(al.summarise(run))                                   # the table that `autolabel stats` prints
    al.fuse(["fine.parquet", run.manifest_path], out="fused.parquet", leak_check="val.parquet")
    al.train("fused.parquet", val="val.parquet", out="student")

These are the public names; modules below `autolabel` may change from version to version. Importing the package loads
nothing heavy: a function imports what it needs when it is called. Paths are `str` or `Path`. A `progress` is called
with (done, total) while a long work goes on. A mistake in what is asked for raises ValueError, a missing file
FileNotFoundError; both say in one line what was expected.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolabel.manifests.locations import location as _place

if TYPE_CHECKING:
    from autolabel.manifests.account import Account
    from autolabel.manifests.coarsen import Coarsened
    from autolabel.manifests.label_space import LabelSpace
    from autolabel.manifests.policy import Policy
    from autolabel.manifests.run.folder import Run
    from autolabel.manifests.samples import Manifest
    from autolabel.manifests.teachers import AnyTeacher
    from autolabel.manifests.wording import Progress
    from autolabel.pipeline.analysis.audit_record import Audit
    from autolabel.pipeline.analysis.errors_table import LabelErrors
    from autolabel.pipeline.analysis.focus import FocusSummary
    from autolabel.pipeline.analysis.polygon_weights import PolygonWeights
    from autolabel.pipeline.analysis.polygons import PolygonSummary
    from autolabel.pipeline.analysis.stats import Summary
    from autolabel.pipeline.export import Export
    from autolabel.pipeline.imported import Imported
    from autolabel.pipeline.job import LabelJob
    from autolabel.pipeline.progress import Counters
    from autolabel.pipeline.report.notebook import Look
    from autolabel.pipeline.review.review import Review
    from autolabel.student.comparison.verdicts import Comparison
    from autolabel.student.data import ManifestDataset
    from autolabel.student.evaluate import Scores
    from autolabel.student.job import TrainJob
    from autolabel.teacher.export import Exported
    from autolabel.teacher.model import Model
    from autolabel.teacher.predict import Teacher

    __version__: str

AnyPath = str | PathLike[str]

_CLASSES = {
    "LabelJob": "pipeline.job",
    "LabelSpace": "manifests.label_space",
    "Manifest": "manifests.samples",
    "Model": "teacher.model",
    "ManifestDataset": "student.data",
    "Policy": "manifests.policy",
    "Run": "manifests.run.folder",
    "Teacher": "teacher.predict",
    "TrainJob": "student.job",
}

__all__ = [
    "LabelJob", "LabelSpace", "Manifest", "ManifestDataset", "Model", "Policy", "Run", "Teacher", "TrainJob",
    "__version__", "adopt", "audit", "coarsen", "compare", "count_polygons", "evaluate", "export", "export_model",
    "find_errors", "focus", "fuse", "generate", "import_corrections", "load_manifest", "load_teacher", "look",
    "open_run", "ray_dataset", "relabel", "report", "review", "scan", "summarise", "train",
]  # fmt: skip


def scan(
    folder: AnyPath, out: AnyPath | None = None, *, layout: str = "auto", splits: Sequence[str] = (),
    labels: AnyPath | None = None, coarse: AnyPath | None = None, suffix: str = "", pairs: AnyPath | None = None,
    label_space: LabelSpace | str | None = None, label_ids: str | None = None, strict: bool = False,
    progress: Progress | None = None,
) -> Manifest:  # fmt: skip
    """Find and check the images and labels in a folder; write them to the manifest `out` if it is given.

    layout: "cityscapes", "mapillary", "folder" (any folder of images), or "auto", which tries them. splits: some splits
    of a data set, such as ("train", "val"). labels, coarse: folders of label PNGs for images in any folder, with names
    that are longer by `suffix`. pairs: a CSV that names images and labels instead. label_space: a name, a JSON file, or
    an object; data sets bring their own. label_ids: "train", "source" or "color", what the PNGs hold; None is "train".
    strict: refuse what is suspicious; without it, every suspicion is a UserWarning. Raises BadLayout (a ValueError).
    """
    from autolabel.manifests.samples import save_manifest
    from autolabel.manifests.scan import scan

    manifest, account = scan(
        _place(folder), layout=layout, splits=splits, labels=_path(labels), coarse=_path(coarse), suffix=suffix,
        pairs=_path(pairs), label_space=_space(label_space), label_ids=label_ids, progress=progress,
    )  # fmt: skip
    if strict:
        account.require_plausible()
    _warn(account)
    if out is not None:
        save_manifest(_place(out), manifest)
    return manifest


def _warn(account: Account) -> None:
    from autolabel.manifests.wording import plain

    for suspicion in account.suspicions:
        warnings.warn(plain(suspicion), stacklevel=3)


def load_manifest(path: AnyPath) -> Manifest:
    """Read a manifest: its samples with absolute paths, and its label space. Raises BadTable (a ValueError)."""
    from autolabel.manifests.samples import load_manifest

    return load_manifest(_place(path))


def fuse(
    manifests: Sequence[AnyPath], out: AnyPath, *, weights: Mapping[str, float] | None = None,
    leak_check: AnyPath | None = None, drop: AnyPath | None = None, only: AnyPath | None = None,
    drop_worst: float | None = None, keep_if: str | None = None,
) -> Manifest:  # fmt: skip
    """Join the labelled samples of several manifests, write them to the manifest `out`, and return it.

    Where they share an image, a fine label stands before a corrected one, and that before an automatic one; of one
    source, the one given later. weights: by source ("fine", "corrected", "coarse", "auto"), how often its samples are
    drawn in a training. leak_check: a validation manifest that must share no image. drop, only: files of the sample ids
    to leave out, or to take alone, one a line. drop_worst: share of each run's images to leave out, the least
    trusted. keep_if: a condition on the statistics of a run's images, such as "agreement_with_coarse > 0.8". Raises
    ValueError for different label spaces, an image that is listed twice, or a leak.
    """
    from autolabel.manifests.fuse import fuse

    fused = fuse(
        [_place(path) for path in manifests], _place(out), weights=dict(weights or {}), leak_check=_path(leak_check),
        drop=_path(drop), only=_path(only), drop_worst=drop_worst, keep_if=keep_if,
    )  # fmt: skip
    return fused.manifest


def coarsen(
    fine: AnyPath, out: AnyPath, *, hand: str = "rough", seed: int = 0, progress: Progress | None = None
) -> Coarsened:
    """Draw coarse labels, like those of people, out of the fine labels of a manifest; write the manifest `out`.

    The PNGs go into a folder beside it, and its samples have both labels. hand: "even", "rough" or "crossing". seed:
    another one, other polygons. Returns the account: how much is named, and how much of it is right. Raises ValueError.
    """
    from autolabel.manifests.coarsen import coarsen_manifest

    return coarsen_manifest(_place(fine), _place(out), hand=hand, seed=seed, progress=progress)


def train(
    manifest: AnyPath, *, val: AnyPath, out: AnyPath, progress: Progress | None = None, **settings: Any
) -> Scores:
    """Train a network on a manifest, or go on with a training; the best checkpoint is `out`/best.pt.

    settings: the other fields of `TrainJob` and of its machine, such as steps=2000, arch="hrnet48_ocr_mscale" or
    workers=4. progress: called after every step with (steps done, all steps). Returns the scores on `val`. Raises
    ValueError, and TrainingStopped (a RuntimeError) if the loss diverges.
    """
    from autolabel.manifests.settings import build_job
    from autolabel.student.job import TrainJob
    from autolabel.student.train import train

    job = build_job(TrainJob, {"manifest": _place(manifest), "val": _place(val), "out": _place(out), **settings})
    return train(job, None if progress is None else lambda step: progress(step.step, job.steps))


def evaluate(
    checkpoint: AnyPath, manifest: AnyPath, *, scales: Sequence[float] | None = None, flip: bool = False,
    focus: float | None = None, combine: str = "network", pictures: AnyPath | None = None, allow_overlap: bool = False,
    device: str = "auto", workers: int = 1, address: str | None = None, progress: Progress | None = None,
) -> Scores:  # fmt: skip
    """Score a checkpoint on a manifest with fine labels: IoU and boundary F by class, and the worst images.

    scales: sizes at which the network looks at an image; None for those it trains with. flip: average with the mirrored
    image. focus: share of the rows that the highest scale sees; the scales are then those that it labels with, unless
    others are named. combine: "network" as it learnt to, or "average". pictures: an empty folder for drawings of the
    worst images. allow_overlap: also on images that it was trained on. workers, address: processes of Ray that share
    the images, and a cluster; they change no score. Raises ValueError.
    """
    from autolabel.student.evaluate import evaluate
    from autolabel.student.job import ScoreMachine

    return evaluate(
        _place(checkpoint), _place(manifest), scales=scales, flip=flip, focus=focus, combine=combine,
        pictures=_path(pictures), allow_overlap=allow_overlap, device=device, machine=ScoreMachine(workers, address),
        progress=progress,
    )  # fmt: skip


def compare(
    *, fine: AnyPath, val: AnyPath, out: AnyPath, arms: Mapping[str, AnyPath] | None = None,
    coarse: AnyPath | None = None, auto: AnyPath | None = None, seeds: int = 1, added_share: float = 0.5,
    progress: Progress | None = None, **settings: Any,
) -> Comparison:  # fmt: skip
    """Train students that differ in their labels only, and say class by class which learnt more.

    fine: a manifest; the first arm has its labels alone. arms: by name, runs or manifests whose labels an arm adds to
    the fine ones. coarse, auto: the arms of these names, which come first and add labels of this source only. Each arm
    is judged against the first of them, and against fine. val: the manifest to score on. seeds: trainings per arm; a
    verdict needs two or more. added_share: share of the draws that show the labels which an arm adds. settings: the
    other fields of `TrainJob` and of its machine. progress: called with (steps done, steps of all trainings). Finished
    trainings in `out` are not repeated. Raises ValueError.
    """
    from autolabel.manifests.settings import build_job
    from autolabel.student.comparison.compare import all_arms, compare
    from autolabel.student.job import TrainJob

    chosen = all_arms(_path(coarse), _path(auto), {name: _place(path) for name, path in (arms or {}).items()})
    template = build_job(TrainJob, {"manifest": _place(fine), "val": _place(val), "out": _place(out), **settings})
    return compare(
        _place(fine), chosen, template=template, seeds=range(seeds), added_share=added_share,
        on_progress=None if progress is None else lambda now: progress(now.done, now.total),
    )  # fmt: skip


def load_teacher(teacher: AnyTeacher, *, device: str = "auto", precision: str = "auto", **settings: Any) -> Teacher:
    """Load a teacher to label with: `teacher.label(images)` takes (B, H, W, 3) uint8 and returns (B, H, W) uint8.

    settings: window=, class_map= and space= of `teacher.loading.load_teacher`. Raises ValueError, FileNotFoundError.
    """
    from autolabel.teacher.loading import load_teacher

    return load_teacher(teacher, device=device, precision=precision, **settings)


def generate(
    source: AnyPath, *, teacher: AnyTeacher | Teacher, out: AnyPath, policy: Policy | str = "paper",
    polygons: AnyPath | None = None, label_space: LabelSpace | str | None = None, progress: Progress | None = None,
    **settings: Any,
) -> Run:  # fmt: skip
    """Label a folder of images, or the images of a manifest, and return the run; called again, it does what is left.

    teacher: what `load_teacher` takes, or a loaded one, which then labels in this process. policy: a preset ("paper",
    "reference", "human-first", "dense"), a TOML file, or an object. polygons: the file of `count_polygons`, for a
    policy that weighs polygons and names no file of its own. label_space: the classes, for a folder and a teacher that
    does not name them, or has a class_map. settings: the other fields of `LabelJob`, of its portion and its machine,
    such as keep_confidence=8, limit=100 or workers=4. Raises ValueError for a request that cannot be met or
    differs from the one that `out` holds, EngineFailed (a RuntimeError) for units that could not be labelled.
    """
    from autolabel.manifests.settings import build_job
    from autolabel.manifests.teachers import TeacherName
    from autolabel.pipeline.job import LabelJob
    from autolabel.pipeline.run import generate
    from autolabel.pipeline.source import manifest_of
    from autolabel.teacher.predict import Teacher

    rules = _policy(policy, polygons)
    loaded = teacher if isinstance(teacher, Teacher) else None
    name = teacher.name or TeacherName(()) if isinstance(teacher, Teacher) else TeacherName.of(teacher)
    if loaded:
        settings = {"combine": loaded.combine, "window": loaded.window, "class_map": loaded.class_map, **settings}
    manifest = manifest_of(
        _place(source), _place(out), teacher=name, label_space=_space(label_space),
        mapped=settings.get("class_map") is not None, part=settings.get("part"), progress=progress, on_account=_warn,
    )  # fmt: skip
    values = {"manifest": manifest, "teacher": name, "out": _place(out), "policy": rules}
    job = build_job(LabelJob, values | settings)
    return generate(job, teacher=loaded, on_progress=_counting(progress)).require_success()


def relabel(
    run: Run | AnyPath, *, policy: Policy | str, out: AnyPath, polygons: AnyPath | None = None,
    keep_probability: bool = False, workers: int | None = None, progress: Progress | None = None,
) -> Run:  # fmt: skip
    """Label the images of a run again by another policy, from its kept confidence and without the teacher.

    The run must have been generated with `keep_confidence`. polygons: as `generate`. keep_probability: keep how likely
    every label is, for `train` with weights. workers: threads; None for one per core. Raises ValueError if the run has
    kept too little for the policy.
    """
    from autolabel.pipeline.relabel import relabel

    return relabel(
        open_run(run), _policy(policy, polygons), out=_place(out), keep_probability=keep_probability, workers=workers,
        on_progress=_counting(progress),
    ).require_success()  # fmt: skip


def count_polygons(
    fine: AnyPath, out: AnyPath, *, teacher: AnyTeacher | None = None, target_precision: float | None = None,
    workers: int | None = None, progress: Progress | None = None, **settings: Any,
) -> PolygonSummary | PolygonWeights:  # fmt: skip
    """Count what lies how far outside people's polygons, where a manifest has fine and coarse labels; write `out`.

    out: a file such as "polygons.json", for the policy "dense". teacher: fit how much it and the polygons count, and
    write a policy beside the file, "polygons.toml"; target_precision then adds a threshold for each class. settings:
    scales, flip, combine, window, class_map, device and precision, as the teacher will label. Raises ValueError.
    """
    if teacher is None:
        if target_precision is not None or settings:
            asked = next(iter(settings), "target_precision")
            raise ValueError(f"{asked} says how a teacher is weighed: name a teacher")
        from autolabel.pipeline.analysis.polygons import count_polygons

        return count_polygons(_place(fine), output=_place(out), workers=workers, progress=progress)
    from autolabel.manifests.settings import build_job
    from autolabel.manifests.teachers import TeacherName
    from autolabel.pipeline.analysis.polygon_weights import weigh_polygons
    from autolabel.pipeline.job import LabelJob

    named = {"manifest": _place(fine), "teacher": TeacherName.of(teacher), "out": _place(out).parent}
    job = build_job(LabelJob, named | settings)
    return weigh_polygons(job, target_precision, output=_place(out), workers=workers, progress=progress)


def focus(
    manifest: AnyPath, out: AnyPath, *, teacher: AnyTeacher, share: float = 0.25, limit: int = 100,
    progress: Progress | None = None, **settings: Any,
) -> FocusSummary:  # fmt: skip
    """Try a focus on images of a manifest, and write its certificate `out`, such as "focus.json".

    share: of the rows that the highest scale sees. limit: images that are looked at, evenly over the groups. settings:
    scales, flip, combine, class_map, device and precision, as the teacher will label. Raises ValueError.
    """
    from autolabel.manifests.settings import build_job
    from autolabel.manifests.teachers import TeacherName
    from autolabel.pipeline.analysis.focus import try_focus
    from autolabel.pipeline.job import LabelJob

    named = {"manifest": _place(manifest), "teacher": TeacherName.of(teacher), "out": _place(out).parent}
    job = build_job(LabelJob, named | settings)
    return try_focus(job, share, output=_place(out), limit=limit, progress=progress)


def adopt(
    pngs: AnyPath, *, manifest: AnyPath, out: AnyPath, confidence: AnyPath | None = None, label_ids: str = "train",
    label_space: LabelSpace | str | None = None, policy: Policy | str = "paper", polygons: AnyPath | None = None,
    progress: Progress | None = None, **settings: Any,
) -> Run:  # fmt: skip
    """Take PNGs of class ids that any other tool has made over as a run whose teacher is not known.

    pngs: a folder of 8-bit PNGs with the relative paths and stems of the manifest's images. confidence: a folder of
    8-bit PNGs of their probabilities, 0 to 255; None for 1 everywhere. label_ids: "train", "source" or "color", what
    the PNGs hold; label_space: their classes, if class_map= maps them onto the manifest's. policy, polygons: see
    `generate`. settings: class_map, keep_confidence, keep_probability, store, unit_size, max_quarantined and workers.
    Raises ValueError.
    """
    from autolabel.pipeline.adopt import Pngs, adopt, adopting_job

    source = Pngs(_place(pngs), _path(confidence), label_ids, _space(label_space))
    job = adopting_job(_place(manifest), _place(out), _policy(policy, polygons), **settings)
    return adopt(source, job, progress=progress).require_success()


def export(
    source: Run | AnyPath, out: AnyPath, *, to: str, worst: int | None = None, ids: AnyPath | None = None,
    keep_if: str | None = None, label_ids: str = "train", flat: bool = False, images: str = "copy",
    progress: Progress | None = None,
) -> Export:  # fmt: skip
    """Send the labels of a run or manifest into the folder `out`, in the form of another tool; return the account.

    to: "png", "cityscapes", "ultralytics", "hf", "coco", "cvat" or "label-studio". worst, ids, keep_if: the images that
    are sent: so many, the least trusted first; those that a file names; those that meet a condition. label_ids, flat,
    images: see docs/export-labels.md. Raises ValueError for a folder that holds something else.
    """
    from autolabel.manifests.formats.style import Style
    from autolabel.pipeline.export import export

    return export(
        _opened(source), to, _place(out), style=Style(label_ids, flat, images), worst=worst, ids=_path(ids),
        keep_if=keep_if, progress=progress,
    )  # fmt: skip


def import_corrections(
    paths: Sequence[AnyPath], *, format: str, run: Run | AnyPath, out: AnyPath, partial: bool = False,
    only_changed: bool = False, label_ids: str | None = None, suffix: str = "", progress: Progress | None = None,
) -> Imported:  # fmt: skip
    """Take back what people corrected of a run's labels: the manifest `out`, and a folder beside it.

    format: "png", "cvat", "coco" or "label-studio". paths: files or folders; where two change a pixel, the later one
    stands. partial: pixels without a class were not looked at. only_changed: leave out images that came back as they
    were. label_ids, suffix: what PNGs hold, and how much longer their names are. Raises ValueError.
    """
    from autolabel.pipeline.corrections import import_corrections

    return import_corrections(
        format, [_place(path) for path in paths], run=open_run(run), out=_place(out), partial=partial,
        only_changed=only_changed, label_ids=label_ids, suffix=suffix, progress=progress,
    )  # fmt: skip


def review(
    run: Run | AnyPath, budget: int | str, *, out: AnyPath, to: str | None = None, audit: AnyPath | None = None,
    student: AnyPath | None = None, done: AnyPath | None = None, progress: Progress | None = None,
) -> Review:  # fmt: skip
    """Choose what people should correct: a number of images, or regions for a time such as "30min"; write it to `out`.

    to: export the images in this format too. audit, student: audit.json of this teacher, scores.json of a student.
    done: a file of ids that are corrected already. Raises ValueError.
    """
    from autolabel.pipeline.review.review import review

    return review(
        open_run(run), budget, out=_place(out), to=to, audit=_path(audit), student=_path(student), done=_path(done),
        progress=progress,
    )  # fmt: skip


def find_errors(
    source: Run | AnyPath, out: AnyPath, *, runs: Sequence[Run | AnyPath] = (), coarse: bool = False,
    worst: int | None = None, pictures: int = 0, progress: Progress | None = None,
) -> LabelErrors:  # fmt: skip
    """Rank likely mistakes in the human labels of a run's input, or of a manifest judged by `runs`; write it to `out`.

    The runs must have kept their confidence. coarse: judge coarse labels, also where there are fine ones. worst: list
    so many images. pictures: draw so many regions. Raises ValueError.
    """
    from autolabel.pipeline.analysis.errors import find_errors

    return find_errors(
        _opened(source), _place(out), runs=[open_run(run) for run in runs], coarse=coarse, worst=worst,
        pictures=pictures, progress=progress,
    )  # fmt: skip


def export_model(
    checkpoint: AnyPath, output: AnyPath, *, size: tuple[int, int] | None = None, scales: Sequence[float] | None = None,
    gives: str = "logits", progress: Progress | None = None, **settings: Any,
) -> Exported:  # fmt: skip
    """Write a checkpoint as `.onnx` or `.pt2` for other programs, after comparing the two on images.

    size: the only height and width that the file takes; None for any. scales: those inside it; None for those of the
    training. gives: "logits", "probabilities" or "classes". settings: batch= and label_space= of
    `teacher.export.export_model`. Raises BadExport (a ValueError).
    """
    from autolabel.teacher.export import export_model

    return export_model(
        _place(checkpoint), _place(output), size=size, scales=scales, gives=gives, progress=progress, **settings
    )


def open_run(run: Run | AnyPath) -> Run:
    """Open a run folder: `.labels`, `.statistics()`, `.manifest`, `.recipe`, `.accounts`.

    Raises FileNotFoundError if it is no run, ValueError if its `run.json` cannot be trusted.
    """
    from autolabel.manifests.run.folder import Run

    return Run.open(_folder(run))


def ray_dataset(run: Run | AnyPath, *, columns: Sequence[str] = ()) -> Any:
    """Make a Ray Data data set of the labelled samples of a finished run; return the `ray.data.Dataset`.

    Its columns are "sample_id", "image" (H, W, 3) uint8, "label" (H, W) uint8 with 255 = ignore, "height", "width", and
    what the run has kept: "confidence", levels (H, W) uint8, and "probability", 255ths (H, W) uint8. columns: the ones
    that are read; () for all. Pixels are read by the workers, which need the package and access to the files. Raises
    BadTable until the run has been published, ValueError for a column that it does not have.
    """
    from autolabel.manifests.ray_source import ray_dataset

    return ray_dataset(open_run(run), columns)


def summarise(run: Run | AnyPath) -> Summary:
    """Sum up the labels of a finished run, class by class: the tables that `autolabel stats` prints.

    Raises BadTable (a ValueError) until the run has been published.
    """
    from autolabel.pipeline.analysis.stats import summarise

    return summarise(_folder(run))


def look(run: Run | AnyPath, n: int = 6, *, samples: Sequence[str] = ()) -> Look:
    """Show images of a finished run in a notebook: photograph, coarse label and auto label side by side.

    n: how many, mostly the least trusted. samples: ids to show instead. Raises ValueError for an unknown id.
    """
    from autolabel.pipeline.report.notebook import look

    return look(_folder(run), n, samples=samples)


def audit(
    run: Run | AnyPath, *, truth: AnyPath, target_precision: float = 0.95, fit_temperature: bool = False,
    allow_leak: bool = False, teacher: AnyTeacher | None = None, progress: Progress | None = None,
) -> Audit:  # fmt: skip
    """Hold a run's labels against fine labels: precision, borders, calibration, and a threshold for each class.

    truth: a manifest with fine labels of images that the run labelled. target_precision: of every class's label.
    fit_temperature: scale the teacher's logits so that its confidences come true. allow_leak: also with truth that the
    teacher was trained on. teacher: its checkpoint, if it has been moved. Writes audit.json and suggested.toml into
    the run. Raises ValueError.
    """
    from autolabel.pipeline.analysis.audit import audit

    return audit(
        _folder(run), _place(truth), target_precision=target_precision, fit_temperature=fit_temperature,
        allow_leak=allow_leak, teacher=teacher, progress=progress,
    )  # fmt: skip


def report(
    run: Run | AnyPath, *, images: int = 100, samples: Sequence[str] = (), teacher: AnyPath | None = None,
    attention: bool = False, specks: int = 64, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Write the report of a finished run, plots and a gallery, and return its page.

    images: how many are shown, the least trusted first. samples: ids to show instead. attention: draw what the teacher
    sees at each scale. specks: mark pieces of fewer pixels. teacher: its checkpoint, if it has been moved. Raises
    ValueError.
    """
    from autolabel.pipeline.report.write import write_report

    return write_report(
        _folder(run), images=images, samples=samples, teacher=teacher, attention=attention, specks=specks,
        progress=progress,
    )  # fmt: skip


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else _place(path)


def _opened(source: Run | AnyPath) -> Run | Path:
    return _place(source) if isinstance(source, str | PathLike) else source


def _folder(run: Run | AnyPath) -> Path:
    return _place(run) if isinstance(run, str | PathLike) else run.path


def _policy(policy: Policy | str, polygons: AnyPath | None = None) -> Policy:
    from autolabel.manifests.evidence import PolygonCounts
    from autolabel.manifests.policy import load_policy

    rules = load_policy(policy) if isinstance(policy, str) else policy
    return rules if polygons is None else rules.counted(PolygonCounts.read(_place(polygons)))


def _space(space: LabelSpace | str | None) -> LabelSpace | None:
    from autolabel.manifests.label_space import load_label_space

    return load_label_space(space) if isinstance(space, str) else space


def _counting(progress: Progress | None) -> Callable[[Counters], None] | None:
    return None if progress is None else lambda now: progress(now.before + now.done, now.before + now.wanted)


if not TYPE_CHECKING:  # a type checker knows the names by the imports above

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("autolabel")
        if name not in _CLASSES:
            raise AttributeError(f"module 'autolabel' has no attribute {name!r}")
        return getattr(importlib.import_module(f"autolabel.{_CLASSES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
