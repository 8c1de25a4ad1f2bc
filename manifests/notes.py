"""Notes: what a person should know of a command that goes on, such as a file without a checksum; each is said once.

Rooms tell a note where they learn of it; whoever shows results listens. Nobody has to pass a listener through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[str], None]] = []


def tell(note: str) -> None:
    """Tell a note to whoever listens."""
    for listener in _listeners[-1:]:
        listener(note)


@contextlib.contextmanager
def heard(listener: Callable[[str], None]) -> Iterator[None]:
    """Give every note to this listener, once, while the block runs; also notes of other threads of this process."""
    said: set[str] = set()

    def once(note: str) -> None:
        if note not in said:
            said.add(note)
            listener(note)

    _listeners.append(once)
    try:
        yield
    finally:
        _listeners.remove(once)
