"""Usage: ARRAYS FOLDER. Decode every mask of stuff.json by pycocotools, and every panoptic PNG as panopticapi does."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

arrays, folder = sys.argv[1], Path(sys.argv[2])
saved, boxes = {}, []
with contextlib.redirect_stdout(io.StringIO()):
    stuff = COCO(str(folder / "stuff.json"))
for image in stuff.loadImgs(stuff.getImgIds()):
    label = np.full((image["height"], image["width"]), 255, np.uint8)
    for annotation in stuff.loadAnns(stuff.getAnnIds(imgIds=image["id"])):
        mask = stuff.annToMask(annotation) == 1
        assert (label[mask] == 255).all() and mask.sum() == annotation["area"]
        label[mask] = annotation["category_id"] - 1
        ys, xs = np.nonzero(mask)
        size = [xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        boxes.append(annotation["bbox"] == [xs.min(), ys.min(), *size])
    saved[f"stuff:{image['file_name']}"] = label
panoptic = json.loads((folder / "panoptic.json").read_text(encoding="utf-8"))
names = {image["id"]: image["file_name"] for image in panoptic["images"]}
for annotation in panoptic["annotations"]:
    channels = np.array(Image.open(folder / "panoptic" / annotation["file_name"]).convert("RGB")).astype(np.int64)
    ids = channels[..., 0] + 256 * channels[..., 1] + 256 * 256 * channels[..., 2]
    label = np.full(ids.shape, 255, np.uint8)
    for segment in annotation["segments_info"]:
        assert (ids == segment["id"]).sum() == segment["area"]
        label[ids == segment["id"]] = segment["category_id"] - 1
    assert ((ids == 0) == (label == 255)).all()
    saved[f"panoptic:{names[annotation['image_id']]}"] = label
np.savez(arrays, **saved)
names = [category["name"] for category in stuff.loadCats(sorted(stuff.getCatIds()))]
print(json.dumps({"names": names, "boxes": all(boxes)}))
