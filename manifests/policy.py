"""How predictions become a label: which scales are looked at, how they are combined, and the threshold to pass.

Kept apart from the network, and light to import, because the command line, the teacher and the run's record all name
these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

SCALES = (0.5, 1.0, 2.0)  # the inference scales of arXiv 2005.10821, section 4
COMBINE = ("network", "average")  # scales are combined as the network has learnt to, or their logits are averaged
THRESHOLD = 0.5  # the article's and the published code's; the paper's text says 0.9


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales ascending. Raises ValueError unless they are distinct, in (0, 4], and 1 is among them."""
    distinct = tuple(sorted({float(s) for s in scales}))
    if 1.0 not in distinct or len(distinct) != len(tuple(scales)) or not all(0 < s <= 4 for s in distinct):
        given = ",".join(f"{s:g}" for s in scales)
        raise ValueError(f"scales {given}: expected distinct numbers in (0, 4] with 1 among them, such as 0.5,1,2")
    return distinct


def check_threshold(threshold: float) -> float:
    """The threshold. Raises ValueError unless it is a probability that a pixel can exceed."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold:g}: expected a probability in [0, 1), such as {THRESHOLD:g}")
    return threshold
