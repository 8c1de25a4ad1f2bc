"""Usage: ARRAYS FOLDER. Open the folder with load_dataset, whole and streaming; save every picture, print the rest."""

import json
import sys

import numpy as np
from datasets import load_dataset

arrays, folder = sys.argv[1:]
pictures, rows, streamed = {}, {}, {}
for split, samples in load_dataset(folder).items():
    for row in samples:
        rows[row["sample_id"]] = {"split": split, **{k: row[k] for k in ("group", "source", "mean_confidence")}}
        for column in ("image", "label", "confidence"):
            if row[column] is not None:
                pictures[f"{column}:{row['sample_id']}"] = np.asarray(row[column])
for samples in load_dataset(folder, streaming=True).values():
    for row in samples:
        streamed[row["sample_id"]] = bool((np.asarray(row["label"]) == pictures[f"label:{row['sample_id']}"]).all())
np.savez(arrays, **pictures)
print(json.dumps({"rows": rows, "streamed": streamed}))
