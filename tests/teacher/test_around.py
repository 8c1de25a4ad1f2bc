"""Scales, mirrored images, windows, class maps and ensembles, each against a plain computation on whole maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.label_space import CITYSCAPES, IGNORE, LabelSpace
from autolabel.manifests.teachers import BadTeacher, TeacherName
from autolabel.teacher.around import Ensemble, ForeignNetwork, MappedNetwork
from autolabel.teacher.decide import tempered, top_classes, top_probability
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.memory import Budget
from autolabel.teacher.model import Gives, Model
from autolabel.teacher.networks.fields import Combined, Field, InMemory
from autolabel.teacher.predict import Teacher

CPU = torch.device("cpu")
HEIGHT, WIDTH = 24, 40


class Toy(Model):
    """Logits of three classes at a quarter of the resolution: a fixed mix of the colours of each 4 x 4 block."""

    classes = ("road", "sky", "car")

    def __init__(self, gives: Gives = "logits", output: Callable[[Tensor], Tensor | Field] | None = None) -> None:
        self.gives = gives
        self.seen: list[tuple[int, ...]] = []
        self._output = output or scores

    def predict(self, images: Tensor) -> Tensor | Field:
        assert images.dtype == torch.uint8 and images.is_contiguous()
        self.seen.append(tuple(images.shape))
        return self._output(images)


def scores(images: Tensor) -> Tensor:
    mix = torch.tensor([[3.0, -2.0, 0.5], [-1.0, 2.5, 1.0], [0.3, 0.4, -2.0]])
    small = F.avg_pool2d(images.float() / 32, 4, ceil_mode=True) - 4  # about 0
    return torch.einsum("kc,bchw->bkhw", mix, small)


def probabilities(images: Tensor) -> Tensor:
    return scores(images).sub(1).sigmoid()


def ids(images: Tensor) -> Tensor:
    return scores(images).argmax(dim=1)


def around(model: Model, window: tuple[int, int] | None = None) -> ForeignNetwork:
    return ForeignNetwork(model, name="toy", window=window)


def resized(tensor: Tensor, size: Sequence[int] = (HEIGHT, WIDTH)) -> Tensor:
    return F.interpolate(tensor, size=tuple(size), mode="bilinear")


def scaled(images: Tensor, height: int, width: int) -> Tensor:
    values = F.interpolate(images.float(), size=(height, width), mode="bilinear", antialias=True)
    return values.round().clamp(0, 255).byte()


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, HEIGHT, WIDTH), np.uint8))


def test_one_view_is_the_logits_of_the_model_at_the_size_of_the_image(images: Tensor) -> None:
    field = around(Toy()).field(images, (1.0,), flip=False)
    torch.testing.assert_close(field.whole(), resized(scores(images)))
    torch.testing.assert_close(field.rows(5, 9), resized(scores(images))[:, :, 5:9])


def test_scales_and_mirrored_images_count_by_the_mean_of_their_probabilities(images: Tensor) -> None:
    toy = Toy()
    found = around(toy).field(images, (0.5, 1.0, 2.0), flip=True).whole()
    views = []
    for height, width in ((12, 20), (24, 40), (48, 80)):
        one = scaled(images, height, width)
        for mirrored in (False, True):
            own = resized(resized(scores(one.flip(-1) if mirrored else one), (height, width)))
            views.append((own.flip(-1) if mirrored else own).softmax(dim=1))
    torch.testing.assert_close(found, torch.stack(views).mean(dim=0), rtol=1e-5, atol=1e-6)
    assert [shape[2:] for shape in toy.seen] == [(12, 20)] * 2 + [(24, 40)] * 2 + [(48, 80)] * 2


def test_what_probabilities_lack_to_one_belongs_to_no_class(images: Tensor) -> None:
    field = around(Toy("probabilities", probabilities)).field(images, (1.0,), flip=False)
    own = resized(probabilities(images))
    torch.testing.assert_close(field.whole(), own)
    total = own.sum(dim=1)
    assert 0 < (total > 1).sum() < total.numel(), "both kinds of pixels occur"
    winner, confidence = top_probability(field.whole())
    assert torch.equal(winner.long(), own.argmax(dim=1)), "the label is that of the scores themselves"
    sure = own.amax(dim=1) / total.clamp(min=1)
    torch.testing.assert_close(confidence, sure.where(own.amax(dim=1) >= 1 - total, 0))
    assert 0 < (confidence == 0).sum() < confidence.numel()


def test_temperature_counts_for_probabilities_as_it_does_for_logits(images: Tensor) -> None:
    logits = resized(scores(images))
    found = tempered(logits.softmax(dim=1), 1.7)
    torch.testing.assert_close(found, (logits / 1.7).softmax(dim=1), rtol=1e-4, atol=1e-5)
    known = resized(probabilities(images)) / 4  # "no class" has a share everywhere
    whole = torch.cat([known, 1 - known.sum(dim=1, keepdim=True)], dim=1).pow(1 / 1.7)
    expected = known.pow(1 / 1.7) / whole.sum(dim=1, keepdim=True)
    torch.testing.assert_close(tempered(known, 1.7), expected, rtol=1e-4, atol=1e-5)


def test_class_ids_are_sure_and_a_number_that_is_no_class_is_never_a_label(images: Tensor) -> None:
    def strange(images: Tensor) -> Tensor:
        found = ids(images).int()
        found[:, 0, 0], found[:, 0, 1] = 255, -1
        return found

    field = around(Toy("ids", strange)).field(images, (1.0,), flip=False)
    winner, confidence, *_ = top_classes(field, 2, classes=3, device=CPU)
    expected = strange(images).repeat_interleave(4, -2).repeat_interleave(4, -1)
    known = (expected >= 0) & (expected < 3)
    assert torch.equal(winner[known].int(), expected[known])
    assert torch.equal(confidence, known.float())


@pytest.mark.parametrize("gives", ["logits", "probabilities"])
def test_windows_overlap_by_a_quarter_at_least_and_their_probabilities_are_averaged(
    images: Tensor, gives: Gives
) -> None:
    raw = scores if gives == "logits" else probabilities
    toy = Toy(gives, raw)
    field = around(toy, (16, 16)).field(images, (1.0,), flip=False)
    total, seen = torch.zeros(2, 3, HEIGHT, WIDTH), torch.zeros(HEIGHT, WIDTH)
    for top in (0, 8):
        for left in (0, 12, 24):
            own = resized(raw(images[..., top : top + 16, left : left + 16]), (16, 16))
            own = own.softmax(dim=1) if gives == "logits" else own / own.sum(dim=1, keepdim=True).clamp(min=1)
            total[..., top : top + 16, left : left + 16] += own
            seen[top : top + 16, left : left + 16] += 1
    assert toy.seen == [(2, 3, 16, 16)] * 6
    torch.testing.assert_close(field.whole(), total / seen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(field.rows(7, 11), field.whole()[:, :, 7:11])


def test_an_image_within_the_window_is_looked_at_as_a_whole(images: Tensor) -> None:
    toy = Toy()
    around(toy, (32, 64)).field(images, (1.0,), flip=False)
    assert toy.seen == [(2, 3, HEIGHT, WIDTH)]


def test_a_class_map_sums_probabilities_before_the_largest_is_taken(images: Tensor) -> None:
    mapped = MappedNetwork(around(Toy()), (1, 0, 1), classes=2, device=CPU)
    own = resized(scores(images)).softmax(dim=1)
    expected = torch.stack([own[:, 1], own[:, 0] + own[:, 2]], dim=1)
    found = mapped.field(images, (1.0,), flip=False).whole()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    winner, confidence = top_probability(found)
    assert torch.equal(winner.long(), expected.argmax(dim=1))
    torch.testing.assert_close(confidence, expected.amax(dim=1), rtol=1e-5, atol=1e-6)
    assert not torch.equal(winner.long(), torch.tensor([1, 0, 1])[own.argmax(dim=1)]), "mapping labels is not the same"


def test_ignored_classes_take_their_probability_along_and_where_they_win_nothing_is_labelled(images: Tensor) -> None:
    mapped = MappedNetwork(around(Toy()), (0, IGNORE, 1), classes=2, device=CPU)
    own = resized(scores(images)).softmax(dim=1)
    confidence = top_classes(mapped.field(images, (1.0,), flip=False), 2, classes=2, device=CPU).confidences
    lost = own[:, 1] > torch.maximum(own[:, 0], own[:, 2])
    assert 0 < lost.sum() < lost.numel()
    assert torch.equal(confidence == 0, lost)
    torch.testing.assert_close(confidence[~lost], torch.maximum(own[:, 0], own[:, 2])[~lost], rtol=1e-5, atol=1e-6)


def test_several_teachers_count_by_the_mean_of_their_probabilities(images: Tensor) -> None:
    members = around(Toy()), around(Toy("probabilities", probabilities))
    found = Ensemble(members).field(images, (1.0,), flip=False).whole()
    first, second = (one.field(images, (1.0,), flip=False).whole() for one in members)
    expected = (first.softmax(dim=1) + second / second.sum(dim=1, keepdim=True).clamp(min=1)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_field_is_read_in_bands_and_never_as_a_whole(images: Tensor) -> None:
    read: list[tuple[int, int]] = []

    class Rows(Field):
        size = (HEIGHT, WIDTH)

        def rows(self, top: int, bottom: int) -> Tensor:
            read.append((top, bottom))
            return resized(scores(images[:1]))[:, :, top:bottom]

    teacher = Teacher(around(Toy(output=lambda _: Rows())))
    label, _ = teacher.confidence(images[0].permute(1, 2, 0).numpy(), scales=(1.0,))
    assert np.array_equal(label, resized(scores(images[:1])).argmax(dim=1)[0].numpy())
    assert read == [(0, HEIGHT)]


@pytest.mark.parametrize(
    ("gives", "output", "message"),
    [
        ("logits", lambda x: scores(x)[:, :2], "toy gives scores of 2 classes, but names 3: name as many as it has"),
        (
            "logits",
            lambda x: scores(x)[0],
            r"toy returned float32 of shape \(3, 6, 10\): expected \(2, 3, h, w\)",
        ),
        ("logits", ids, r"toy returned int64 of shape \(2, 6, 10\): expected \(2, 3, h, w\) floating point"),
        ("ids", scores, r"toy returned float32 of shape \(2, 3, 6, 10\): expected \(2, h, w\) of integers"),
        ("logits", lambda x: x.numpy(), r"toy returned a ndarray: expected a tensor \(2, 3, h, w\) floating point"),
        (
            "logits",
            lambda x: InMemory(scores(x)),
            r"toy returned a field of size \(6, 10\) for images of size \(24, 4",
        ),
        (
            "logits",
            lambda x: x[9],
            r"toy cannot predict an image: IndexError: index 9 .*test_around.py, line",
        ),
    ],
    ids=["channels", "dimensions", "integers", "floats", "no tensor", "another size", "raises"],
)
def test_output_that_is_not_as_the_model_says_is_refused(
    images: Tensor, gives: Gives, output: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(BadTeacher, match=message):
        around(Toy(gives, output)).field(images, (1.0,), flip=False)


def test_scales_that_show_nothing_more_are_refused_unless_there_are_windows() -> None:
    toy = Toy()
    toy.fixed_size = (512, 1024)
    with pytest.raises(ValueError, match=r"^scales 0.5,1: toy resizes every image to 1024 x 512: another scale would"):
        around(toy).require((0.5, 1.0), flip=False)
    around(toy).require((1.0,), flip=True)
    around(toy, (512, 1024)).require((0.5, 1.0), flip=False)


@pytest.mark.parametrize("how", [{"scales": (0.5, 1.0)}, {"flip": True}, {"window": (32, 32)}], ids=str)
def test_class_ids_cannot_be_averaged(how: dict[str, object]) -> None:
    window = how.pop("window", None)
    with pytest.raises(ValueError, match="toy gives class ids without probabilities, which cannot be averaged"):
        around(Toy("ids", ids), window).require(**{"scales": (1.0,), "flip": False, **how})  # type: ignore[arg-type]


def test_a_model_that_gives_nan_is_found_before_any_image_is_labelled() -> None:
    teacher = Teacher(around(Toy(output=lambda x: scores(x).fill_(float("nan")))))
    with pytest.raises(BadTeacher, match="gives nan for an image of noise: expected numbers, mend its weights"):
        teacher.require_sound((1.0,), flip=False)
    Teacher(around(Toy())).require_sound((1.0,), flip=False)


def test_the_budget_of_two_images_tells_what_any_image_needs_and_what_its_pixels_need() -> None:
    small, large = (Budget("cpu", "float32", used / pixels, 1 << 30) for used, pixels in ((3000, 100), (4500, 400)))
    budget = Budget.of_two(small, large, pixels=(100, 400))
    assert (budget.bytes_per_pixel, budget.fixed_bytes) == (5, 2500)
    assert budget.needs(1, 1000) == 7500
    shrinking = Budget.of_two(small, Budget("cpu", "float32", 1.0, 1 << 30), pixels=(100, 400))
    assert (shrinking.bytes_per_pixel, shrinking.needs(1, 1000)) == (0, 3000)


# --- by name --------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_same_teacher_twice_labels_as_it_does_alone(teacher: Path, street: np.ndarray) -> None:
    alone, twice = load_teacher(teacher, device="cpu"), load_teacher([teacher, teacher], device="cpu")
    label, confidence = alone.confidence(street)
    same, sure = twice.confidence(street)
    assert np.array_equal(label, same)
    np.testing.assert_allclose(confidence, sure, atol=1e-6)
    assert twice.label_space == CITYSCAPES and twice.trained_on is not None
    assert set(twice.trained_on.tolist()) == set(alone.trained_on.tolist())
    assert twice.sha256 == TeacherName.of([teacher, teacher]).digest() != alone.sha256


@pytest.mark.thorough
def test_a_mapped_checkpoint_labels_by_the_sums_of_its_probabilities(teacher: Path, street: np.ndarray) -> None:
    space = LabelSpace.named("three", ("ground", "vehicle", "rest"))
    ground, vehicle = ("road", "sidewalk"), ("car", "truck", "bus")
    rest = tuple(n for n in CITYSCAPES.names if n not in (*ground, *vehicle, "sky"))
    classes = ClassMap({"ground": ground, "vehicle": vehicle, "rest": rest, "ignore": ("sky",)})
    mapped = load_teacher(teacher, device="cpu", class_map=classes, space=space)
    assert mapped.label_space == space
    own = load_teacher(teacher, device="cpu").logits(street).softmax(dim=0).numpy()
    groups = [[CITYSCAPES.names.index(n) for n in names] for names in (ground, vehicle, rest, ("sky",))]
    sums = np.stack([own[group].sum(axis=0) for group in groups])
    label, confidence = mapped.confidence(street)
    assert np.array_equal(label, sums[:3].argmax(axis=0))
    expected = np.where(sums[3] > sums[:3].max(axis=0), 0, sums[:3].max(axis=0))
    np.testing.assert_allclose(confidence, expected, atol=1e-5)


def test_a_class_map_needs_the_classes_that_it_leads_to(teacher: Path) -> None:
    classes = ClassMap({"ground": CITYSCAPES.names}, where="map.toml")
    with pytest.raises(ValueError, match=r"^map.toml: name the label space that it leads to, with --label-space$"):
        load_teacher(teacher, device="cpu", class_map=classes)


def test_windows_are_for_models_of_other_libraries(teacher: Path) -> None:
    message = f"window 64x64: {teacher} is a network of ours, which looks at whole images; leave it out"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_teacher(teacher, device="cpu", window=(64, 64))


def test_probabilities_are_resized_before_they_are_brought_to_one(images: Tensor) -> None:
    field = around(Toy("probabilities", probabilities)).field(images, (0.5, 1.0), flip=False)
    assert isinstance(field, Combined)
    small = resized(resized(probabilities(scaled(images, 12, 20)), (12, 20)))
    both = [values / values.sum(1, keepdim=True).clamp(min=1) for values in (small, resized(probabilities(images)))]
    torch.testing.assert_close(field.whole(), sum(both) / 2, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def street(city: Path) -> np.ndarray:
    from autolabel.manifests.reading import read_photograph
    from autolabel.manifests.samples import load_manifest

    return read_photograph(load_manifest(city / "val.parquet").samples[0])
