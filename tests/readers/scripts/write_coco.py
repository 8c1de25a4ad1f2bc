"""Usage: ARRAYS EDITED STUFF OUT. Write edited labels by pycocotools as annotations of the images of stuff.json."""

import json
import sys
from pathlib import Path, PurePosixPath

import numpy as np
from pycocotools import mask as masks

_, edited, stuff, out = sys.argv[1:]
labels = np.load(edited)
document = json.loads(Path(stuff).read_text(encoding="utf-8"))
document["annotations"] = []
for image in document["images"]:
    label = labels[str(PurePosixPath(image["file_name"]).with_suffix("")).replace("/", "|")]
    for value in np.unique(label[label != 255]).tolist():
        mask = masks.encode(np.asfortranarray(label == value, np.uint8))
        document["annotations"].append(
            {
                "id": len(document["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": value + 1,
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
                "area": int(masks.area(mask)),
                "bbox": masks.toBbox(mask).tolist(),
                "iscrowd": 0,
            }
        )
Path(out).write_text(json.dumps(document), encoding="utf-8")
