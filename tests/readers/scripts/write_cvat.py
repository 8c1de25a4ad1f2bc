"""Usage: ARRAYS EDITED ZIP OUT. Export edited labels by datumaro as CVAT exports "Segmentation mask 1.1".

EDITED holds a label for every item of the ZIP that CVAT has imported.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from datumaro.components.annotation import AnnotationType, Mask
from datumaro.components.dataset import Dataset

_, edited, archive, out = sys.argv[1:]
labels = np.load(edited)
with tempfile.TemporaryDirectory() as folder:
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(folder)
    found = Dataset.import_from(folder, "voc_segmentation")
    categories = found.categories()
    names = [label.name for label in categories[AnnotationType.label]]
    colours = categories[AnnotationType.mask].colormap
    items = [
        item.wrap(
            annotations=[
                Mask(image=label == value, label=int(value) + 1)  # the background comes first
                for label in [labels[item.id.replace("/", "|")]]
                for value in np.unique(label)
                if value != 255
            ]
        )
        for item in found
    ]
    label_map = {name: [tuple(map(int, colours[place])), [], []] for place, name in enumerate(names)}
    made = Dataset.from_iterable(items, categories=categories)
    made.export(str(Path(folder) / "made"), "voc_segmentation", apply_colormap=True, label_map=label_map)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted((Path(folder) / "made").rglob("*")):
            if path.is_file():
                zipped.write(path, path.relative_to(Path(folder) / "made"))
