"""New labels from a run that has kept its teacher's confidence, by another policy and without the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autolabel.manifests.focus import Focus
from autolabel.manifests.machine import cores
from autolabel.manifests.policy import Policy
from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Run
from autolabel.manifests.tables import parts_of, table_sha256
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.progress import Counters
from autolabel.pipeline.run import Labelling, generate


def relabel(
    source: Run,
    policy: Policy,
    *,
    out: Path,
    keep_probability: bool = False,
    workers: int | None = None,
    on_progress: Callable[[Counters], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Labelling:
    """Label the images of `source` again, by another policy, with so many `workers` (threads).

    The labels are those that `generate` would have made with that policy; of one that weighs polygons, nearly
    (docs/promises.md, 6). Raises ValueError if the run has kept too little for it, is not complete, or its manifest has
    changed; otherwise as `generate`.
    """
    source = replace(source, path=source.path.absolute())
    _require_enough(source, policy)
    if not parts_of(source.input_manifest) or table_sha256(source.input_manifest) != source.input_sha256:
        raise ValueError(
            f"{source.input_manifest}, the manifest of {source.path}, is gone or has changed: put it back as it was"
        )
    if source.state != "complete":
        raise ValueError(f"{source.path} is not complete: finish it first, with the command that began it")
    recipe = source.recipe
    job = LabelJob(
        source.input_manifest, source.teacher or TeacherName(()), out, scales=recipe.scales, flip=recipe.flip,
        focus=None if recipe.share is None else Focus(recipe.share),  # certified pixels are not counted again
        combine=recipe.combine, window=recipe.window, class_map=recipe.class_map, policy=policy, store=recipe.store,
        keep_probability=keep_probability,
        device=recipe.device, precision=recipe.precision, unit_size=recipe.unit_size,
        machine=Machine("local", workers or cores()),
    )  # fmt: skip
    return generate(job, source=source, on_progress=on_progress, on_note=on_note)


def _require_enough(source: Run, policy: Policy) -> None:
    edges = source.recipe.confidence_edges
    if edges is None:
        raise ValueError(f"{source.path} has kept no confidence: generate it anew with --keep-confidence 8")
    policy.require(source.label_space)
    if policy.temperature != source.policy.temperature:
        raise ValueError(
            f"policy {policy.name!r} has temperature {policy.temperature:g}, {source.path}"
            f" {source.policy.temperature:g}: only `autolabel generate` can change it"
        )
    unknown = sorted({policy.threshold, *policy.thresholds.values()}.difference(edges))
    if unknown:
        raise ValueError(
            f"policy {policy.name!r} has threshold {unknown[0]:g}, but {source.path} can tell apart only"
            f" {', '.join(f'{edge:g}' for edge in edges)}: use these, or generate anew"
        )
