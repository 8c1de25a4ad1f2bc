"""Models of transformers: read as data, fed by their own processors, scored as their own post-processing does.

A folder of `save_pretrained` is a teacher if it has config.json, preprocessor_config.json and tensors in safetensors.
No code of a folder is ever run. Two kinds of networks are known: those that give logits for pixels, and those whose
queries each give a mask and a class (teacher/foreign/queries.py).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.teachers import BadTeacher, TeacherPlace
from autolabel.manifests.wording import reason
from autolabel.teacher.foreign.queries import Box, placed, query_scores, window_scores
from autolabel.teacher.model import Gives
from autolabel.teacher.networks.fields import Field, InMemory, Size
from autolabel.teacher.optional import require_package
from autolabel.teacher.strangers import stranger

_PIXELS = "ForSemanticSegmentation"  # the end of the names of all networks with logits for pixels
_QUERIES = (
    "MaskFormerForInstanceSegmentation", "Mask2FormerForUniversalSegmentation", "OneFormerForUniversalSegmentation",
    "EomtForUniversalSegmentation", "EomtDinov3ForUniversalSegmentation", "DetrForSegmentation",
)  # fmt: skip
_OTHERS = {
    "ForImageClassification": "a classification model",
    "ForObjectDetection": "a detection model",
    "ForDepthEstimation": "a model of depth",
    "ForInstanceSegmentation": "a model of instances, without classes for all pixels",
    "VideomtForUniversalSegmentation": "a model of videos",
}
_OUTPUTS = ("logits", "class_queries_logits", "pred_masks", "masks_queries_logits")  # classes, then masks
_PROCESSOR, _PROCESSOR_WITH_WORDS = "preprocessor_config.json", "processor_config.json"
_TASK = "the task is semantic"  # what OneFormer is told
_MASK2FORMER_SIZE = (384, 384)  # to which the post-processing of Mask2Former resizes all masks


def classes(place: TeacherPlace) -> tuple[str, ...]:
    """Return the names in config.json, by channel; torch reads nothing. Raises BadTeacher."""
    config = _config(place)
    names = config.get("id2label")
    if names is None:
        return tuple(f"LABEL_{number}" for number in range(int(config.get("num_labels") or 2)))
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BadTeacher(f"{place}: 'id2label' in config.json is no table of names: expected one name for each class")
    ordered = [names.get(str(number)) for number in range(len(names))]
    if None in ordered:
        missing = ordered.index(None)
        raise BadTeacher(f"{place}: 'id2label' in config.json has {len(names)} names, but none for {missing}")
    twice = next((name for name in ordered if ordered.count(name) > 1), None)
    if twice is not None:
        numbers = " and ".join(str(number) for number, name in enumerate(ordered) if name == twice)
        raise BadTeacher(
            f"{place}: 'id2label' in config.json calls {numbers} {twice!r}: give every class a name of its own"
        )
    inverse = config.get("label2id")
    if inverse and {str(number): name for name, number in dict(inverse).items()} != names:
        raise BadTeacher(f"{place}: 'id2label' and 'label2id' in config.json name different classes: correct one")
    return tuple(str(name) for name in ordered)


def load(place: TeacherPlace, *, device: torch.device) -> TransformersModel:
    """Load a network and its processor. Raises BadTeacher."""
    names, config = classes(place), _config(place)
    _require_safetensors(place)
    library = _library(place)
    with _quiet(library):
        processor = _processor(place, library, config)
        network, missing = _network(place, library, config)
        more = _task(place, library, network.config) if "OneFormer" in _architecture(place, config) else {}
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name in missing:
                tensor.fill_(float("nan"))
            elif tensor.is_floating_point() and not tensor.isfinite().all():
                raise BadTeacher(f"{place}: tensor {name} has values that are NaN or infinite: expected finite ones")
    model = TransformersModel(names, network.to(device).eval(), processor, more=more)
    if missing:
        _require_unread(place, model, missing, device)
    return model


class TransformersModel:
    """A network of transformers with its processor.

    Images are resized, rescaled and normalised by the processor; a centre crop is left out, because pixels beyond it
    would have no label, and scores of padding are cut away.
    """

    trained_on: Tensor | None = None

    def __init__(self, names: tuple[str, ...], network: Any, processor: Any, *, more: dict[str, Tensor]) -> None:
        self.classes, self.network, self.processor = names, network, processor
        self.architecture = type(network).__name__
        self.gives: Gives = "probabilities" if self.architecture in _QUERIES else "logits"
        self.fixed_size = _fixed_size(processor)
        self._more = {name: tensor.to(network.device) for name, tensor in more.items()}
        self._boxes: dict[Size, Box] = {}

    def predict(self, images: Tensor) -> Tensor | Field:
        """Return the scores of images (B, 3, H, W) uint8: logits at the network's resolution, or a field of (H, W)."""
        size = images.shape[-2], images.shape[-1]
        inputs = self._processed(images)
        offsets = inputs.pop("patch_offsets", None)
        seen = inputs["pixel_values"].shape[-2], inputs["pixel_values"].shape[-1]
        if offsets:
            starts = [int(start) for image, start, _ in offsets if image == 0]
            classes, masks = self._outputs(inputs, together=len(starts))
            return self._joined(classes, masks, starts, size)
        outputs = self._outputs(inputs)
        box = self._content(size, seen)
        if self.gives == "logits":
            logits = outputs[0].float()
            return logits if box == Box(0, 0, *seen) else placed(InMemory(logits), seen, box, size)
        masks_at = {"Mask2Former": _MASK2FORMER_SIZE, "Eomt": seen}
        at = next((masks_at[name] for name in masks_at if self.architecture.startswith(name)), None)
        scores = query_scores(*outputs, size=at)
        return placed(scores, seen, box, size, antialias=self.architecture.startswith("OneFormer"))

    def _outputs(self, inputs: dict[str, Tensor], together: int = 1) -> tuple[Tensor, ...]:
        """Return the logits, or the classes and masks of all queries.

        A CPU computes images one by one, `together` inputs each: its kernels for several images round otherwise.
        """
        many = len(inputs["pixel_values"])
        step = together if inputs["pixel_values"].device.type == "cpu" else many
        rows = []
        for first in range(0, many, step):
            part = {name: tensor[first : first + step] for name, tensor in inputs.items()}
            words = {name: tensor.expand(step, *tensor.shape[1:]) for name, tensor in self._more.items()}
            outputs = self.network(**part, **words)
            rows.append(tuple(outputs[name] for name in _OUTPUTS if outputs.get(name) is not None))
        return tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*rows, strict=True))

    def _processed(self, images: Tensor, **settings: Any) -> dict[str, Any]:
        processed = self.processor(
            images=list(images), return_tensors="pt", input_data_format="channels_first", device=images.device,
            **settings,
        )  # fmt: skip
        return {
            name: value for name, value in processed.items() if name in ("pixel_values", "pixel_mask", "patch_offsets")
        }

    def _content(self, size: Size, seen: Size) -> Box:
        """Find the image in what the network is shown: the processor may pad it with black."""
        if size not in self._boxes:
            white = torch.full((1, 3, *size), 255, dtype=torch.uint8)
            shown = self._processed(white, do_rescale=False, do_normalize=False)["pixel_values"][0].amax(dim=0) > 0
            rows, columns = shown.any(dim=1).nonzero(), shown.any(dim=0).nonzero()
            box = Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
            self._boxes[size] = box if tuple(shown.shape) == seen else Box(0, 0, *seen)
        return self._boxes[size]

    def _joined(self, classes: Tensor, masks: Tensor, offsets: list[int], size: Size) -> Field:
        """Join the windows of EoMT, which lie along the longer side."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        side = self.processor.size
        resized = get_size_with_aspect_ratio(size, side["shortest_edge"], side["longest_edge"])
        window = side["shortest_edge"], side["longest_edge"] or side["shortest_edge"]
        scores = window_scores(classes, masks, offsets, window=window, size=resized, down=size[0] > size[1])
        return placed(scores, resized, Box(0, 0, *resized), size)


def _fixed_size(processor: Any) -> Size | None:
    """Return height and width of the network's images, or their shorter and longer side; None if they stay as large."""
    size = processor.size
    if not processor.do_resize or size is None:
        return None
    height, width = size.height or size.max_height or size.shortest_edge, size.width or size.max_width
    return int(height), int(width or size.longest_edge or height)


# --- what is in a folder ----------------------------------------------------------------------------------------------


def _config(place: TeacherPlace) -> dict[str, Any]:
    """Read config.json and refuse what cannot label images, or would run code. Raises BadTeacher."""
    config = _document(place, "config.json")
    if config is None:
        other = stranger(place.folder())
        if other:
            raise BadTeacher(f"{place} is {other}")
        raise BadTeacher(f"{place} has no config.json: expected a folder that save_pretrained of transformers wrote")
    for name in ("config.json", _PROCESSOR, _PROCESSOR_WITH_WORDS):
        if "auto_map" in ((_document(place, name) or {}) if name != "config.json" else config):
            raise BadTeacher(
                f"{place}: 'auto_map' in {name} asks for code of the model's author (trust_remote_code), which is"
                " never run: use an architecture of transformers itself, or my_teacher.py:Teacher"
            )
    _architecture(place, config)
    if "quantization_config" in config:
        raise BadTeacher(f"{place}: its tensors are quantised: expected floating point, as save_pretrained writes it")
    for part in (config, config.get("backbone_config") or {}):
        if part.get("num_channels", 3) != 3:
            raise BadTeacher(f"{place}: its network takes {part['num_channels']} channels: expected 3, for RGB images")
        if "/" in str(part.get("attn_implementation", "")):
            raise BadTeacher(f"{place}: 'attn_implementation' in config.json asks for code from the hub: remove it")
    return config


def _document(place: TeacherPlace, name: str) -> dict[str, Any] | None:
    path = place.folder() / name
    try:
        return dict(read_json(path, dict[str, Any])) if storage.exists(path) else None
    except BadDocument as error:
        raise BadTeacher(str(error)) from error


def _architecture(place: TeacherPlace, config: dict[str, Any]) -> str:
    """Return the name of the network's class. Raises BadTeacher for networks that do not label pixels."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise BadTeacher(f"{place}: 'architectures' in config.json is {names!r}: expected the name of one network")
    name = str(names[0])
    if name in _QUERIES or name.endswith(_PIXELS):
        return name
    kind = next((kind for end, kind in _OTHERS.items() if name.endswith(end)), "no model for semantic segmentation")
    raise BadTeacher(f"{place}: {name} is {kind}: expected one …{_PIXELS}, or one of {', '.join(_QUERIES)}")


def _require_safetensors(place: TeacherPlace) -> None:
    folder = place.folder()
    names = {path.name for path in storage.list(folder)}
    if "adapter_config.json" in names:
        raise BadTeacher(f"{place} holds an adapter: merge it (merge_and_unload of peft) and save the whole network")
    if {"model.safetensors", "model.safetensors.index.json"} & names:
        return
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if not pickles:
        raise BadTeacher(f"{place} has no model.safetensors: expected the tensors of the network")
    line = (
        f"from transformers import {_architecture(place, _config(place))} as N;"
        f" N.from_pretrained('{folder}').save_pretrained('{folder}')"
    )
    raise BadTeacher(
        f"{place} has its tensors in {pickles[0]}, a pickle, which can run code: if you trust it, convert it with"
        f' python -c "{line}"'
    )


# --- loading ----------------------------------------------------------------------------------------------------------


def _library(place: TeacherPlace) -> Any:
    try:
        require_package("torchvision", "hf")  # which the processors need
        return require_package("transformers", "hf")
    except ModuleNotFoundError as error:
        raise BadTeacher(f"{place}: {error}") from error


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Keep transformers from writing to the terminal: what matters of its warnings is an error here."""
    log = library.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.set_verbosity(log.CRITICAL)
        log.disable_progress_bar()
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _processor(place: TeacherPlace, library: Any, config: dict[str, Any]) -> Any:
    settings = _document(place, _PROCESSOR)
    if settings is None:
        settings = (_document(place, _PROCESSOR_WITH_WORDS) or {}).get("image_processor")
    if not isinstance(settings, dict):
        raise BadTeacher(
            f"{place} has no {_PROCESSOR}: nobody knows how its network wants images;"
            f" save it with AutoImageProcessor.from_pretrained(…).save_pretrained('{place.folder()}')"
        )
    # OneFormer would fetch a table of classes from the hub, which only training needs.
    without_table = {"class_info_file": None} if "OneFormer" in _architecture(place, config) else {}
    try:
        processor = library.AutoImageProcessor.from_pretrained(
            place.folder(), local_files_only=True, backend="torchvision", **without_table
        )
    except Exception as error:  # whatever is wrong in the file
        raise BadTeacher(f"{place}: its {_PROCESSOR} cannot be used: {reason(error)}") from error
    if getattr(processor, "do_center_crop", False):
        processor.do_center_crop = False
    return processor


def _network(place: TeacherPlace, library: Any, config: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the network and the names of tensors that its file lacks."""
    name = _architecture(place, config)
    kind = getattr(library, name, None)
    if kind is None:
        raise BadTeacher(f"{place}: transformers {library.__version__} has no {name}: install a newer version")
    try:
        network, report = kind.from_pretrained(
            place.folder(), local_files_only=True, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # a damaged file, a package that it needs: anything
        raise BadTeacher(f"{place} cannot be loaded by transformers: {reason(error)}") from error
    for tensor, there, wanted in sorted(report["mismatched_keys"]):
        raise BadTeacher(
            f"{place}: tensor {tensor} has shape {tuple(there)}, and config.json, with {network.config.num_labels}"
            f" classes in 'id2label', makes it {tuple(wanted)}: take the config.json that belongs to these tensors"
        )
    # What only training needs is left out; Mask2Former cannot do without.
    network.config.use_auxiliary_loss = name.startswith("Mask2Former")
    if getattr(network, "auxiliary_head", None) is not None:
        network.auxiliary_head = None
    own = network.state_dict()
    return network, sorted(name for name in report["missing_keys"] if name in own)


def _task(place: TeacherPlace, library: Any, config: Any) -> dict[str, Tensor]:
    """Return the words of OneFormer's task as its own processor encodes them, (1, length) int64."""
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(place.folder(), local_files_only=True)
        words = tokenizer([_TASK], padding="max_length", max_length=config.task_seq_len, truncation=True)
    except Exception as error:
        raise BadTeacher(f"{place}: its tokenizer cannot be used: {reason(error)}") from error
    return {"task_inputs": torch.tensor(words["input_ids"]) * torch.tensor(words["attention_mask"])}


def _require_unread(place: TeacherPlace, model: TransformersModel, missing: list[str], device: torch.device) -> None:
    """Refuse missing tensors that reach the scores: they are NaN now. Published files lack some that nobody reads."""
    with torch.inference_mode():
        scores = model.predict(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8, device=device))
        scores = scores.whole() if isinstance(scores, Field) else scores
        if not scores.isfinite().all():
            many = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BadTeacher(f"{place}: its safetensors lack tensor {missing[0]}{many}: expected those of config.json")
        for name, tensor in model.network.state_dict().items():
            if name in missing:
                tensor.zero_()
