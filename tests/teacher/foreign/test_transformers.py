"""Models of transformers: their scores are those of transformers' own post-processing, and bad folders are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_transformers import ARCHITECTURES, network_and_processor, picture, post_processed, save, transformers
from torch import Tensor

from autolabel.manifests.teachers import BadTeacher, TeacherPlace
from autolabel.teacher.foreign.transformers import TransformersModel, _fixed_size, classes, load
from autolabel.teacher.networks.fields import Field, InMemory, resized

CPU = torch.device("cpu")
QUICK = ("segformer", "mask2former", "eomt")  # a network with logits, one with queries, one with windows
SIZES = ((65, 129), (130, 75), (40, 50), (13, 201))  # above, below and across all of the processors' sizes


def field(model: TransformersModel, images: Tensor) -> Field:
    scores = model.predict(images)
    if isinstance(scores, Field):
        assert scores.size == images.shape[-2:]
        return scores
    return resized(InMemory(scores), (images.shape[-2], images.shape[-1]))


@pytest.mark.parametrize(
    "architecture",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in ARCHITECTURES],
)
@torch.inference_mode()
def test_scores_and_labels_are_those_of_transformers_own_post_processing(architecture: str, tmp_path: Path) -> None:
    network, processor = network_and_processor(architecture)
    model = load(TeacherPlace.of(save(tmp_path, architecture)), device=CPU)
    assert model.classes == tuple(f"class {number}" for number in range(5))
    seen = set()
    for size in SIZES:
        images = torch.stack([picture(seed, *size) for seed in (3, 4)])
        together = field(model, images)
        for number, image in enumerate(images):
            labels, scores = post_processed(architecture, network, processor, image)
            own = together.whole()[number]
            assert (own - scores).abs().max() <= 1e-5
            first, second = scores.topk(2, dim=0).values
            assert torch.equal(own.argmax(dim=0)[first - second > 1e-5], labels[first - second > 1e-5])
            alone = field(model, image[None])
            assert torch.equal(own, alone.whole()[0])
            bands = [alone.rows(top, min(top + 7, size[0])) for top in range(0, size[0], 7)]
            assert (torch.cat(bands, dim=2)[0] - own).abs().max() <= 1e-5 * max(1, float(scores.abs().max()))
            seen |= set(labels.unique().tolist())
    assert len(seen) > 1


def test_the_processor_says_to_which_size_it_brings_images_of_any_scale() -> None:
    sizes = {"segformer": (64, 96), "mobilenet_v2": (64, 64), "eomt": (64, 64), "maskformer": (64, 160)}
    for architecture, size in sizes.items():
        _, _, name, settings = ARCHITECTURES[architecture]
        assert _fixed_size(getattr(transformers, name)(**settings)) == size
        assert _fixed_size(getattr(transformers, name)(**settings, do_resize=False)) is None


@torch.inference_mode()
def test_a_centre_crop_is_left_out_so_that_every_pixel_has_its_own_score(copy: Path) -> None:
    images = picture(3, 40, 90)[None]
    whole = load(TeacherPlace.of(copy), device=CPU).predict(images)
    change(copy, "preprocessor_config.json", do_center_crop=True, crop_size={"height": 32, "width": 32})
    assert torch.equal(load(TeacherPlace.of(copy), device=CPU).predict(images), whole)


@pytest.mark.parametrize("architecture", ["dpt", "eomt"])
@torch.inference_mode()
def test_scores_of_padding_are_cut_away(architecture: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "dpt": {"size": {"height": 36, "width": 64}, "do_pad": True, "size_divisor": 64},
        "eomt": {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_split_image": False},
    }[architecture]
    network, processor = network_and_processor(architecture, **settings)
    model = load(TeacherPlace.of(save(tmp_path, architecture, **settings)), device=CPU)
    image = picture(3, 72, 128)
    shown = processor(images=[image], return_tensors="pt", input_data_format="channels_first")
    assert shown["pixel_values"].shape[-2:] == (64, 64)
    # Half a size of the image: 36 rows of the network's 64 show it, in the middle for DPT and at the top for EoMT.
    top = {"dpt": 14, "eomt": 0}[architecture]
    outputs = network(pixel_values=shown["pixel_values"])
    if architecture == "dpt":
        padded = F.interpolate(outputs.logits, (64, 64), mode="bilinear")
    else:
        shares = outputs.class_queries_logits.softmax(-1)[..., :-1]
        masks = F.interpolate(outputs.masks_queries_logits, (64, 64), mode="bilinear").sigmoid()
        padded = torch.einsum("bqc,bqhw->bchw", shares, masks)
    expected = F.interpolate(padded[:, :, top : top + 36], (72, 128), mode="bilinear")
    assert (field(model, image[None]).whole() - expected).abs().max() <= 1e-5


def test_loading_and_predicting_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = TeacherPlace.of(save(tmp_path, "mask2former"))
    capfd.readouterr()
    load(place, device=CPU).predict(picture(3, 20, 30)[None])
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("segformer"), "segformer")


@pytest.fixture
def copy(segformer: Path, tmp_path: Path) -> Path:
    return shutil.copytree(segformer, tmp_path / "net")


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_tensors(folder: Path, **tensors: Tensor | None) -> None:
    path = folder / "model.safetensors"
    content = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path, {"format": "pt"})


def names(count: int) -> dict[str, Any]:
    given = {str(number): f"class {number}" for number in range(count)}
    return {"id2label": given, "label2id": {name: int(number) for number, name in given.items()}}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json: expected a folder that save_pretrained"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"id2'), "config.json is no JSON, or cut off"),
    "classification": (
        lambda f: change(f, architectures=["SegformerForImageClassification"]),
        "SegformerForImageClassification is a classification model: expected one …ForSemanticSegmentation, or one of",
    ),
    "detection": (lambda f: change(f, architectures=["DetrForObjectDetection"]), "is a detection model"),
    "instances": (lambda f: change(f, architectures=["RfDetrForInstanceSegmentation"]), "is a model of instances"),
    "videos": (lambda f: change(f, architectures=["VideomtForUniversalSegmentation"]), "is a model of videos"),
    "language": (lambda f: change(f, architectures=["BertModel"]), "BertModel is no model for semantic segmentation"),
    "no architecture": (lambda f: change(f, architectures=None), "'architectures' in config.json is None"),
    "unknown": (
        lambda f: change(f, architectures=["NovelForSemanticSegmentation"]), "has no NovelForSemanticSegmentation"
    ),
    "seven names": (
        lambda f: change(f, **names(7)),
        r"classifier\.\w+ has shape \(5,.*\), and config.json, with 7 classes in 'id2label', makes it \(7,",
    ),
    "a gap": (lambda f: change(f, id2label={"0": "a", "2": "b"}), "has 2 names, but none for 1"),
    "names twice": (
        lambda f: change(f, id2label={"0": "car", "1": "road", "2": "car"}),
        "calls 0 and 2 'car': give every class a name of its own",
    ),
    "names in disorder": (
        lambda f: change(f, label2id={f"class {4 - number}": number for number in range(5)}),
        "'id2label' and 'label2id' in config.json name different classes",
    ),
    "names of numbers": (lambda f: change(f, id2label={"0": 3}), "is no table of names"),
    "four channels": (lambda f: change(f, num_channels=4), "takes 4 channels: expected 3"),
    "code": (
        lambda f: change(f, auto_map={"AutoModel": "net.Net"}), "'auto_map' in config.json asks for code .* never run"
    ),
    "code of a processor": (
        lambda f: change(f, "preprocessor_config.json", auto_map={"AutoImageProcessor": "p.P"}),
        "'auto_map' in preprocessor_config.json asks for code",
    ),
    "kernels": (lambda f: change(f, attn_implementation="someone/kernels"), "asks for code from the hub"),
    "quantised": (lambda f: change(f, quantization_config={"load_in_8bit": True}), "quantised"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json: nobody"),
    "bad processor": (
        lambda f: change(f, "preprocessor_config.json", image_processor_type="NovelImageProcessor"),
        "preprocessor_config.json cannot be used: ",
    ),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin, a pickle, which can run code: if you trust it, convert it with python -c \"from"
        " transformers import SegformerForSemanticSegmentation as N; N.from_pretrained",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "tensors cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]),
        "cannot be loaded by transformers: ",
    ),
    "a tensor missing": (
        lambda f: change_tensors(f, decode_head__classifier__bias=None, decode_head__classifier__weight=None),
        "lack tensor decode_head.classifier.bias and 1 more",
    ),
    "a tensor of another shape": (
        lambda f: change_tensors(f, decode_head__linear_fuse__weight=torch.zeros(1, 2)),
        r"tensor decode_head.linear_fuse.weight has shape \(1, 2\)",
    ),
    "nan": (
        lambda f: change_tensors(f, decode_head__classifier__bias=torch.full((5,), float("nan"))),
        "tensor decode_head.classifier.bias has values that are NaN or infinite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_cannot_label_images_is_refused_in_one_line(
    case: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BAD[case]
    spoil(copy)
    with pytest.raises(BadTeacher, match=message) as error:
        load(TeacherPlace.of(copy), device=CPU)
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_names_has_as_many_numbered_classes_as_it_says(copy: Path) -> None:
    change(copy, id2label=None, label2id=None, num_labels=5)
    place = TeacherPlace.of(copy)
    assert classes(place) == load(place, device=CPU).classes == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")


@pytest.mark.thorough
@torch.inference_mode()
def test_a_missing_tensor_that_nothing_reads_is_no_obstacle(tmp_path: Path) -> None:
    # The first step of DPT's fusion has nothing to add to: published files lack the layer that would prepare it.
    place = TeacherPlace.of(save(tmp_path, "dpt"))
    before = load(place, device=CPU).predict(picture(3, 50, 70)[None])
    unread = "neck.fusion_stage.layers.0.residual_layer1.convolution1"
    change_tensors(tmp_path, **{f"{unread}.weight": None, f"{unread}.bias": None})
    assert torch.equal(load(place, device=CPU).predict(picture(3, 50, 70)[None]), before)


@pytest.mark.thorough
def test_the_line_that_a_refused_pickle_names_makes_it_a_teacher(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadTeacher) as error:
        load(TeacherPlace.of(copy), device=CPU)
    (line,) = re.findall(r'python -c "(.*)"$', str(error.value))
    exec(line)
    assert load(TeacherPlace.of(copy), device=CPU).classes[0] == "class 0"
