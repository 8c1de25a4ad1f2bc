"""The labels of a run as a torch data set, for a training of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.reading import fetch_photograph, picture_of
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import CERTAIN, CONFIDENCE, KEEP_PROBABILITY, PROBABILITY
from autolabel.manifests.run.sample_labels import FetchedLabel, fetch_label, fetch_layer
from autolabel.manifests.samples import Sample
from autolabel.student.data import PADDING, ManifestDataset, window_along
from autolabel.student.loading import AHEAD

Transform = Callable[[dict[str, Any]], Any]


class _Place(NamedTuple):
    """A window along one axis: first pixel and length in the image, first pixel in the crop, and the crop's side."""

    first: int
    length: int
    at: int
    side: int


class RunDataset(ManifestDataset):
    """The labelled samples of a finished run, as whole images or random crops of them; `Run.to_torch` documents it."""

    def __init__(
        self,
        run: Run,
        *,
        crop: tuple[int, int] | None = None,
        transform: Transform | None = None,
        weights: bool = False,
    ) -> None:
        if crop is not None and min(crop) < 1:
            raise ValueError(f"crop {crop}: expected a height and a width of 1 or more")
        if weights and not run.recipe.keep_probability:
            raise ValueError(f"weights: {run.path} has kept no probabilities: {KEEP_PROBABILITY}")
        super().__init__(run.manifest_path)
        self.crop, self.transform = crop, transform
        self.layers = {"confidence": CONFIDENCE} if run.recipe.confidence_edges is not None else {}
        self.layers |= {"weight": PROBABILITY} if weights else {}

    def __getitem__(self, index: int) -> Any:
        return self._item(index, *self._fetched(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the items of a batch, which a DataLoader asks for; their bytes are read by threads, side by side."""
        with ThreadPoolExecutor(max(1, min(AHEAD, len(indices)))) as pool:
            stored = pool.map(self._fetched, indices)
            return [self._item(index, *some) for index, some in zip(indices, stored, strict=True)]

    def _fetched(self, index: int) -> tuple[bytes, Mapping[str, FetchedLabel]]:
        sample = self.samples[index]
        maps = {name: fetch_layer(sample, layer) for name, layer in self.layers.items()}
        return fetch_photograph(sample), {"label": fetch_label(sample, self.label_space), **maps}

    def _item(self, index: int, photograph: bytes, maps: Mapping[str, FetchedLabel]) -> Any:
        sample = self.samples[index]
        y, x = self._window(sample)
        picture, _ = picture_of(sample, photograph, rows=y.first + y.length)
        box = (x.first, y.first, x.first + x.length, y.first + y.length)
        image = _padded(np.asarray(picture.crop(box)), y, x, fill=PADDING)
        item: dict[str, Any] = {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))}
        for name, stored in maps.items():
            values = stored.crop((y.first, x.first, y.length, x.length))
            item[name] = torch.from_numpy(_padded(values, y, x, fill=IGNORE if name == "label" else 0))
        item["label"] = item["label"].long()
        if "weight" in item:
            item["weight"] = item["weight"].float() / CERTAIN
        item["sample_id"] = sample.sample_id
        return item if self.transform is None else self.transform(item)

    def _window(self, sample: Sample) -> tuple[_Place, _Place]:
        if self.crop is None:
            return _Place(0, sample.height, 0, sample.height), _Place(0, sample.width, 0, sample.width)
        # Torch's random numbers: a DataLoader gives each of its processes other ones, and a user's seed decides them.
        rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        places = []
        for side, crop in zip((sample.height, sample.width), self.crop, strict=True):
            first, length, at, _ = window_along(side, crop, 1.0, None, rng)
            places.append(_Place(first, length, at, crop))
        return places[0], places[1]


def _padded(values: NDArray[np.uint8], y: _Place, x: _Place, *, fill: int | Sequence[int]) -> NDArray[np.uint8]:
    """The pixels of a window as they lie in the crop, and `fill` around them; a new array."""
    out = np.empty((y.side, x.side, *values.shape[2:]), np.uint8)
    if (y.side, x.side) != (y.length, x.length):
        out[:] = fill
    out[y.at : y.at + y.length, x.at : x.at + x.length] = values
    return out
