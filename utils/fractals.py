"""The demo data set: 50 classes of rendered fractals, so that the whole pipeline runs without a download.

Formula-driven images in the spirit of Kataoka et al., "Pre-training without Natural Images" (ACCV 2020): a class
is a random iterated function system, here with a stripe texture and two hues of its own. An image jitters all of
them and lays the shape on coloured 1/f noise. Everything follows from fixed seeds; nothing is downloaded.

    data/demo/{train,val}/class_00/0000.png ...        the ImageFolder layout, as ImageNet has it
"""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.run.files import new_folder

NUM_CLASSES = 50
IMAGE_SIZE = 64
IMAGES_PER_CLASS = {"train": 20, "val": 40}

_SEED = 20220302  # names the data set: another seed is another set of classes
# "training": scripts/train.py's own images; "others": of classes that the data set does not have
_STREAMS = {"classes": 0, "train": 1, "val": 2, "training": 3, "others": 4}
_MAPS = 5  # an iterated function system has 2 to 5 maps; unused ones get probability zero
_PARTICLES, _STEPS, _BURN_IN = 128, 40, 10  # chaos game: points walked at once (64x64), steps kept, steps dropped
_JITTER = 0.08  # of the maps' parameters, relative


def _random_classes(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw what defines each class: affine maps, their probabilities, stripe frequency and angle, two colours."""
    n = NUM_CLASSES
    turn = rng.uniform(-np.pi, np.pi, (2, n, _MAPS))
    stretch = rng.uniform(0.25, 0.8, (n, _MAPS, 2)) * rng.choice([-1, 1], (n, _MAPS, 2), p=[0.25, 0.75])
    linear = _rotation(turn[0]) @ (stretch[..., None] * _rotation(turn[1]))  # (classes, maps, 2, 2)
    maps_used = rng.integers(2, _MAPS + 1, n)
    area = np.abs(np.linalg.det(linear))
    area[np.arange(_MAPS) >= maps_used[:, None]] = 0
    # Maps whose areas add up to well below one leave only dust: such a class is scaled up to 0.75.
    linear *= np.sqrt(np.maximum(1, 0.75 / area.sum(1)))[:, None, None, None]
    hue = rng.uniform(0, 1, n)
    return {
        "linear": linear,
        "shift": rng.uniform(-1, 1, (n, _MAPS, 2)),
        "probability": area / area.sum(1, keepdims=True),
        "frequency": rng.uniform(3, 11, n),  # stripes across the image
        "angle": rng.uniform(0, np.pi, n),
        "hues": np.stack([hue, hue + rng.uniform(0.2, 0.8, n)], axis=1),
    }


def render_round(stream: str, index: int) -> np.ndarray:
    """Render one image of every class: round `index` of a stream ("train", "val" or "training").

    Returns:
        uint8 array (NUM_CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3); the position along the first axis is the label.
    """
    classes = _random_classes(np.random.default_rng([_SEED, _STREAMS["classes"]]))
    return _render(classes, np.random.default_rng([_SEED, _STREAMS[stream], index]), IMAGE_SIZE)


def render_others(count: int, size: int, seed: int) -> np.ndarray:
    """Render images of classes that the data set does not have, each of another class: (count, size, size, 3), uint8.

    To calibrate any model with, as they know nothing of it. To the demo models, which were trained on the data set,
    they are more of its kind.
    """
    rounds = []
    for index in range(-(-count // NUM_CLASSES)):
        rng = np.random.default_rng([_SEED, _STREAMS["others"], seed, index])
        rounds.append(_render(_random_classes(rng), rng, size))
    return np.concatenate(rounds)[:count]


def _render(classes: dict[str, np.ndarray], rng: np.random.Generator, size: int) -> np.ndarray:
    """One image of every class: (NUM_CLASSES, size, size, 3), uint8."""
    n = NUM_CLASSES

    def jitter(value: np.ndarray) -> np.ndarray:
        return value * (1 + _JITTER * rng.standard_normal(value.shape))

    mask = _shape_mask(jitter(classes["linear"]), jitter(classes["shift"]), classes["probability"], rng, size)
    frequency = classes["frequency"] * (1 + 0.15 * rng.standard_normal(n))
    angle = classes["angle"] + 0.3 * rng.standard_normal(n)
    axis = np.arange(size) / size
    across = np.cos(angle)[:, None, None] * axis + np.sin(angle)[:, None, None] * axis[:, None]
    phase = rng.uniform(0, 2 * np.pi, n)
    wave = np.sin(2 * np.pi * frequency[:, None, None] * across + phase[:, None, None])
    stripes = 1 / (1 + np.exp(-4 * wave))[..., None]  # soft edges, no aliasing

    hues = classes["hues"] + 0.09 * rng.standard_normal((n, 2))
    colours = _hue_to_rgb(hues) * rng.uniform(0.65, 1.0, (n, 2, 1))  # (n, 2, 3)
    filled = stripes * colours[:, 0, None, None] + (1 - stripes) * colours[:, 1, None, None]
    image = np.where(mask[..., None], filled, _coloured_noise(n, size, rng))
    image += 0.02 * rng.standard_normal(image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def write_demo_data(root: Path) -> Path:
    """Write train/ and val/ below `root` unless they are there; whole or not at all. Takes seconds.

    Returns:
        `root`, an ImageFolder-style data set root.
    """
    if root.is_dir():
        return root
    with new_folder(root) as draft:
        for split, count in IMAGES_PER_CLASS.items():
            folders = [draft / split / f"class_{label:02d}" for label in range(NUM_CLASSES)]
            for folder in folders:
                folder.mkdir(parents=True)
            for index in range(count):
                for folder, image in zip(folders, render_round(split, index), strict=True):
                    Image.fromarray(image).save(folder / f"{index:04d}.png")
    return root


def _shape_mask(
    linear: np.ndarray, shift: np.ndarray, probability: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Play the chaos game for every image at once; returns the boolean masks (n, size, size)."""
    n, particles = len(linear), _PARTICLES * size**2 // IMAGE_SIZE**2
    # A map that expands would send its points to infinity: its largest singular value is held below one.
    norm = np.linalg.norm(linear, ord=2, axis=(2, 3), keepdims=True)
    linear = linear * np.minimum(1, 0.9 / norm)
    maps = np.concatenate([linear.reshape(n, _MAPS, 4), shift], axis=2)  # x -> a x + b y + e, y -> c x + d y + f
    threshold = probability.cumsum(1)[:, None]  # (n, 1, maps)
    images = np.arange(n)[:, None]
    x = y = np.zeros((n, particles))
    track = np.empty((2, n, _STEPS, particles))
    for step in range(-_BURN_IN, _STEPS):
        choice = (rng.random((n, particles, 1)) > threshold).sum(2).clip(max=_MAPS - 1)
        a, b, c, d, e, f = np.moveaxis(maps[images, choice], 2, 0)  # (n, particles) each
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= 0:
            track[0, :, step], track[1, :, step] = x, y
    point = np.moveaxis(track.reshape(2, n, -1), 0, 2)  # (n, points, 2)

    turn = _rotation(rng.normal(0, 0.25, n))
    point = point @ turn.transpose(0, 2, 1)
    low, high = np.quantile(point, 0.01, axis=1), np.quantile(point, 0.99, axis=1)
    extent = (high - low).max(1)[:, None, None] + 1e-9
    point = (point - (low + high)[:, None] / 2) / extent  # the shape's longer side is 1
    point = point * rng.uniform(0.6, 0.9, (n, 1, 1)) + 0.5 + rng.uniform(-0.08, 0.08, (n, 1, 2))
    pixel = (point * size).astype(int)
    inside = ((pixel >= 1) & (pixel < size - 1)).all(2)
    mask = np.zeros((n, size, size), bool)
    index = np.broadcast_to(images, inside.shape)[inside]
    x, y = pixel[inside].T
    for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):  # points as small crosses, so that shapes are solid
        mask[index, y + dy, x + dx] = True
    return mask


def _coloured_noise(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """1/f noise around a random colour: (n, size, size, 3), values about 0 to 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((n, 3, size, size)))
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    radius[0, 0] = np.inf  # the mean comes from the colour below
    noise = np.fft.irfft2(spectrum / radius, s=(size, size))
    noise /= noise.std((2, 3), keepdims=True)
    mean, contrast = rng.uniform(0.25, 0.75, (n, 3, 1, 1)), rng.uniform(0.06, 0.18, (n, 1, 1, 1))
    return (mean + contrast * noise).transpose(0, 2, 3, 1)


def _hue_to_rgb(hue: np.ndarray) -> np.ndarray:
    """Fully saturated colours: (...) -> (..., 3)."""
    return np.clip(np.abs((hue[..., None] + np.array([0, 2, 1]) / 3) % 1 * 6 - 3) - 1, 0, 1)


def _rotation(angle: np.ndarray) -> np.ndarray:
    """Rotation matrices: (...) -> (..., 2, 2)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
