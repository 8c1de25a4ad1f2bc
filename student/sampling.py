"""Which sample the n-th crop of a training shows, and the class it is aimed at.

Class-uniform sampling after Zhu et al., "Improving Semantic Segmentation via Video Propagation and Label Relaxation"
(arXiv 1812.01593, section 3.3), and arXiv 2005.10821, section 4: one half of an epoch shows samples as they come, the
other half a class drawn evenly from all, then one of the tiles in which it lies. Every number of draws is fixed for an
epoch and only their order is random, so shares are met exactly, not on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.centroids import Centroids, find_centroids
from autolabel.manifests.samples import Sample

Places = NDArray[np.intp]
Weights = NDArray[np.float64]
_FITTINGS = 100
_REMEMBERED = 4  # epochs: loading processes ask for neighbouring crops


class Centroid(NamedTuple):
    """The centre of mass of a class in one tile, in pixels of the image."""

    class_id: int
    y: float
    x: float


class Draw(NamedTuple):
    """One draw: the sample's place in the list, and the centroid to crop around, if any."""

    sample: int
    around: Centroid | None


class Draws(Sequence[Draw]):
    """Draw n of `length`, for a seed. It depends on what is given here and n alone.

    An epoch is as many draws as there are samples (in the part on fine samples alone: fine samples). In it every
    source gets its share of the draws, by its samples' weights or as `mix.auto_share` asks: round(auto_share * epoch)
    are automatic. Of all draws, and of every source's, a share of class_uniform is aimed at a class: every class as
    often as the next, as nearly as the sources' shares allow, and each from the sources that have most of it. What the
    teacher never finds is then drawn from the fine labels. The other draws show samples by weight. Raises ValueError
    where that cannot be met.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        space: LabelSpace,
        mix: Mix,
        seed: int,
        length: int,
        on_label: Callable[[int, int], None] | None = None,
    ) -> None:
        weights = np.array([s.weight for s in samples], np.float64)
        if not (weights >= 0).all() or weights.sum() == 0:
            raise ValueError("sample weights must not be negative, and one at least must be above 0")
        _require_sources(samples, weights, mix)
        allowed = _class_ids(mix.auto_classes, space)
        self.mix, self.seed, self.length = mix, seed, length
        self.rows = find_centroids(samples, space, on_label) if mix.class_uniform else None
        sources = np.array([s.source for s in samples])
        found = {
            str(name): _Source(str(name), weights, sources == name, self.rows, allowed if name == "auto" else None)
            for name in np.unique(sources[weights > 0])  # in the order of the alphabet: "auto" comes first
        }
        if self.rows is not None and allowed is not None:
            missing = sorted(allowed - found["auto"].tiles.keys())
            if missing:
                raise ValueError(f"auto-classes: no automatic label has a pixel of {space.names[missing[0]]!r}")
        self.tail = round(mix.fine_only_last * length)
        self._parts = (
            _Part(list(found.values()), len(samples), mix),
            _Part([found["fine"]], int((sources == "fine").sum()), Mix(mix.class_uniform)) if self.tail else None,
        )
        self._epochs: dict[tuple[int, int], tuple[Places, Places]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> Draw:  # type: ignore[override]  # no slices
        if not 0 <= n < self.length:
            raise IndexError(f"draw {n} of {self.length}")
        number = int(n >= self.length - self.tail)
        part = self._parts[number]
        assert part is not None
        epoch, place = divmod(n - number * (self.length - self.tail), part.size)
        drawn, rows = self._epoch(number, part, epoch)
        row = int(rows[place])
        if row < 0 or self.rows is None:
            return Draw(int(drawn[place]), None)
        around = Centroid(int(self.rows.class_id[row]), float(self.rows.y[row]), float(self.rows.x[row]))
        return Draw(int(self.rows.sample[row]), around)

    def _epoch(self, number: int, part: _Part, epoch: int) -> tuple[Places, Places]:
        if (number, epoch) not in self._epochs:
            if len(self._epochs) >= _REMEMBERED:
                del self._epochs[next(iter(self._epochs))]
            rng = np.random.default_rng((self.seed, number, epoch, part.size))
            self._epochs[number, epoch] = part.order(rng)
        return self._epochs[number, epoch]


class _Source:
    """The samples of one source, and the tiles (rows of centroids) of each of its classes."""

    def __init__(
        self, name: str, weights: Weights, mine: NDArray[np.bool_], rows: Centroids | None, allowed: set[int] | None
    ) -> None:
        self.name, self.weights = name, weights
        self.samples = np.flatnonzero(mine & (weights > 0))
        self.tiles: dict[int, Places] = {}
        if rows is not None:
            here = np.flatnonzero((mine & (weights > 0))[rows.sample])
            self.row_weights = weights[rows.sample]
            for c in np.unique(rows.class_id[here]).tolist():
                if allowed is None or c in allowed:
                    self.tiles[c] = here[rows.class_id[here] == c]

    def plain(self, count: int, rng: np.random.Generator) -> Places:
        """Samples by weight."""
        return self.samples[_systematic(self.weights[self.samples], count, rng)]

    def aimed(self, count: int, shares: Weights, rng: np.random.Generator) -> Places:
        """Rows of centroids: every class by its share (C,), its tiles by the weights of their samples."""
        if not count:
            return np.empty(0, np.intp)
        classes = np.flatnonzero(shares)
        each = np.bincount(classes[_systematic(shares[classes], count, rng)], minlength=len(shares))
        return np.concatenate(
            [rows[_systematic(self.row_weights[rows], int(each[c]), rng)] for c, rows in self.tiles.items()]
        )


class _Part:
    """A part of the training: the sources it shows, the length of its epochs, and each source's share of them."""

    def __init__(self, sources: Sequence[_Source], size: int, mix: Mix) -> None:
        self.sources, self.size, self.mix = sources, size, mix
        sums = np.array([s.weights[s.samples].sum() for s in sources])
        if mix.auto_share is not None:
            is_auto = np.array([s.name == "auto" for s in sources])
            for group, share in ((is_auto, mix.auto_share), (~is_auto, 1 - mix.auto_share)):
                sums[group] *= share / sums[group].sum() if group.any() else 0
        for source, due in zip(sources, sums.tolist(), strict=True):
            if due and mix.class_uniform and not source.tiles:
                raise ValueError(
                    f"no {source.name} label has a pixel of any class: there is nothing to learn from them"
                )
        self.aims = _class_shares(sources, sums)
        self.ends = np.cumsum(sums) / sums.sum() * size  # of each source's draws, in an epoch that is not shuffled yet
        if mix.auto_share is not None:
            self.ends[0] = mix.auto_share * size  # to the last bit; "auto" comes first

    def order(self, rng: np.random.Generator) -> tuple[Places, Places]:
        """Of every draw of an epoch (size,): the sample, and the row of its centroid or -1."""
        # By weight, a share that is no whole number is rounded up in some epochs and down in others.
        ends = np.floor(self.ends + rng.random()) if self.mix.auto_share is None else np.rint(self.ends)
        ends[-1] = self.size
        aims = np.rint(self.mix.class_uniform * ends)
        samples, rows = [], []
        counts, aimed_counts = (np.diff(edges, prepend=0).astype(int) for edges in (ends, aims))
        for source, shares, count, aimed in zip(self.sources, self.aims, counts, aimed_counts, strict=True):
            aimed_at = source.aimed(aimed, shares, rng)
            shown = source.plain(count - aimed, rng)
            samples.append(np.concatenate([np.full(aimed, -1), shown]))
            rows.append(np.concatenate([aimed_at, np.full(len(shown), -1)]))
        shuffle = rng.permutation(self.size)
        return np.concatenate(samples)[shuffle], np.concatenate(rows)[shuffle]


def _class_shares(sources: Sequence[_Source], due: Weights) -> Weights:
    """(S, C): of the aimed draws of a source, the share of each class; (S,) `due` is how much each source draws.

    Every class is due the same of all draws together. From the weights of the tiles, rows and columns are scaled in
    turn until both sums fit (iterative proportional fitting, Deming and Stephan 1940). Where no shares fit, because a
    class lies in a source that draws little, the sources' draws hold.
    """
    shares = np.zeros((len(sources), 1 + max((c for s in sources for c in s.tiles), default=0)))
    for place, source in enumerate(sources):
        for c, rows in source.tiles.items():
            shares[place, c] = source.row_weights[rows].sum() if due[place] else 0
    rows_due = due / due.sum()
    present = shares.any(axis=0)
    for _ in range(_FITTINGS):
        shares[:, present] /= shares[:, present].sum(axis=0) * present.sum()
        sums = shares.sum(axis=1)
        shares *= np.divide(rows_due, sums, out=np.zeros_like(sums), where=sums > 0)[:, None]
    return shares


def _systematic(weights: Weights, count: int, rng: np.random.Generator) -> Places:
    """`count` places drawn by weight (all above 0): each as often as it is due, rounded up or down."""
    order = rng.permutation(len(weights))
    edges = np.cumsum(weights[order])
    picks = (np.arange(count) + rng.random()) * (edges[-1] / max(count, 1))
    places: Places = order[np.minimum(np.searchsorted(edges, picks, side="right"), len(order) - 1)]
    return places


def _class_ids(names: Sequence[str] | None, space: LabelSpace) -> set[int] | None:
    if names is None:
        return None
    for name in names:
        if name not in space.names:
            raise ValueError(f"auto-classes: {name!r} is not in label space {space.name!r}: {', '.join(space.names)}")
    return {space.names.index(name) for name in names}


def _require_sources(samples: Sequence[Sample], weights: Weights, mix: Mix) -> None:
    present = {s.source for s, weight in zip(samples, weights.tolist(), strict=True) if weight > 0}
    asked = {"auto-share": mix.auto_share, "auto-classes": mix.auto_classes}
    for option in (name for name, value in asked.items() if value is not None):
        if "auto" not in present:
            raise ValueError(f"{option}: the manifest has no automatic labels (with a weight above 0)")
    if mix.auto_share is not None and mix.auto_share < 1 and present == {"auto"}:
        raise ValueError(f"auto-share {mix.auto_share:g}: the manifest has only automatic labels to draw from")
    if mix.fine_only_last and "fine" not in present:
        raise ValueError(
            f"fine-only-last {mix.fine_only_last:g}: the manifest has no fine labels (with a weight above 0)"
        )
