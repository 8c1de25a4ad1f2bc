"""Files with random damage. If this fails, an import ends in a traceback, or says nothing that helps."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sending import random_labels, returned, send

from autolabel.manifests.formats.exchange import BadReturn

STRANGE = [None, True, 0, -1, 1 << 31, (1 << 64) - 1, 1.5, 1e300, "", "../x", [], {}, [[]], [{}], [1, 2], "0" * 50]
FILES = [
    ("coco", "stuff.json", "stuff.json"),
    ("coco", "panoptic.json", "panoptic.json"),
    ("coco", "panoptic/drive 6/img_0.v1.png", "panoptic.json"),
    ("cvat", "masks.zip", "masks.zip"),
    ("cvat", "labelmap.txt", ""),
    ("cvat", "SegmentationClass/drive 6/img_0.v1.png", ""),
    ("label-studio", "tasks/000000.json", ""),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document with each of its first keys."""
    for key in list(value) if isinstance(value, dict) else range(min(6, len(value))) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def other_json(data: bytes, dice: random.Random) -> bytes:
    document = json.loads(data)
    container, key = dice.choice(list(places(document)))
    if dice.random() < 0.7:
        container[key] = copy.deepcopy(dice.choice(STRANGE))
    else:
        del container[key]
    return json.dumps(document).encode()


def other_bytes(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 3])):
        place = dice.randrange(len(changed))
        changed[place : place + dice.choice([0, 1, 1, 20])] = dice.randbytes(dice.choice([0, 1, 1, 4]))
    return bytes(changed)


@pytest.mark.thorough
@pytest.mark.parametrize(("to", "file", "read"), FILES, ids=lambda text: text)
def test_a_damaged_file_is_read_or_refused_in_one_line(to: str, file: str, read: str, tmp_path: Path) -> None:
    send(to, dict(list(random_labels(sizes=((6, 9),)).items())[:3]), tmp_path / "out")
    path, dice = tmp_path / "out" / file, random.Random(1)
    whole, refused = path.read_bytes(), 0
    for _ in range(120):
        damage = other_json if file.endswith(".json") and dice.random() < 0.7 else other_bytes
        path.write_bytes(damage(whole, dice))
        try:
            returned(to, tmp_path / "out" / read)
        except BadReturn as error:
            assert "\n" not in str(error) and str(tmp_path / "out") in str(error)
            refused += 1
    assert refused > 30
