"""Batches of crops for a training: threads read ahead what loading processes decode.

Between the bytes and their crop lies all the computing, so one loading process keeps one core busy, wherever the bytes
come from: a disk answers in microseconds, a bucket in 20 to 100 ms. Every crop takes two answers, of its photograph and
its label, one after the other. benchmarks/loader.py measures how many crops have to be under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, default_collate, get_worker_info

from autolabel.manifests.ahead import ahead
from autolabel.manifests.locations import BucketPath
from autolabel.student.data import TrainingCrops

AHEAD = 16  # crops whose bytes a loading process reads or holds


class Batches(IterableDataset[dict[str, Any]]):
    """The crops of lists of draws, one batch for each list. Loading processes take the lists in turn.

    The bytes of the next `depth` crops of a process are read by as many threads, or wait in memory.
    """

    def __init__(self, crops: TrainingCrops, draws: Iterable[list[int]], *, depth: int = AHEAD) -> None:
        self.crops, self.draws, self.depth = crops, draws, depth

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        pool = ThreadPoolExecutor(self.depth, "read ahead")  # here: a process that is forked takes no threads along
        try:
            draws = (self.crops.draws[n] for batch in self._share(first, step) for n in batch)
            fetched = ahead(pool, self.crops.fetch, draws, self.depth)
            for batch in self._share(first, step):
                yield default_collate([self.crops.crop(n, next(fetched)) for n in batch])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _share(self, first: int, step: int) -> Iterator[list[int]]:
        return islice(self.draws, first, None, step)


def batches_of(
    crops: TrainingCrops, draws: Iterable[int], *, size: int, loaders: int = 0, depth: int = AHEAD, pin: bool = False
) -> DataLoader[dict[str, Any]]:
    """Load batches of `size` crops in the order of `draws`, by so many loading processes; 0 for this process.

    The order does not depend on `loaders` and `depth`. pin: give batches in page-locked memory. Loading processes are
    forked where that is usual, but not for data in buckets, whose connections a forked process cannot use.
    """
    lists = BatchSampler(draws, size, drop_last=False)
    far = any(
        isinstance(place, BucketPath) for sample in crops.dataset.samples for place in (sample.image, sample.label)
    )
    return DataLoader(
        Batches(crops, lists, depth=depth),
        batch_size=None,
        num_workers=loaders,
        pin_memory=pin,
        multiprocessing_context="spawn" if loaders and far else None,
    )
