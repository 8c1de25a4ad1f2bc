"""Usage: ARRAYS FOLDER. Decode every brush region of the tasks by label-studio-sdk, and check its interface."""

import json
import sys
from pathlib import Path

import numpy as np
from label_studio_sdk.converter.brush import decode_rle, encode_rle
from label_studio_sdk.label_interface import LabelInterface

arrays, folder = sys.argv[1], Path(sys.argv[2])
interface = LabelInterface((folder / "interface.xml").read_text(encoding="utf-8"))
labels = list(interface.get_control("label").labels)
saved, again, valid = {}, [], []
for path in sorted((folder / "tasks").glob("*.json")):
    for task in json.loads(path.read_text(encoding="utf-8")):
        label = np.full((task["data"]["height"], task["data"]["width"]), 255, np.uint8)
        for prediction in task["predictions"]:
            valid.append(bool(interface.validate_prediction(prediction)))
            for region in prediction["result"]:
                value = region["value"]
                painted = decode_rle(value["rle"]).reshape(*label.shape, 4)
                assert (painted == painted[..., :1]).all() and set(np.unique(painted)) <= {0, 255}
                (name,) = value["brushlabels"]
                label[painted[..., 3] == 255] = labels.index(name)
                theirs = encode_rle(painted.ravel().astype(int))
                again.append(bool((decode_rle(theirs) == painted.ravel()).all()))
        saved[task["data"]["sample_id"].replace("/", "|")] = label
np.savez(arrays, **saved)
print(json.dumps({"labels": labels, "valid": valid, "again": all(again)}))
