"""The run that has kept the confidence behind labels."""

from __future__ import annotations

from autolabel.manifests.run.folder import Run, RunFolder


def kept_in(run: Run) -> Run | None:
    """The run that has kept the confidence of this one: itself, or the one that it was relabelled from; else None."""
    if run.recipe.confidence_edges is not None:
        return run
    if run.source is None or not RunFolder(run.source).exists():
        return None
    source = Run.open(run.source)
    same = source.input_sha256 == run.input_sha256 and source.recipe.teacher_sha256 == run.recipe.teacher_sha256
    return source if same and source.recipe.confidence_edges is not None else None
