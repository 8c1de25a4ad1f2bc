"""Usage: ARRAYS EDITED TASKS OUT. Write edited labels by label-studio-sdk as an export of annotated tasks."""

import json
import sys
from pathlib import Path

import numpy as np
from label_studio_sdk.converter.brush import mask2rle
from label_studio_sdk.label_interface import LabelInterface

_, edited, folder, out = sys.argv[1:]
labels = np.load(edited)
interface = LabelInterface((Path(folder) / "interface.xml").read_text(encoding="utf-8"))
names = list(interface.get_control("label").labels)
exported = []
for path in sorted((Path(folder) / "tasks").glob("*.json")):
    for task in json.loads(path.read_text(encoding="utf-8")):
        label = labels[task["data"]["sample_id"].replace("/", "|")]
        result = [
            {
                "original_width": label.shape[1],
                "original_height": label.shape[0],
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "rle": mask2rle((255 * (label == value)).astype(np.uint8)),
                    "brushlabels": [names[value]],
                },
                "id": f"{len(exported)}-{value}",
                "from_name": "label",
                "to_name": "image",
                "type": "brushlabels",
                "origin": "manual",
            }
            for value in np.unique(label[label != 255]).tolist()
        ]
        annotation = {"id": 1, "completed_by": 1, "result": result, "was_cancelled": False, "ground_truth": False}
        exported.append({"id": len(exported) + 1, "annotations": [annotation], "drafts": [], **task})
Path(out).write_text(json.dumps(exported), encoding="utf-8")
