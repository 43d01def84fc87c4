"""Draw scenes: pictures of several objects with known boxes, of which the main object is the label.

A class is a texture on a shape, such as "striped_star". Colors, backgrounds, sizes, positions and rotations are random and
independent of the class. As in ImageNet, a picture shows a main object, its label, and other objects.

Coordinates: x to the right, y down, (0, 0) is the upper left corner. (u, v) are coordinates of an object, which lies inside
the unit circle.
"""

from __future__ import annotations

import csv
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from ..naming import check_split

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Pattern = Callable[[Array, Array], Mask]

SIZE = (96, 128)  # (height, width) of landscape scenes; half of the scenes are portrait
CLEAN_SIZE = (54, 72)  # the same for clean pictures
BOX_COLUMNS = ("image", "width", "height", "class", "main", "x1", "y1", "x2", "y2")
_SAMPLES = 2  # samples per pixel along each axis, for smooth edges
_ATTEMPTS = 60  # attempts to place an object without overlap


def _star(num_points: int, notch: float) -> Pattern:
    """Return a star with tips at radius 1 and notches at radius `notch`. With 3 points and a notch of 0.5, it is a triangle."""
    sector = math.pi / num_points  # from a tip to the next notch
    normal_u, normal_v = notch * math.sin(sector), 1 - notch * math.cos(sector)  # normal of the edge between them

    def inside(u: Array, v: Array) -> Mask:
        radius, angle = np.hypot(u, v), np.arctan2(v, u)
        folded = np.abs((angle + sector) % (2 * sector) - sector)  # into the sector of this edge, by symmetry
        return np.asarray(radius * (np.cos(folded) * normal_u + np.sin(folded) * normal_v) <= normal_u)

    return inside


SHAPES: dict[str, Pattern] = {
    "disc": lambda u, v: u * u + v * v <= 0.8,
    "triangle": _star(3, 0.5),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 0.95),
    "star": _star(5, 0.42),
}
TEXTURES: dict[str, Pattern] = {  # regions in the second of the two colors of an object
    "striped": lambda _u, v: v % 0.5 < 0.25,
    "barred": lambda u, _v: u % 0.5 < 0.25,
    "checked": lambda u, v: (u % 0.8 < 0.4) ^ (v % 0.8 < 0.4),
    "dotted": lambda u, v: (u % 0.5 - 0.25) ** 2 + (v % 0.5 - 0.25) ** 2 < 0.026,
    "netted": lambda u, v: (u % 0.5 < 0.12) | (v % 0.5 < 0.12),
    "ringed": lambda u, v: np.hypot(u - 0.5, v - 0.5) % 0.4 < 0.2,
}
# Each texture occurs on two shapes, and each shape has three textures, so both are needed to recognize a class.
CLASSES = (
    "barred_cross", "barred_disc", "checked_star", "checked_triangle", "dotted_cross", "dotted_triangle",
    "netted_disc", "netted_star", "ringed_cross", "ringed_disc", "striped_star", "striped_triangle",
)  # fmt: skip


class SceneObject(NamedTuple):
    """Object of a scene."""

    label: int  # index in CLASSES
    is_main: bool
    box_xyxy: tuple[int, int, int, int]  # in pixels; x2 and y2 are exclusive


class Scene(NamedTuple):
    """Picture and its objects, the main object first."""

    image: Image.Image
    objects: list[SceneObject]


def draw_scenes(root: Path, split: str, num_images: int, *, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
    """Draw scenes and write them as an ImageFolder with a table of their objects.

    The files are `root/<split>/<class>/<split>_<number>.jpg` and `root/<split>-boxes.csv`. The table has one line per object
    with the columns BOX_COLUMNS: file name without `.jpg`, size of the picture, class of the object, 1 for the main object or
    0, and box in pixels.

    Args:
        root: Folder to write to. It is created if it does not exist.
        split: Name of the split, see `scenes_of_split`.
        num_images: Number of pictures.
        seed: Seed of the pictures. Default: 0.
        size: Size (height, width) of half of the pictures in pixels, see `scenes_of_split`. Default: (96, 128).
    """
    check_split(split, "split=")
    for name in CLASSES:
        (root / split / name).mkdir(parents=True, exist_ok=True)
    with (root / f"{split}-boxes.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(BOX_COLUMNS)
        for i, scene in enumerate(scenes_of_split(split, num_images, seed=seed, size=size)):
            stem = f"{split}_{i:05d}"
            scene.image.save(root / split / CLASSES[i % len(CLASSES)] / f"{stem}.jpg", quality=92)
            for label, is_main, box in scene.objects:
                table.writerow([stem, *scene.image.size, CLASSES[label], int(is_main), *box])


def scenes_of_split(split: str, num_images: int, *, seed: int = 0, size: tuple[int, int] = SIZE) -> Iterator[Scene]:
    """Draw the scenes of a split.

    Args:
        split: Name of the split, such as "train". Different splits have different pictures.
        num_images: Number of pictures. Classes of the main objects alternate.
        seed: Seed of the pictures. Default: 0.
        size: Size (height, width) of half of the pictures in pixels; the others have the size (width, height). Default: (96, 128).

    Yields:
        The scenes. They do not depend on the number of pictures.
    """
    for i in tqdm(range(num_images), desc=f"drawing {split} scenes", unit="image", leave=False):
        yield draw_scene(_generator(seed, split, i), i % len(CLASSES), _oriented(size, i // len(CLASSES)))


def draw_clean(num_images: int, *, seed: int = 0, size: tuple[int, int] = CLEAN_SIZE) -> Iterator[Scene]:
    """Draw clean pictures for training an annotator. Each shows one large object, whole or in part, or none.

    One picture in seven has no object, because a label map also covers the background.

    Args:
        num_images: Number of pictures. Classes alternate.
        seed: Seed of the pictures. Default: 0.
        size: Size (height, width) of half of the pictures in pixels; the others have the size (width, height). Default: (54, 72).

    Yields:
        The pictures with at most one object each.
    """
    for i in tqdm(range(num_images), desc="drawing clean pictures", unit="image", leave=False):
        generator = _generator(seed, "clean", i)
        turn, label = divmod(i, len(CLASSES) + 2)
        height, width = _oriented(size, turn)
        pixels = _background(generator, (height, width))
        objects = []
        if label < len(CLASSES):
            radius = min(size) * 0.24 * math.exp(generator.uniform(0, 1))  # 24 % to 65 % of the shorter side
            center = generator.uniform(0.25, 0.75) * width, generator.uniform(0.25, 0.75) * height
            objects = [SceneObject(label, True, _draw_object(generator, pixels, label, center, radius))]
        yield Scene(_to_image(generator, pixels), objects)


def read_objects(table: Path) -> dict[str, list[SceneObject]]:
    """Read the objects of scenes from a table written by `draw_scenes`.

    Args:
        table: Path of the CSV file.

    Returns:
        The objects of each picture, by file name without `.jpg`.
    """
    objects: dict[str, list[SceneObject]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            box = int(row["x1"]), int(row["y1"]), int(row["x2"]), int(row["y2"])
            scene_object = SceneObject(CLASSES.index(row["class"]), row["main"] == "1", box)
            objects.setdefault(row["image"], []).append(scene_object)
    return objects


def draw_scene(generator: np.random.Generator, label: int, size: tuple[int, int]) -> Scene:
    """Draw a main object of class `label` and 0 to 3 smaller objects of other classes, without overlap."""
    height, width = size
    side = min(size)
    others = generator.permutation([other for other in range(len(CLASSES)) if other != label])
    labels = [label, *others[: generator.integers(0, 4)].tolist()]
    main_radius = side * generator.uniform(0.22, 0.38)
    pixels = _background(generator, size)
    placed: list[tuple[float, float, float]] = []
    objects = []
    for i, object_label in enumerate(labels):
        for _ in range(_ATTEMPTS):
            radius = main_radius if i == 0 else generator.uniform(0.15 * side, 0.8 * main_radius)
            x, y = generator.uniform(radius, width - radius), generator.uniform(radius, height - radius)
            if all(math.hypot(x - x2, y - y2) > radius + radius2 for x2, y2, radius2 in placed):
                break
        else:
            continue  # no space left
        placed.append((x, y, radius))
        box = _draw_object(generator, pixels, object_label, (x, y), radius)
        objects.append(SceneObject(object_label, i == 0, box))
    return Scene(_to_image(generator, pixels), objects)


def _generator(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the random generator of one picture, so that pictures do not depend on the number of pictures."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index])


def _oriented(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Return the size (height, width) of a picture. Landscape and portrait alternate within each class, to be uninformative."""
    return size if turn % 2 == 0 else size[::-1]


def _background(generator: np.random.Generator, size: tuple[int, int]) -> Array:
    """Return a background `[height, width, 3]` in 0..1: large blurred spots of similar colors."""
    spots = generator.uniform(0.1, 0.9, 3) + generator.uniform(-0.12, 0.12, (4, 4, 3))
    small = Image.fromarray(np.uint8(spots.clip(0, 1) * 255))
    return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC), np.float32) / np.float32(255)


def _to_image(generator: np.random.Generator, pixels: Array) -> Image.Image:
    noisy = pixels + np.float32(0.02) * generator.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.uint8(noisy.clip(0, 1) * 255))


def _colors(generator: np.random.Generator, background: Array) -> Array:
    """Return two colors `[2, 3]` that differ from each other and from the background."""
    while True:
        colors = generator.uniform(0, 1, (2, 3)).astype(np.float32)
        first, second = colors
        distances = [np.linalg.norm(a - b) for a, b in ((first, second), (first, background), (second, background))]
        if distances[0] > 0.6 and min(distances[1:]) > 0.4:
            return colors


def _draw_object(
    generator: np.random.Generator, pixels: Array, label: int, center: tuple[float, float], radius: float
) -> tuple[int, int, int, int]:
    """Draw an object into `pixels` `[height, width, 3]` in-place, and return the box of its visible part."""
    height, width = pixels.shape[:2]
    left, right = max(0, math.floor(center[0] - radius)), min(width, math.ceil(center[0] + radius))
    top, bottom = max(0, math.floor(center[1] - radius)), min(height, math.ceil(center[1] + radius))
    patch = pixels[top:bottom, left:right]
    texture, shape = CLASSES[label].split("_")

    x = (np.arange((right - left) * _SAMPLES) + 0.5) / _SAMPLES + left - center[0]
    y = (np.arange((bottom - top) * _SAMPLES) + 0.5) / _SAMPLES + top - center[1]
    angle = generator.uniform(-0.4, 0.4)
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u = (cos * x + sin * y[:, None]).astype(np.float32)
    v = (cos * y[:, None] - sin * x).astype(np.float32)
    shift = generator.uniform(0, 1, 2)
    inside = SHAPES[shape](u, v)
    second = inside & TEXTURES[texture](u + shift[0], v + shift[1])

    covered, covered_by_second = _mean_of_samples(inside), _mean_of_samples(second)
    colors = _colors(generator, patch.mean((0, 1)))
    patch *= 1 - covered
    patch += (covered - covered_by_second) * colors[0] + covered_by_second * colors[1]

    rows, columns = (np.flatnonzero((covered[..., 0] >= 0.5).any(axis)) for axis in (1, 0))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _mean_of_samples(mask: Mask) -> Array:
    """Return the share of true samples of each pixel, `[height, width, 1]`."""
    samples = mask.view(np.uint8)
    count = sum(samples[i::_SAMPLES, j::_SAMPLES] for i in range(_SAMPLES) for j in range(_SAMPLES))
    mean: Array = np.asarray(count, np.float32)[..., None] / np.float32(_SAMPLES**2)
    return mean
