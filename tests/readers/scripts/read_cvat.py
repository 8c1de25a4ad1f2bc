"""Usage: ARRAYS ZIP. Unpack what CVAT would import and read it by datumaro, as CVAT does."""

import json
import logging
import sys
import tempfile
import zipfile

import numpy as np
from datumaro.components.annotation import AnnotationType
from datumaro.components.dataset import Dataset

logging.disable(logging.CRITICAL)
arrays, archive = sys.argv[1:]
saved, objects = {}, {}
with tempfile.TemporaryDirectory() as folder:
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(folder)
    found = Dataset.import_from(folder, "voc_segmentation")
    names = [label.name for label in found.categories()[AnnotationType.label]]
    for item in found:
        masks = [(annotation.image, names[annotation.label]) for annotation in item.annotations]
        saved[item.id] = np.array([np.asarray(mask) for mask, _ in masks], bool)
        objects[item.id] = [name for _, name in masks]
np.savez(arrays, **{name.replace("/", "|"): masks for name, masks in saved.items()})
print(json.dumps({"names": names, "objects": objects}))
