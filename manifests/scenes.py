"""Drawn street scenes in the folder layout of Cityscapes, for `autolabel demo` and the tests.

A scene is a small world in metres (x to the right, y up, z ahead of the camera) seen through a pinhole. Its things
yield patches, which are painted from far to near at three times the size into two pictures at once: one has the
colours, the other has for every pixel the label id of the thing that owns it. That is the fine label; the `rough` one
of manifests/hands.py draws the coarse label out of it.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from autolabel.manifests import storage
from autolabel.manifests.hands import Labels, coarsen
from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.wording import Progress

Point = tuple[float, float, float]
Patch = tuple[int, str, float, list[Point]]  # label (0: it owns no pixel), colour, share of light, corners
EGO, ROAD, SIDEWALK, BUILDING, POLE, LIGHT, SIGN = 1, 7, 8, 11, 17, 19, 20  # label ids of Cityscapes
VEGETATION, TERRAIN, SKY, PERSON, CAR = 21, 22, 23, 24, 26
_BANDS = (TERRAIN, SIDEWALK, TERRAIN, ROAD, TERRAIN, SIDEWALK, TERRAIN)  # bands of the ground, from left to right
_CITIES = {"train": "lindenfurt mohnau silberbach", "val": "federburg glockenau", "train_extra": "apfeldorf nebelheim"}
_SCALE = 3  # supersampling; odd, so that the middle sample is the centre of the pixel
_FAR = 115.0  # distance of the end of the street, metres
# Colours of zenith and horizon, metres of sight, darkness of shadows, amount of clouds, share of lit windows.
_WEATHERS = (
    ("548ad0", "c8d8e6", 500, 0.50, 0.2, 0.0),
    ("708cbc", "fad2a4", 300, 0.55, 0.3, 0.1),
    ("bec5ca", "d6d8d8", 130, 0.00, 0.3, 0.1),
    ("3e4876", "be968e", 300, 0.00, 0.2, 0.4),
    ("8c949e", "b8bcc2", 250, 0.00, 0.7, 0.1),
)
_FACADES = "c4b296 d6c8ac ac604a 965242 929290 babab6 787c82 ceaa78 acbcba ded8ce cc9884 827062".split()
_ROOFS, _SKINS = "783e32 603a32 4e5056 3e3c3e 8a543c".split(), "e0b89e be8e70 845c46 5a3e30".split()
_LEAVES, _PANES = "42602c 547034 34542e 687432 a07a2c 4a6442".split(), "3a4450 546270 2c3036 687a8a".split()
_POSTS = "0f7a70 14887a 0b6660 1a7f86".split()  # the city paints its posts teal, and nothing else
_METALS, _STONES = "626466 828484 3c3e3e 303e36 a0a09c 706052 544a42".split(), "807c74 928e88 a29c92 a8988a".split()
_PAINTS = "1c1c20 cdcdd0 96989c 606268 9e181c 1c3470 325446 be963c 708498 e8e8e4 5c3e32 3c6ea0 c45c40 6e5468".split()
_RED, _YELLOW, _GREEN, _BLUE, _WHITE, _BLACK = "c8281e e4b228 46dc78 244ca0 e2e0da 1c1c1e".split()
# Shapes of a car's cabin: start and end at the belt, then at the roof (shares of the length); heights of belt and roof.
_CABINS = ((0.12, 0.8, 0.3, 0.6, 0.92, 1.42), (0.0, 0.78, 0.1, 0.55, 0.95, 1.48), (0.0, 0.93, 0.05, 0.74, 1.1, 1.9))
_CIRCLE = [(math.sin(math.pi * i / 6), math.cos(math.pi * i / 6)) for i in range(12)]  # starts at the top


@dataclass(frozen=True)
class Scene:
    """A picture (H, W, 3) uint8 RGB with its fine and its coarse label, (H, W) uint8 label ids of Cityscapes.

    The coarse label is 0 (unlabeled) outside the polygons; one of them is the ego vehicle's, which is no class.
    """

    image: NDArray[np.uint8]
    fine: Labels
    coarse: Labels


class _World:
    """Chance, camera, weather and street of a scene. Sizes in the picture are in samples, _SCALE to a pixel."""

    def __init__(self, seed: int, height: int, width: int) -> None:
        self.dice, self.noise = random.Random(seed), np.random.default_rng(seed)
        uniform, choice = self.dice.uniform, self.dice.choice
        self.height, self.width, self.focal = height, width, height * uniform(1.5, 1.8)
        self.u0, self.v0, self.eye = width * uniform(0.36, 0.64), height * uniform(0.4, 0.52), uniform(1.5, 2.1)
        self.bend = choice((0.0, uniform(-0.002, 0.002)))  # at distance z the street has left the z axis by bend * z²
        zenith, horizon, self.sight, self.shadows, self.clouds, self.lit = choice(_WEATHERS)
        self.zenith, self.horizon = (np.array(list(bytes.fromhex(c)), np.float32) for c in (zenith, horizon))
        self.lanes, self.sun, parking = (-uniform(4.4, 5.2), uniform(1.9, 2.4)), choice((-1, 1)), choice((0.0, 2.1))
        lawn, self.pavement, self.zebra = choice((0.0, 0.0, 1.2)), uniform(2.2, 4.5), uniform(8, 60)
        left, right = self.kerbs = (self.lanes[0] - parking, self.lanes[1] + parking)
        left_front, right_front = self.fronts = (left - lawn - self.pavement, right + lawn + self.pavement)
        self.edges = (left_front, left - lawn, left, right, right + lawn, right_front)  # edges between _BANDS

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Project a point of the world into the picture."""
        return self.u0 + (x / z + self.bend * z) * self.focal, self.v0 + (self.eye - y) / z * self.focal


def draw_scene(seed: int, *, height: int = 160, width: int = 320) -> Scene:
    """Draw a street scene; the same arguments always give the same scene."""
    world = _World(seed, height * _SCALE, width * _SCALE)
    picture, owned = _sky_and_ground(world)
    ink, mark = ImageDraw.Draw(picture), ImageDraw.Draw(owned)
    for _, thing in sorted(_things(world), key=lambda pair: -pair[0]):
        for label, colour, light, points in thing:
            corners, clear = [world.at(*point) for point in points], math.exp(-points[0][2] / world.sight)
            hazy = zip(bytes.fromhex(colour), world.horizon.tolist(), strict=True)
            ink.polygon(corners, tuple(int(own * light * clear + haze * (1 - clear)) for own, haze in hazy))
            if label:
                mark.polygon(corners, label)
    fine = np.asarray(owned)[_SCALE // 2 :: _SCALE, _SCALE // 2 :: _SCALE].copy()
    coarse = coarsen(np.where(fine == EGO, np.uint8(IGNORE), fine), "rough", seed=seed)
    coarse[coarse == IGNORE] = 0
    coarse[fine == EGO] = EGO  # Cityscapes has one polygon of it for a whole drive
    return Scene(_develop(world, picture.reduce(_SCALE), fine), fine, coarse)


def write_city(root: Path, seed: int = 0, *, fine: int = 24, coarse: int = 96, val: int = 24, height: int = 160,
               width: int = 320, truth: Path | None = None, progress: Progress | None = None) -> None:  # fmt: skip
    """Write a small Cityscapes under `root`: `fine` images in split train, `coarse` in train_extra and `val` in val.

    A scene depends on the seed, its split and its number alone: a city with more scenes has the same first ones. Like
    Cityscapes, train_extra has coarse labels only; with `truth`, its fine labels go into that folder, each under the
    relative path of its image.
    """
    jobs = [(split, i) for split, n in (("train", fine), ("train_extra", coarse), ("val", val)) for i in range(n)]
    for done, (split, i) in enumerate(jobs, 1):
        scene_seed, cities = random.Random(f"{seed} {split} {i}").getrandbits(63), _CITIES[split].split()
        scene, city = draw_scene(scene_seed, height=height, width=width), cities[i % len(cities)]
        name = f"{city}/{city}_{i // len(cities):06d}_{scene_seed % 3000 * 10 + 9:06d}"
        files = {
            root / f"leftImg8bit/{split}/{name}_leftImg8bit.png": scene.image,
            root / f"gtCoarse/{split}/{name}_gtCoarse_labelIds.png": scene.coarse,
        }
        if split != "train_extra":
            files[root / f"gtFine/{split}/{name}_gtFine_labelIds.png"] = scene.fine
        elif truth is not None:
            files[truth / f"{name}_leftImg8bit.png"] = scene.fine
        for path, pixels in files.items():
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", compress_level=1)  # a higher level hardly makes noise smaller
            storage.write(path, png.getvalue(), durable=False)
        if progress is not None:
            progress(done, len(jobs))


def _sky_and_ground(world: _World) -> tuple[Image.Image, Image.Image]:
    """The pictures of colours and labels before anything stands on the ground."""
    dice, noise, height, width = world.dice, world.noise, world.height, world.width
    puffs = Image.fromarray(noise.standard_normal((8, 8), np.float32)).resize((width // _SCALE, height // _SCALE))
    fall = np.linspace(0, height / world.v0, height // _SCALE, dtype=np.float32).clip(0, 1)[:, None]
    cover = np.maximum(fall, (np.asarray(puffs) * 0.6 + world.clouds - 0.35).clip(0, 0.8))[..., None]
    sky = Image.fromarray((world.zenith + (world.horizon - world.zenith) * cover).astype(np.uint8))
    picture, owned = sky.resize((width, height)), Image.new("L", (width, height), SKY)
    # Every pixel below the horizon shows one place of the ground: its row gives z, the pixel gives x.
    top = math.ceil(world.v0) + 1
    z = world.focal * world.eye / (np.arange(top, height, dtype=np.float32) - world.v0)[:, None]
    x = (np.arange(width, dtype=np.float32) - world.u0) * (z / world.focal) - world.bend * z * z
    band = sum(((x > edge).astype(np.uint8) for edge in world.edges), np.zeros(x.shape, np.uint8))
    owned.paste(Image.fromarray(np.array(_BANDS, np.uint8)[band]), (0, top))
    band[(z > world.zebra) & (z < world.zebra + 3) & (band == 3) & (x % 1 < 0.5)] = 7
    band[(abs(x - world.lanes[0] - 2.9) < 0.07) & (z % 6 < dice.choice((3, 6)))] = 7
    for lane, kerb in zip(world.lanes, world.kerbs, strict=True):
        band[abs(x - lane) < 0.07] = 7
        band[abs(x - kerb) < 0.13] = 8
    tile = noise.standard_normal((256, 256), np.float32)
    light = 1 + tile[(z * 25).astype(np.intp) % 256, (x * 25).astype(np.intp) % 256] * (0.06 / (1 + z / 12))
    light[((x % 0.8 < 0.05) | (z % 0.8 < 0.06)) & (z < 22) & ((band == 1) | (band == 5))] *= 0.86  # paving slabs
    reach = 4 + 2.5 * tile[0, (z / 11).astype(np.intp) % 256]  # length of the shadow of a house, one every 11 m
    light[x * world.sun > max(front * world.sun for front in world.fronts) - reach] *= 1 - world.shadows
    grass, stone, asphalt = dice.choice(_LEAVES), dice.choice(_STONES), dice.choice(("525257", "5c5c60", "6c6c70"))
    colours = (grass, stone, grass, asphalt, grass, stone, grass, _WHITE, "b2b0aa")  # the bands, paint, kerbs
    ground = np.array([list(bytes.fromhex(c)) for c in colours], np.float32)[band] * light[..., None]
    clear = np.exp(-z / world.sight)[..., None]
    ground = ground * clear + world.horizon * (1 - clear)
    picture.paste(Image.fromarray(ground.clip(0, 255).astype(np.uint8)), (0, top))
    return picture, owned


def _things(world: _World) -> Iterator[tuple[float, Iterable[Patch]]]:
    """Yield the distance of everything that stands on the ground, and its patches."""
    dice = world.dice
    yield 0, [(EGO, _BLACK, 1, _even(0, (3, 0, 1.5), (1.1, world.eye - dice.uniform(0.42, 0.56), 1.5)))]  # the bonnet
    for row in range(-110, 111, 5):  # trees close the street
        yield 2 * _FAR, _tree(dice, row - world.bend * _FAR**2, _FAR, dice.uniform(2, 5))
    for side, kerb, front in zip((-1, 1), world.kerbs, world.fronts, strict=True):
        usual = dice.randint(2, 6)
        for near, far in pairwise(_along(dice, 2, _FAR, 7, 16)):
            house = _house(world, side, near, far, max(1, usual + dice.randint(-1, 1)))
            yield far, house if dice.random() < 0.85 else _tree(dice, front + side * 3, far, dice.uniform(2, 3))
        for z in _along(dice, 6, 60, 5, 16):
            yield z, _pole(world, kerb + side * dice.uniform(0.4, 0.6), z, side)
        for z in _along(dice, 5, dice.choice((0, 90)), 7, 16):
            yield z, _tree(dice, kerb + side, z, dice.uniform(1.2, 2.3))
        for z in _along(dice, 2, 70 if kerb not in world.lanes else 0, 5.4, 9):
            yield z, _car(dice, kerb - side * 1.05, z, dice.random() < 0.4)
        yield world.zebra + 1, _person(dice, dice.uniform(*world.kerbs), world.zebra + 1)
        for z in _along(dice, 4, 55, 0.8, 14):
            yield z, _person(dice, kerb + side * dice.uniform(0.7, world.pavement - 0.3), z)
    for x, away in ((world.lanes[0] + 1.5, False), (world.lanes[1] - 1.6, True)):
        for z in _along(dice, 5, 90, 8, 45):
            yield z, _car(dice, x, z, away)


def _along(dice: random.Random, start: float, end: float, least: float, most: float) -> Iterator[float]:
    """Yield distances from `start` to `end` with random gaps."""
    z = start + dice.uniform(0, most - least)
    while z < end:
        yield z
        z += dice.uniform(least, most)


def _even(x: float, *rows: Point) -> list[Point]:
    """A polygon that is symmetric about `x`; every row gives half of the breadth, y and z."""
    return [(x - half, y, z) for half, y, z in rows] + [(x + half, y, z) for half, y, z in reversed(rows)]


def _panel(x: float, y0: float, y1: float, z0: float, z1: float) -> list[Point]:
    return [(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)]


def _disc(x: float, y: float, z: float, rx: float, ry: float, step: int = 1) -> list[Point]:
    """A circle that faces the camera: a polygon of twelve corners, or of every step-th of them."""
    return [(x + rx * sine, y + ry * cosine, z) for sine, cosine in _CIRCLE[::step]]


def _house(world: _World, side: int, near: float, far: float, storeys: int) -> Iterator[Patch]:
    dice, x, height, facade = world.dice, world.fronts[side > 0], 3.2 * storeys + 0.8, world.dice.choice(_FACADES)
    trim, shade = dice.choice((_WHITE, "5a5450")), 0.9 - world.shadows * (0.6 if side == world.sun else -0.3)
    top, ridge, back = (x, height), (x + side * 5, height + 3), x + side * 10
    yield BUILDING, dice.choice(_ROOFS), 1, [(*top, near), (*ridge, near), (*ridge, far), (*top, far)]
    yield BUILDING, facade, 0.78, [(x, 0, near), (*top, near), (*ridge, near), (back, height, near), (back, 0, near)]
    yield BUILDING, facade, shade, _panel(x, 0, height, near, far)
    columns = round((far - near) / dice.uniform(1.9, 3.2)) + 1
    pitch, door = (far - near) / columns, dice.randrange(columns)
    for column, storey in product(range(columns), range(storeys)):
        z0, z1, head = near + (column + 0.24) * pitch, near + (column + 0.76) * pitch, 3.2 * storey + 3.3
        sill = 0.1 if storey == 0 and column == door else head - 1.6
        yield 0, trim, shade, _panel(x, sill - 0.1, head + 0.1, z0 - 0.12, z1 + 0.12)
        yield 0, _YELLOW if dice.random() < world.lit else dice.choice(_PANES), shade, _panel(x, sill, head, z0, z1)


def _tree(dice: random.Random, x: float, z: float, size: float) -> Iterator[Patch]:
    leaf, slender, middle = dice.choice(_LEAVES), dice.choice((0.8, 0.8, 1.4)), 2.2 + size
    yield VEGETATION, _METALS[-1], 0.8, _even(x, (0.17, 0, z), (0.11, middle, z))
    for share in np.linspace(0, 1, min(40, max(8, int(size * 160 / z)))).tolist():  # from the inside to the sunny tips
        across, up = dice.triangular(-0.8, 0.8) * size, (dice.triangular(-0.8, 0.8) * slender + share * 0.6) * size
        radius, light = size * dice.uniform(0.25, 0.5) * (1 - 0.55 * share), 0.55 * share + dice.uniform(0.5, 0.7)
        yield VEGETATION, leaf, light, _disc(x + across, middle + up, z, radius, radius)


def _pole(world: _World, x: float, z: float, side: int) -> Iterator[Patch]:
    """A lamp post, or a traffic sign or light on a pole."""
    dice, metal, kind = world.dice, world.dice.choice(_POSTS), world.dice.choice((POLE, POLE, SIGN, SIGN, LIGHT))
    top = dice.uniform(4.5, 8) if kind == POLE else dice.uniform(2.4, 3.4)
    half = max(dice.uniform(0.11, 0.17), 1.5 * _SCALE * z / world.focal)  # a pole below 3 pixels would get lost
    yield POLE, metal, 1, _even(x, (half, 0, z), (half, top, z))
    if kind == POLE:
        end = x - side * dice.choice((0, 1, 1.5, 2))
        yield POLE, metal, 1, [(x, top - 0.14, z), (end, top + 0.2, z), (end, top + 0.4, z), (x, top + 0.06, z)]
        yield POLE, _YELLOW if world.lit else metal, 1, _even(end, (0.35, top + 0.18, z), (0.35, top + 0.4, z))
    elif kind == LIGHT:
        yield LIGHT, _BLACK, 1, _even(x, (0.2, top - 1, z), (0.2, top, z))
        on = dice.randrange(3)
        yield 0, (_RED, _YELLOW, _GREEN)[on], 1.2, _disc(x, top - 0.18 - 0.32 * on, z, 0.15, 0.15)
    else:
        r, step, inside = dice.uniform(0.5, 0.7), dice.choice((1, 1, 3, 4)), dice.choice((_WHITE, _BLUE, _YELLOW))
        yield SIGN, _RED if inside == _WHITE else _WHITE, 1, _disc(x, top, z, r, r, step)
        yield 0, inside, 1, _disc(x, top, z, r * 0.7, r * 0.7, step)


def _car(dice: random.Random, x: float, z: float, away: bool) -> Iterator[Patch]:
    cabin_start, cabin_end, roof_start, roof_end, belt, top = dice.choice(_CABINS)
    paint, half, length, glass = dice.choice(_PAINTS), dice.uniform(0.84, 0.94), dice.uniform(3.7, 4.7), _PANES[0]
    z0, z1, z2, z3, back = (z + length * share for share in (cabin_start, roof_start, roof_end, cabin_end, 1))
    narrow, low, high = half * 0.8, belt + 0.06, top - 0.1
    flank, inner = x - math.copysign(half, x), x - math.copysign(narrow, x)  # the side that the camera sees
    yield 0, _BLACK, 1, _even(x, (half * 1.2, 0, z - 0.2), (half * 1.2, 0, back + 0.2))
    for hub in (z + 0.82 * length, z + 0.18 * length):
        yield CAR, _BLACK, 1, [(flank, 0.33 + 0.33 * cosine, hub + 0.33 * sine) for sine, cosine in _CIRCLE]
    yield CAR, paint, 0.72, _panel(flank, 0.25, belt, z, back)
    yield CAR, paint, 1.12, _even(x, (half, belt, z), (half, belt, back))
    yield CAR, paint, 0.85, [(flank, belt, z0), (inner, top, z1), (inner, top, z2), (flank, belt, z3)]
    yield 0, glass, 1, [(flank, low, z0 + 0.2), (inner, high, z1), (inner, high, z2), (flank, low, z3 - 0.2)]
    yield CAR, paint, 1, _even(x, (half, belt, z0), (narrow, top, z1), (narrow, top, z2))
    yield 0, glass, 1.15, _even(x, (half - 0.1, low, z0), (narrow - 0.07, high, z1))
    yield CAR, paint, 0.92, _even(x, (half, 0.3, z), (half, belt - 0.12, z), (half - 0.1, belt, z))
    for edge in (half - 0.19, 0.19 - half):
        yield CAR, _BLACK, 1, _even(x + edge, (0.11, 0, z), (0.11, 0.3, z))
        yield 0, _RED if away else _WHITE, 1, _even(x + edge, (0.15, belt - 0.32, z), (0.15, belt - 0.14, z))


def _person(dice: random.Random, x: float, z: float) -> Iterator[Patch]:
    tall, hem = dice.choice((1.2, 1.6, 1.7, 1.8)), dice.uniform(0.35, 0.6)
    yield 0, _BLACK, 1, _even(x, (0.35, 0, z - 0.2), (0.35, 0, z + 0.2))
    yield PERSON, dice.choice(_PAINTS), 0.9, _even(x, (0, tall / 2, z), (0.08, 0, z), (0.24, 0, z), (0.18, tall / 2, z))
    yield PERSON, dice.choice(_PAINTS), 1, _even(x, (0.2, hem, z), (0.28, tall / 2, z), (0.2, tall - 0.26, z))
    yield PERSON, dice.choice(_SKINS), 1, _disc(x, tall - 0.13, z, 0.11, 0.14)
    yield PERSON, dice.choice(_METALS[4:]), 0.7, _disc(x, tall - 0.05, z, 0.115, 0.09)


def _develop(world: _World, picture: Image.Image, fine: Labels) -> NDArray[np.uint8]:
    """Turn the painted picture into a photograph: surfaces get grain, then come lens, exposure and sensor."""
    uniform, normal = world.dice.uniform, world.noise.standard_normal
    grain = np.where((fine == VEGETATION) | (fine == TERRAIN), 11, 3) * normal(fine.shape, np.float32)
    rough = Image.fromarray((np.asarray(picture) + grain[..., None]).clip(0, 255).astype(np.uint8))
    seen = np.asarray(rough.filter(ImageFilter.GaussianBlur(uniform(0.2, 0.7))), np.float32)
    lit = seen * (world.horizon / 210) ** 0.6 * uniform(0.8, 1.15)  # the sky lights it
    noisy = (lit - 118) * uniform(0.85, 1.15) + 118 + normal(lit.shape, np.float32) * uniform(1, 4)
    return np.clip(noisy, 0, 255).astype(np.uint8)
