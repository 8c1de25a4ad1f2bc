"""Work that threads do ahead of whoever takes its results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def ahead(pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Iterable[_T], depth: int) -> Iterator[_R]:
    """Yield `work(item)` of every item, in order, at most `depth` of them under way or waiting to be taken."""
    waiting: deque[Future[_R]] = deque()
    for item in items:
        if len(waiting) == depth:
            yield waiting.popleft().result()
        waiting.append(pool.submit(work, item))
    while waiting:
        yield waiting.popleft().result()
