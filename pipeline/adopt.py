"""Labels that another tool has made, taken over as a run: class-id PNGs stand in for a teacher that nobody knows.

All PNGs are checked before the run begins, and those that cannot be used are counted against the share of quarantined
images that is allowed: a wrong folder, size or set of ids is one line, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.checking import hint_about
from autolabel.manifests.images import LABEL_SUFFIXES, BadImage
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.machine import cores
from autolabel.manifests.policy import Policy
from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.samples import ManifestFile, Sample, open_manifest
from autolabel.manifests.schemas import LABEL_IDS
from autolabel.manifests.teachers import TeacherName
from autolabel.manifests.walk import Aside, by_name, common_end, composed
from autolabel.manifests.wording import Progress, counted
from autolabel.pipeline.adopted import Adopted, AdoptedPredictor, Entry, PngFile, PngSource, write_entries
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.lock import Lock
from autolabel.pipeline.progress import Counters
from autolabel.pipeline.run import Labelling, generate

NOBODY = TeacherName(())


@dataclass(frozen=True)
class Pngs:
    """The PNGs that are to be adopted.

    folder: 8-bit PNGs of class ids. confidence: those of probabilities, 0 to 255, None for 1 everywhere. Both have the
    relative paths and stems of the images, or of their sample ids, longer by `suffix`. label_ids: "train", "source" or
    "color", of the label space `space`; None for the manifest's.
    """

    folder: Path
    confidence: Path | None = None
    label_ids: str = LABEL_IDS[0]
    space: LabelSpace | None = None
    suffix: str = ""


def adopt(
    pngs: Pngs,
    job: LabelJob,
    *,
    on_progress: Callable[[Counters], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Labelling:
    """Take PNGs over as the run that a job asks for; its teacher is `NOBODY`. `progress` counts the checked samples.

    A class map of the job leads from `pngs.space` to the manifest's classes. Raises ValueError for a policy that asks
    for confidences which nobody knows, for PNGs of which too many cannot be used, and for those that have changed since
    they were adopted; otherwise as `generate`.
    """
    job = replace(job, manifest=job.manifest.absolute(), out=job.out.absolute())
    manifest, folder = open_manifest(job.manifest), RunFolder(job.out)
    folder.require_new_or_run()
    _require_confidences(job, known=pngs.confidence is not None)
    source = _source(pngs, job, manifest)
    before = Adopted.of(folder) if folder.exists() and Run.open(job.out).teacher is None else None
    if before is not None and before.terms != source.terms():
        changed = [name for name, value in source.terms().items() if before.terms.get(name) != value]
        raise ValueError(
            f"{job.out} was adopted with another {', '.join(changed).replace('_', ' ')}: ask the same again to go on"
            " with it, or choose another --out"
        )
    entries, note = _checked(pngs, source, manifest, job, before.entries if before else {}, progress)
    if before is not None:
        _require_unchanged(Run.open(job.out), before, entries)
        if any(_mended(before.entries.get(entry.sample_id), entry) for entry in entries):
            job = replace(job, portion=replace(job.portion, retry_quarantined=True))
    with Lock(job.out, None).held():
        folder.claim()
        write_entries(folder, source, entries)
    by_id = {entry.sample_id: entry for entry in entries}
    if on_note:
        on_note(note)
    return generate(
        job, predictor=lambda run, device: AdoptedPredictor(source, by_id, run.recipe),
        on_progress=on_progress, on_note=on_note,
    )  # fmt: skip


def adopting_job(manifest: Path, out: Path, policy: Policy, workers: int | None = None, **settings: object) -> LabelJob:
    """The job of an adopted run: no teacher, no device but the CPU, one look at every image."""
    return LabelJob(
        manifest, NOBODY, out, scales=(1.0,), policy=policy, device="cpu", precision="float32",
        machine=Machine("local", workers or cores()), **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def _source(pngs: Pngs, job: LabelJob, manifest: ManifestFile) -> PngSource:
    """The folders and ids as they are read. Raises ValueError."""
    for path in (pngs.folder, pngs.confidence):
        if path is not None and not storage.is_folder(path):
            raise ValueError(f"{path} is not a folder" + ("" if storage.exists(path) else " that exists"))
    if pngs.label_ids not in LABEL_IDS:
        raise ValueError(f"label ids {pngs.label_ids!r}: expected {', '.join(LABEL_IDS)}")
    if job.class_map is not None and pngs.space is None:
        raise ValueError(f"{job.class_map.where} maps the classes of the PNGs: say with --label-space which they are")
    target, space = manifest.label_space, pngs.space or manifest.label_space
    if job.class_map is not None:
        train_ids = job.class_map.indices(space.names, target, teacher=f"label space {space.name!r}")
        targets = bytes(train_ids).ljust(256, bytes([IGNORE]))
    elif space != target:
        raise ValueError(
            f"the PNGs are of label space {space.name!r}, {manifest.path} of {target.name!r}: say with --classes what"
            " their classes mean"
        )
    else:
        targets = bytes(range(256))
    other = pngs.confidence and pngs.confidence.absolute()
    return PngSource(pngs.folder.absolute(), space, pngs.label_ids, targets, other)


def _require_confidences(job: LabelJob, *, known: bool) -> None:
    """Raise ValueError if the job asks for confidences that are not known; the top class's alone is, at best."""
    policy = job.policy
    if policy.temperature != 1:
        raise ValueError(
            f"policy {policy.name!r} asks for a temperature, which needs the probabilities of all classes: leave it"
            " out, the PNGs do not hold them"
        )
    if job.asks_of_confidence and not known:
        raise ValueError(
            f"{job.asks_of_confidence} needs confidences, but these PNGs hold class ids alone, so each counts as 1:"
            " name a folder of them with --confidence, or leave it out"
        )


# --- checks before anything is written --------------------------------------------------------------------------------


def _checked(
    pngs: Pngs,
    source: PngSource,
    manifest: ManifestFile,
    job: LabelJob,
    before: Mapping[str, Entry],
    progress: Progress | None,
) -> tuple[list[Entry], str]:
    """Pair and read all PNGs; and a sentence about them. Raises ValueError if too many of them cannot be used."""
    samples = list(manifest.samples())
    files = _files(pngs.folder, pngs.suffix)
    key = _pairing(samples, manifest, files)
    levels = _files(pngs.confidence, pngs.suffix) if pngs.confidence else {}
    names = [key(sample) for sample in samples]
    if samples and not files.keys() & set(names):
        raise ValueError(_none_fits(pngs, files, names, manifest))

    def check(pair: tuple[Sample, str]) -> tuple[Entry, BadImage | None]:
        sample, name = pair
        if name not in files:
            return Entry(sample.sample_id, reason=f"no PNG {name}{pngs.suffix}.png under {pngs.folder}"), None
        png, confidence = (_named(f.get(name), d) for f, d in ((files, pngs.folder), (levels, pngs.confidence)))
        entry = Entry(sample.sample_id, png, confidence)
        return _check(entry, sample, source, before.get(sample.sample_id))

    entries, errors, missing = list[Entry](), list[BadImage](), list[Entry]()
    with ThreadPoolExecutor(cores()) as pool:
        for entry, error in ahead(pool, check, zip(samples, names, strict=True), 2 * cores()):
            entries.append(entry)
            errors += [error] if error else []
            missing += [] if entry.png else [entry]
            if progress:
                progress(len(entries), len(samples))
    _require_few(errors, missing, len(samples), source, job)
    unused = sorted(files.keys() - set(names))
    words = "their own confidence" if source.confidence else "confidence 1, as these PNGs hold class ids alone"
    first = f"; {counted(len(unused), 'PNG')} belong to no image (the first is {files[unused[0]]})" if unused else ""
    return entries, f"{counted(len(entries) - len(missing), 'PNG')} of {pngs.folder} with {words}{first}"


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    return by_name(folder, LABEL_SUFFIXES, aside=Aside(), end=suffix)


def _named(path: Path | None, folder: Path | None) -> PngFile | None:
    return None if path is None or folder is None else PngFile(path.relative_to(folder).as_posix())


def _pairing(samples: Sequence[Sample], manifest: ManifestFile, files: Mapping[str, Path]) -> Callable[[Sample], str]:
    """The name of a sample's PNG without its ending: its id, or its image's path, whichever fits more PNGs."""

    def by_id(sample: Sample) -> str:
        return composed(sample.sample_id)

    def by_path(sample: Sample) -> str:
        return composed(sample.image.relative_to(manifest.image_root).with_suffix("").as_posix())

    def fitting(key: Callable[[Sample], str]) -> int:
        return sum(key(sample) in files for sample in samples)

    return max((by_id, by_path), key=fitting)


def _none_fits(pngs: Pngs, files: Mapping[str, Path], names: Sequence[str], manifest: ManifestFile) -> str:
    expected = pngs.folder / f"{names[0]}{pngs.suffix}{LABEL_SUFFIXES[0]}"
    if not files:
        return f"no PNGs under {pngs.folder}: expected e.g. {expected}"
    end = "" if pngs.suffix else common_end(names, files)
    hint = f"; their names are longer by {end!r}: try --suffix {end}" if end else ""
    return (
        f"none of the {len(files)} PNGs under {pngs.folder} belongs to an image of {manifest.path}: expected e.g."
        f" {expected}{hint}"
    )


def _check(entry: Entry, sample: Sample, source: PngSource, before: Entry | None) -> tuple[Entry, BadImage | None]:
    """The entry with the identity of its files; and the error if one cannot be used."""
    identified = {of: _identified(source.path(file, confidence=of), file) for of, file in entry.files()}
    known = {of: file for of, file in before.files() if file.fingerprint} if before and not before.reason else {}
    if identified.keys() == known.keys() and all(_same(file, known[of]) for of, file in identified.items()):
        assert before is not None
        return before, None
    entry = replace(entry, png=identified.get(False), confidence=identified.get(True))
    size = (sample.height, sample.width)
    try:
        _, _, marks = source.read(entry, size) if sample.readable else ((), (), [])
    except BadImage as error:
        return replace(entry, reason=str(error)), error
    files = [replace(file, fingerprint=mark) for (_, file), mark in zip(entry.files(), marks, strict=False)]
    return (replace(entry, png=files[0], confidence=next(iter(files[1:]), None)) if files else entry), None


def _identified(path: Path, file: PngFile) -> PngFile:
    now = storage.stat(path)
    return replace(file, bytes=now.size, mtime_ns=now.mtime_ns, version=now.version) if now else file


def _same(now: PngFile, known: PngFile) -> bool:
    return now == replace(known, fingerprint=None)


def _require_few(
    errors: Sequence[BadImage], missing: Sequence[Entry], asked: int, source: PngSource, job: LabelJob
) -> None:
    """Raise ValueError, naming the first, if more PNGs cannot be used than may be quarantined."""
    if len(errors) + len(missing) <= job.max_quarantined * asked:
        return
    without = f"go on without {'it' if len(errors) + len(missing) == 1 else 'them'}: --max-quarantined SHARE"
    if errors:
        more = f" (and {len(errors) - 1} more PNGs)" if errors[1:] else ""
        hint = hint_about(errors, source.space)
        raise ValueError(f"{errors[0]}{more}{hint}: repair or remove it, name the right ids, or {without}")
    some = f" (and {len(missing) - 1} more images)" if missing[1:] else ""
    raise ValueError(
        f"image {missing[0].sample_id!r}{some} has {missing[0].reason}: list the images that have one with `autolabel"
        f" manifest scan`, or {without}"
    )


def _require_unchanged(run: Run, before: Adopted, entries: Sequence[Entry]) -> None:
    """Raise ValueError if the label of a sample was made from a PNG that has changed since."""
    labelled: set[str] | None = None
    for entry in entries:
        earlier = before.entries.get(entry.sample_id)
        if earlier is None or _marks(earlier) == _marks(entry):
            continue
        labelled = set(run.labels) if labelled is None else labelled
        if entry.sample_id in labelled:
            name = entry.png.name if entry.png else earlier.png.name if earlier.png else entry.sample_id
            what = "has changed" if entry.png else "is gone"
            raise ValueError(
                f"{before.folder / name} {what} since it was adopted: put the old one back, or adopt into a new --out"
            )


def _mended(before: Entry | None, now: Entry) -> bool:
    """True if a sample that may have been quarantined for its PNG can be labelled now."""
    return before is not None and not now.reason and (bool(before.reason) or _marks(before) != _marks(now))


def _marks(entry: Entry) -> list[str | None]:
    return [file.fingerprint for _, file in entry.files()]
