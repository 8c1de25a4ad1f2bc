"""Do a policy, and a focus, fit the images that they are for? Asked before anything is labelled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autolabel.manifests import notes
from autolabel.manifests.focus import Focus, FocusCertificate
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import Policy
from autolabel.manifests.samples import ManifestFile
from autolabel.manifests.wording import counted, listed, number
from autolabel.pipeline.job import LabelJob
from autolabel.teacher.predict import Teacher

_ASPECT = 0.05  # images may be so much wider or narrower than those whose polygons were counted
_FEW = 20  # counted images that say little
_SHOWN = 3  # sizes in a message


def require_policy(job: LabelJob, manifest: ManifestFile) -> None:
    """Raise ValueError if the policy does not fit the label space, or an image of the manifest."""
    policy = job.policy
    policy.require(manifest.label_space)
    policy.edges(manifest.label_space, job.keep_confidence)
    if policy.area is None and policy.polygons is None:
        return
    fitting = set[tuple[int, int, bool]]()
    for table in manifest.tables():
        columns = (table[name].to_pylist() for name in ("height", "width", "coarse_label", "image"))
        for height, width, coarse, image in zip(*columns, strict=True):
            case = height, width, coarse is not None
            if height and case not in fitting:  # without a height it cannot be read
                try:
                    _require_fitting(policy, height, width, drawn=coarse is not None)
                except ValueError as error:
                    raise ValueError(f"{image}: {error}") from error
                fitting.add(case)


def _require_fitting(policy: Policy, height: int, width: int, *, drawn: bool) -> None:
    if policy.area is not None:
        policy.area.box(height, width)
    if policy.polygons is None or policy.polygons.counts is None or not drawn:
        return
    shapes = policy.polygons.counts.shapes
    if all(abs(w * height / (h * width) - 1) > _ASPECT for w, h in shapes):
        raise ValueError(
            f"it is {width} x {height}, but the polygons were counted on images of {_in_words(shapes)}: count them on"
            " images of this shape"
        )


def focus_for(
    job: LabelJob, scales: tuple[float, ...], *, teacher_sha256: str, space: LabelSpace
) -> Focus | None:  # fmt: skip
    """The focus of a job. Raises ValueError if a certificate is of another teacher, way of looking, or classes."""
    if not isinstance(job.focus, FocusCertificate):
        return job.focus
    job.focus.require(teacher_sha256=teacher_sha256, scales=scales, flip=job.flip, combine=job.combine)
    if job.focus.classes != space.names:
        raise ValueError(
            f"the focus was measured for {counted(len(job.focus.classes), 'class', 'classes')}, not for those of label"
            f" space {space.name!r}: run `autolabel focus` again"
        )
    return job.focus.focus


def require_large_enough(manifest: ManifestFile, teacher: Teacher, scales: Sequence[float], *, share: float) -> None:
    """Raise ValueError if all images are too small for a band of the highest scale; tell how many are."""
    sizes = Counter[tuple[int, int]]()
    for table in manifest.tables():
        sizes.update(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))
    readable = {size: images for size, images in sizes.items() if size[0]}
    small = {size: n for size, n in readable.items() if not teacher.network.focuses(size, scales, share=share)}
    if not small:
        return
    shown = _in_words(sorted((width, height) for height, width in small))
    if len(small) == len(readable):
        raise ValueError(
            f"focus {share:g}: images of {shown} are too small, a band with what has to be seen around it would be the"
            " whole of them: leave --focus out, or give a smaller share"
        )
    notes.tell(
        f"{number(sum(small.values()))} of {counted(sum(readable.values()), 'image')} are too small for a focus and are"
        f" seen whole: {shown}"
    )


def notes_on_polygons(policy: Policy, manifest: ManifestFile, *, teacher_sha256: str) -> tuple[str, ...]:
    """Sentences for a person whose policy weighs counts of polygons in the images of a manifest."""
    counts = policy.polygons and policy.polygons.counts
    if not counts:
        return ()
    sizes = set[tuple[int, int]]()
    for table in manifest.tables():
        columns = (table[name].to_pylist() for name in ("width", "height", "coarse_label"))
        sizes.update((w, h) for w, h, coarse in zip(*columns, strict=True) if coarse is not None and h)
    if not sizes:
        return (f"policy {policy.name!r} weighs polygons, but no image has any: the teacher alone decides",)
    said = []
    if counts.teacher not in ("", teacher_sha256):
        said.append(
            "polygons were held against what another teacher says beside them: `autolabel polygons --teacher` with"
            " this one, or none, counts what fits"
        )
    if counts.images < _FEW:
        said.append(f"polygons were counted on {counted(counts.images, 'image')} only: {_FEW} or more say more")
    if others := sorted(sizes.difference(counts.shapes)):
        said.append(
            f"polygons were counted on images of {_in_words(counts.shapes)}; in those of {_in_words(others)} distances"
            " are shares of the width"
        )
    if counts.unseen:
        said.append(f"polygons say nothing of {listed(counts.unseen)}, of which no unnamed pixel was counted")
    return tuple(said)


def _in_words(sizes: list[tuple[int, int]]) -> str:
    more = [f"{len(sizes) - _SHOWN} other sizes"] if len(sizes) > _SHOWN else []
    return listed([*(f"{width} x {height}" for width, height in sizes[:_SHOWN]), *more])
