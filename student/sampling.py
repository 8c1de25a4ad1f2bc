"""The sample that each crop of a training shows, and the class at which it is aimed.

Class-uniform sampling as in Zhu et al., "Improving Semantic Segmentation via Video Propagation and Label Relaxation"
(arXiv 1812.01593, section 3.3), and arXiv 2005.10821, section 4: half of an epoch draws samples by weight; the other
half draws a class, all classes alike, and then one of the tiles in which that class lies. The numbers of draws are
fixed for an epoch and only their order is random, so shares are met exactly in every epoch, not on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.centroids import Centroids, find_centroids
from autolabel.manifests.samples import Sample
from autolabel.manifests.schemas import EXACT
from autolabel.manifests.wording import Progress
from autolabel.student.job import Mix

Places = NDArray[np.intp]
Weights = NDArray[np.float64]
_FITTINGS = 100  # rounds in which class shares are fitted to rows and columns
_CACHED_EPOCHS = 4  # loading processes read neighbouring crops, which lie in few epochs


class Centroid(NamedTuple):
    """The centre of mass of a class in one tile, in pixels of the image."""

    class_id: int
    y: float
    x: float


class Draw(NamedTuple):
    """One draw: the index of the sample, and the centroid to crop around, or None for a crop anywhere."""

    sample: int
    around: Centroid | None


class Draws(Sequence[Draw]):
    """The draws of a training of `length` crops. Draw n depends on the arguments and n alone.

    Corrected labels count as fine ones here: only their weights tell them apart.

    An epoch has as many draws as there are samples; in the last part, on fine samples alone, as many as there are fine
    samples. In an epoch every source gets a share of the draws, by the weights of its samples or as `mix.auto_share`
    says: then round(auto_share * epoch) draws are automatic. Of all draws, and of the draws of every source, the share
    class_uniform is aimed at a class; with `mix.auto_aimed` all automatic draws are aimed, and as many fewer of the
    others. Every class gets the same number of aimed draws, as far as the shares of the sources allow; each class is
    drawn mostly from the source that has most of it. So a class that the teacher never predicts is drawn from fine
    labels. The other draws show samples by weight.

    `progress` is called while labels are read to find their classes. Raises ValueError for shares that cannot be met.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        space: LabelSpace,
        *,
        seed: int,
        length: int,
        mix: Mix | None = None,
        progress: Progress | None = None,
    ) -> None:
        mix = mix or Mix()
        weights = np.array([s.weight for s in samples], np.float64)
        if not (weights >= 0).all() or weights.sum() == 0:
            raise ValueError("sample weights must not be negative, and one at least must be above 0")
        _require_sources(samples, weights, mix)
        allowed = _class_ids(mix.auto_classes, space)
        self.mix, self.seed, self.length = mix, seed, length
        self.rows = find_centroids(samples, space, progress=progress) if mix.class_uniform else None
        source_of = np.array(["fine" if s.source in EXACT else s.source for s in samples])
        sources = {
            str(name): _Source(
                str(name),
                weights,
                member=source_of == name,
                rows=self.rows,
                allowed=allowed if name == "auto" else None,
            )
            for name in np.unique(source_of[weights > 0])  # in alphabetical order: "auto" comes first
        }
        if self.rows is not None and allowed is not None:
            missing = sorted(allowed - sources["auto"].tiles.keys())
            if missing:
                raise ValueError(f"auto-classes: no automatic label has a pixel of {space.names[missing[0]]!r}")
        self.tail = round(mix.fine_only_last * length)
        self._parts = (
            _Part(list(sources.values()), len(samples), mix=mix),
            _Part([sources["fine"]], int((source_of == "fine").sum()), mix=Mix(mix.class_uniform))
            if self.tail
            else None,
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
            if len(self._epochs) >= _CACHED_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            rng = np.random.default_rng((self.seed, number, epoch, part.size))
            self._epochs[number, epoch] = part.order(rng)
        return self._epochs[number, epoch]


class _Source:
    """The samples of one source, and the tiles (rows of centroids) of each of its classes.

    `member` (samples,) bool marks the samples of this source; `allowed` are the only class ids to aim at, None for all.
    """

    def __init__(
        self,
        name: str,
        weights: Weights,
        *,
        member: NDArray[np.bool_],
        rows: Centroids | None,
        allowed: set[int] | None,
    ) -> None:
        self.name, self.weights = name, weights
        drawable = member & (weights > 0)
        self.samples = np.flatnonzero(drawable)
        self.tiles: dict[int, Places] = {}
        if rows is not None:
            own = np.flatnonzero(drawable[rows.sample])
            self.row_weights = weights[rows.sample]
            for c in np.unique(rows.class_id[own]).tolist():
                if allowed is None or c in allowed:
                    self.tiles[c] = own[rows.class_id[own] == c]

    def plain(self, count: int, rng: np.random.Generator) -> Places:
        """Draw `count` samples by weight."""
        return self.samples[_systematic(self.weights[self.samples], count, rng)]

    def aimed(self, count: int, shares: Weights, *, rng: np.random.Generator) -> Places:
        """Draw `count` rows of centroids: classes by their shares (C,), tiles by the weights of their samples."""
        if not count:
            return np.empty(0, np.intp)
        classes = np.flatnonzero(shares)
        each = np.bincount(classes[_systematic(shares[classes], count, rng)], minlength=len(shares))
        return np.concatenate(
            [rows[_systematic(self.row_weights[rows], int(each[c]), rng)] for c, rows in self.tiles.items()]
        )


class _Part:
    """A part of the training: the sources it shows, the size of its epochs, and each source's share of an epoch."""

    def __init__(self, sources: Sequence[_Source], size: int, *, mix: Mix) -> None:
        self.sources, self.size, self.mix = sources, size, mix
        sums = np.array([s.weights[s.samples].sum() for s in sources])
        if mix.auto_share is not None:
            is_auto = np.array([s.name == "auto" for s in sources])
            for group, share in ((is_auto, mix.auto_share), (~is_auto, 1 - mix.auto_share)):
                sums[group] *= share / sums[group].sum() if group.any() else 0
        for source, share in zip(sources, sums.tolist(), strict=True):
            if share and mix.class_uniform and not source.tiles:
                raise ValueError(
                    f"no {source.name} label has a pixel of any class: there is nothing to learn from them"
                )
        # Before an epoch is shuffled, the draws of its sources follow each other; these are their ends.
        self.ends = np.cumsum(sums) / sums.sum() * size
        if mix.auto_share is not None:
            self.ends[0] = mix.auto_share * size  # "auto" comes first; this is exact, the cumulative sum is not
        self.aims = _class_shares(sources, np.diff(self._aimed(self.ends), prepend=0) if mix.auto_aimed else sums)

    def _aimed(self, ends: Weights) -> Weights:
        """Return the number of aimed draws among those before each of the sources' ends."""
        if not self.mix.auto_aimed:
            return self.mix.class_uniform * ends
        auto = float(ends[0])
        left, others = max(0.0, self.mix.class_uniform * self.size - auto), max(1.0, self.size - auto)
        return auto + (ends - auto) * (left / others)

    def order(self, rng: np.random.Generator) -> tuple[Places, Places]:
        """Draw an epoch: the sample of every draw (size,), and the row of its centroid (size,), -1 for none."""
        # A share by weight that is no whole number of draws is rounded up in some epochs and down in others.
        ends = np.floor(self.ends + rng.random()) if self.mix.auto_share is None else np.rint(self.ends)
        ends[-1] = self.size
        aims = np.rint(self._aimed(ends))
        samples, rows = [], []
        counts, aimed_counts = (np.diff(edges, prepend=0).astype(int) for edges in (ends, aims))
        for source, shares, count, aimed in zip(self.sources, self.aims, counts, aimed_counts, strict=True):
            aimed_rows = source.aimed(aimed, shares, rng=rng)
            plain_samples = source.plain(count - aimed, rng)
            samples.append(np.concatenate([np.full(aimed, -1), plain_samples]))
            rows.append(np.concatenate([aimed_rows, np.full(len(plain_samples), -1)]))
        shuffle = rng.permutation(self.size)
        return np.concatenate(samples)[shuffle], np.concatenate(rows)[shuffle]


def _class_shares(sources: Sequence[_Source], quotas: Weights) -> Weights:
    """Return the share of each class in the aimed draws of each source, (S, C); `quotas` (S,) are the sources' draws.

    All sources together should aim equally often at every class. Starting from the weights of the tiles, rows and
    columns are scaled in turn until both sums fit (iterative proportional fitting, Deming and Stephan 1940). If no
    shares fit, because a class lies only in a source with few draws, the quotas of the sources win.
    """
    shares = np.zeros((len(sources), 1 + max((c for s in sources for c in s.tiles), default=0)))
    for place, source in enumerate(sources):
        for c, rows in source.tiles.items():
            shares[place, c] = source.row_weights[rows].sum() if quotas[place] else 0
    row_sums = quotas / quotas.sum()
    present = shares.any(axis=0)
    for _ in range(_FITTINGS):
        shares[:, present] /= shares[:, present].sum(axis=0) * present.sum()
        sums = shares.sum(axis=1)
        shares *= np.divide(row_sums, sums, out=np.zeros_like(sums), where=sums > 0)[:, None]
    return shares


def _systematic(weights: Weights, count: int, rng: np.random.Generator) -> Places:
    """Draw `count` places by weight (all above 0); each comes count * weight / sum times, rounded up or down."""
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
    sources = {s.source for s, weight in zip(samples, weights.tolist(), strict=True) if weight > 0}
    for option, value in (("auto-share", mix.auto_share), ("auto-classes", mix.auto_classes)):
        if value is not None and "auto" not in sources:
            raise ValueError(f"{option}: the manifest has no automatic labels (with a weight above 0)")
    if mix.auto_share is not None and mix.auto_share < 1 and sources == {"auto"}:
        raise ValueError(f"auto-share {mix.auto_share:g}: the manifest has only automatic labels to draw from")
    if mix.fine_only_last and sources.isdisjoint(EXACT):
        raise ValueError(
            f"fine-only-last {mix.fine_only_last:g}: the manifest has no fine labels (with a weight above 0)"
        )
