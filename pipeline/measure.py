"""One predicted image becomes its label, and the maps and numbers that a run keeps of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.centroids import centroids
from autolabel.manifests.run.labels import CONFIDENCE, LABELS, PROBABILITY, SECOND, TOP
from autolabel.manifests.run.shards import Frames, Label, crc32c, encode_zarr
from autolabel.manifests.schemas import CONFIDENCE_BINS, FATES
from autolabel.pipeline.predictor import Decoded
from autolabel.pipeline.records import LABELLED, Row
from autolabel.pipeline.rules import Outcome, Rules
from autolabel.teacher.decide import Prediction


@dataclass(frozen=True)
class Predicted:
    """A sample with its prediction, which took `infer_ms` milliseconds."""

    decoded: Decoded
    prediction: Prediction
    infer_ms: float


@dataclass(frozen=True)
class Labelled:
    """One sample: its row of numbers, and its encoded map of every layer; none if it was quarantined."""

    row: Row
    encoded: dict[str, Frames] = field(default_factory=dict)


def labelled(one: Predicted, rules: Rules, recipe: Recipe) -> Labelled:
    """The label of a predicted sample, encoded for the recipe's store, with its numbers."""
    prediction, space = one.prediction, recipe.label_space
    outcome = rules.apply(prediction.codes, one.decoded.coarse, prediction.probability, least=prediction.least)
    started = time.perf_counter()
    maps = {LABELS: encoded(outcome.label, recipe.store)}
    checksums: dict[str, Any] = {}
    for layer, values in kept_maps(outcome, prediction, recipe).items():
        maps[layer], checksums[f"{layer}_crc32c"] = encoded(values, recipe.store), crc32c(values)
    row = replace(
        one.decoded.row,
        status=LABELLED,
        infer_ms=one.infer_ms,
        encode_ms=1e3 * (time.perf_counter() - started),
        label_bytes=sum(map(len, maps[LABELS])),
        classes=class_numbers(outcome, prediction, space),
        centroids=centroids(outcome.label, len(space)),
        **image_numbers(outcome, prediction),
        **checksums,
    )
    return Labelled(row, maps)


def encoded(label: Label, store: str) -> Frames:
    """A map (H, W) uint8 in the form of a store: one PNG, or the chunks of a Zarr array."""
    return (encode_label(label),) if store == "png" else encode_zarr(label)


def kept_maps(outcome: Outcome, prediction: Prediction, recipe: Recipe) -> dict[str, Label]:
    """The maps (H, W) uint8 that a recipe wants beside the label, by layer.

    Top class, level and second class are the teacher's own, before polygons were weighed.
    """
    maps = dict[str, Label]()
    if recipe.confidence_edges is not None:
        own = prediction.codes if prediction.own is None else prediction.own
        top, level = np.divmod(own, prediction.levels)
        maps |= {TOP: top.astype(np.uint8), CONFIDENCE: level.astype(np.uint8)}
        if prediction.second is not None:
            maps[SECOND] = prediction.second
    if outcome.probability is not None:
        maps[PROBABILITY] = outcome.probability
    return maps


def image_numbers(outcome: Outcome, prediction: Prediction) -> dict[str, Any]:
    """The columns of `stats/images.parquet` that follow from the label.

    agreement_with_coarse: share of the coarse pixels to which the teacher, before the coarse label was asked, gives the
    same class (null without coarse pixels). focus_top, focus_bottom: the first row that the highest scale has seen, and
    the one after the last (null without a focus). certified_fraction: share of the pixels that the teacher's rules keep
    whose label it could not change (null without a certificate, or without such pixels).
    """
    label, certified, kept = outcome.label, outcome.certified, int(outcome.fates[:, 0].sum())
    labelled, coarse_pixels = int(outcome.pixels.sum()), int(outcome.coarse.sum())
    return {
        "labelled_pixels": labelled,
        "ignored_fraction": 1 - labelled / label.size,
        "mean_confidence": float(prediction.confidence.sum()) / label.size,
        "coarse_pixels": coarse_pixels,
        "focus_top": None if prediction.seen is None else prediction.seen[0],
        "focus_bottom": None if prediction.seen is None else prediction.seen[1],
        "certified_fraction": None if certified is None or not kept else int(certified.sum()) / kept,
        "agreement_with_coarse": int(outcome.agreeing.sum()) / coarse_pixels if coarse_pixels else None,
        "label_crc32c": crc32c(label),
    }


def class_numbers(outcome: Outcome, prediction: Prediction, space: LabelSpace) -> list[dict[str, Any]]:
    """The rows of `stats/classes.parquet` for one image: every class that the teacher or the coarse label names.

    mean_confidence and confidence_hist are over the pixels whose top class it is, before the threshold, and so are the
    fates. coarse_pixels: pixels of this class in the coarse label; agreeing_pixels: those to which the teacher, before
    the coarse label was asked, gives the same class; contradicted_pixels: another one (it gives none to the rest).
    unfocused_pixels: pixels of this top class that the highest scale has not seen (null without a focus);
    certified_pixels: kept pixels whose label it could not change (null without a certificate).
    """
    unfocused = _unfocused(prediction, len(space))
    rows = []
    for c, name in enumerate(space.names):
        seen, coarse_pixels = int(prediction.histogram[c].sum()), int(outcome.coarse[c])
        if seen == 0 and coarse_pixels == 0:
            continue
        pixels = int(outcome.pixels[c])
        rows.append(
            {
                "class_id": c,
                "class_name": name,
                "pixels": pixels,
                "fraction": pixels / outcome.label.size,
                "mean_confidence": float(prediction.confidence[c]) / seen if seen else None,
                "confidence_hist": prediction.histogram[c].tolist() if seen else [0] * CONFIDENCE_BINS,
                "coarse_pixels": coarse_pixels,
                "agreeing_pixels": int(outcome.agreeing[c]),
                "contradicted_pixels": int(outcome.contradicted[c]),
                **{f"{fate}_pixels": int(n) for fate, n in zip(FATES, outcome.fates[c], strict=True)},
                "from_human_pixels": int(outcome.from_human[c]),
                "unfocused_pixels": None if unfocused is None else int(unfocused[c]),
                "certified_pixels": None if outcome.certified is None else int(outcome.certified[c]),
            }
        )
    return rows


def _unfocused(prediction: Prediction, classes: int) -> NDArray[np.int64] | None:
    """Pixels (C,) by top class in rows that the highest scale has not seen, None without a focus."""
    if prediction.seen is None:
        return None
    top, bottom = prediction.seen
    outside = np.concatenate([prediction.codes[:top].ravel(), prediction.codes[bottom:].ravel()])
    counts = np.bincount(outside, minlength=classes * prediction.levels).reshape(classes, prediction.levels)
    by_class: NDArray[np.int64] = counts.sum(axis=1)
    return by_class
