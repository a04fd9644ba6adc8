"""Random pictures with known content: colored shapes and printed text over varied backgrounds.

A `Scene` is a list of facts in a unit square; `draw` turns it into pixels at any size. The same random generator state
always gives the same scene and the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLORS = {
    "red": (214, 32, 40),
    "orange": (246, 136, 24),
    "yellow": (244, 220, 40),
    "green": (36, 150, 60),
    "blue": (36, 84, 214),
    "purple": (134, 50, 166),
    "white": (250, 250, 250),
    "black": (22, 22, 24),
}
BACKGROUNDS = (
    (176, 176, 176), (150, 160, 172), (196, 184, 164), (164, 180, 160), (188, 164, 164), (160, 168, 190),
    (132, 136, 140), (204, 200, 186), (176, 164, 188), (148, 172, 172),
)  # fmt: skip
INKS = ((20, 20, 24), (20, 30, 90), (110, 16, 20), (16, 70, 30))
PAPERS = ((250, 250, 248), (255, 248, 214), (226, 240, 255), (236, 250, 232))
SMALL, LARGE = (0.15, 0.21), (0.30, 0.40)


@dataclass(frozen=True)
class Thing:
    """One shape: its box is (x1, y1, x2, y2) in the unit square."""

    shape: str
    color: str
    size: str
    box: tuple[float, float, float, float]
    angle: float = 0.0

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Text:
    """Printed lines on a plate; `font` is a path, or "" for the font built into Pillow."""

    lines: tuple[str, ...]
    center: tuple[float, float]
    height: float
    font: str = ""
    angle: float = 0.0
    ink: tuple[int, int, int] = INKS[0]
    paper: tuple[int, int, int] | None = PAPERS[0]
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    marks: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class Scene:
    """The contents of a picture."""

    things: tuple[Thing, ...]
    text: Text | None = None
    background: tuple[int, int, int] = BACKGROUNDS[0]
    texture: str = "plain"
    clutter: int = 0
    noise: float = 0.0
    seed: int = 0


@lru_cache(maxsize=256)
def load_font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A font by path, or Pillow's own for ""; `pixels` is the em size."""
    font = ImageFont.truetype(name, pixels) if name else ImageFont.load_default(pixels)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def place_text(text: Text) -> Text:
    """Fill in the text's box and the center of every character, both in the unit square."""
    unit = 200
    font = load_font(text.font, max(8, round(text.height * unit)))
    em = font.size / unit
    pitch = em * 1.25
    width = max(font.getlength(line) for line in text.lines) / unit
    tall = pitch * len(text.lines)
    half_w, half_h = width / 2 + 0.3 * em, tall / 2 + 0.1 * em
    cos, sin = math.cos(math.radians(text.angle)), math.sin(math.radians(text.angle))
    cx, cy = text.center

    def turned(x: float, y: float) -> tuple[float, float]:
        return cx + x * cos + y * sin, cy - x * sin + y * cos

    marks = []
    for row, line in enumerate(text.lines):
        left = -font.getlength(line) / unit / 2
        y = (row - (len(text.lines) - 1) / 2) * pitch
        for i, char in enumerate(line):
            start, end = font.getlength(line[:i]) / unit, font.getlength(line[: i + 1]) / unit
            if char != " ":
                marks.append((char, *turned(left + (start + end) / 2, y)))
    corners = [turned(x, y) for x in (-half_w, half_w) for y in (-half_h, half_h)]
    xs, ys = zip(*corners)
    return replace(text, box=(min(xs), min(ys), max(xs), max(ys)), marks=tuple(marks))


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Shared area of two boxes over the smaller one's area."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def random_thing(rng: np.random.Generator, shape: str | None = None, color: str | None = None) -> Thing:
    """A shape somewhere in the unit square."""
    size = "small" if rng.random() < 0.55 else "large"
    w = rng.uniform(*(SMALL if size == "small" else LARGE))
    h = w * rng.uniform(0.9, 1.1)
    x, y = rng.uniform(0.01, 0.99 - w), rng.uniform(0.01, 0.99 - h)
    angle = float(rng.uniform(-10, 10))
    shape = shape or str(rng.choice(SHAPES))
    return Thing(shape, color or str(rng.choice(list(COLORS))), size, (x, y, x + w, y + h), angle)


def random_string(rng: np.random.Generator, shares: Sequence[float], words: Sequence[str], hanzi: str) -> str:
    """Digits, capital letters, a word or Chinese characters, chosen with the probabilities `shares`."""
    kind = int(rng.choice(4, p=shares))
    if kind == 0:
        return "".join(rng.choice(list("0123456789"), int(rng.integers(1, 9))))
    if kind == 1:
        return "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), int(rng.integers(1, 7))))
    if kind == 2:
        return str(rng.choice(words))
    return "".join(rng.choice(list(hanzi), int(rng.integers(1, 5))))


def random_text(
    rng: np.random.Generator,
    fonts: Sequence[str] = ("",),
    hanzi_fonts: Sequence[str] = (),
    words: Sequence[str] = (),
    hanzi: str = "",
    shares: Sequence[float] = (1.0, 0.0, 0.0, 0.0),
) -> Text:
    """One or two printed lines that fit into the unit square."""
    for _ in range(50):
        lines = [random_string(rng, shares, words, hanzi) for _ in range(1 + (rng.random() < 0.2))]
        chinese = any(ord(c) > 0x2E80 for line in lines for c in line)
        font = str(rng.choice(hanzi_fonts if chinese else fonts))
        height = rng.uniform(0.17, 0.24) if chinese else rng.uniform(0.12, 0.2)
        text = place_text(
            Text(
                tuple(lines),
                (rng.uniform(0.15, 0.85), rng.uniform(0.1, 0.9)),
                height,
                font,
                float(rng.uniform(-10, 10)) if rng.random() < 0.4 else 0.0,
                INKS[rng.integers(len(INKS))],
                PAPERS[rng.integers(len(PAPERS))] if rng.random() < 0.8 else None,
            )
        )
        if min(text.box) > 0.01 and max(text.box) < 0.99:
            return text
    return place_text(Text(("7",), (0.5, 0.5), 0.18))


def random_scene(
    rng: np.random.Generator,
    max_things: int = 6,
    text_share: float = 0.4,
    palette: Sequence[tuple[str, str]] = (),
    calm: bool = False,
    **text_options: Any,
) -> Scene:
    """A scene of 1 to `max_things` shapes (fewer beside text), some of them partly covered.

    Parameters
    ----------
    text_share : float
        Probability of printed text.
    palette : sequence of (shape, color)
        Kinds to draw from; any kind when empty.
    calm : bool
        Without texture, clutter and noise.
    text_options
        For `random_text`.
    """
    text = random_text(rng, **text_options) if rng.random() < text_share else None
    things: list[Thing] = []
    wanted = int(rng.integers(0, 4)) if text else int(rng.integers(1, max_things + 1))
    kinds = list(palette)
    if not kinds and rng.random() < 0.6:
        # Few kinds in a picture make counts above one and near misses (same shape, other color) common.
        shapes, colors = rng.choice(SHAPES, 3, replace=False), rng.choice(list(COLORS), 3, replace=False)
        kinds = [(str(s), str(c)) for s in shapes for c in colors]
    for _ in range(wanted):
        for _ in range(30):
            shape, color = kinds[rng.integers(len(kinds))] if kinds else (None, None)
            thing = random_thing(rng, shape, color)
            if all(overlap(thing.box, other.box) < 0.15 for other in things) and (
                text is None or overlap(thing.box, text.box) == 0
            ):
                things.append(thing)
                break
    background = np.clip(np.add(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], rng.integers(-8, 9, 3)), 0, 255)
    scene = Scene(
        tuple(things),
        text,
        (int(background[0]), int(background[1]), int(background[2])),
        str(rng.choice(["plain", "gradient", "stripes", "checks"])),
        int(rng.integers(1, 7)) if rng.random() < 0.4 else 0,
        float(rng.uniform(2, 10)) if rng.random() < 0.5 else 0.0,
        int(rng.integers(2**31)),
    )
    return replace(scene, texture="gradient", clutter=0, noise=0.0) if calm else scene


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The polygon of a shape, scaled to its box."""
    steps = [2 * math.pi * i / 48 for i in range(48)]
    if thing.shape in ("circle", "ring"):
        points = [(math.cos(t), math.sin(t)) for t in steps]
    elif thing.shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif thing.shape == "triangle":
        points = [(0, -1), (1, 1), (-1, 1)]
    elif thing.shape == "diamond":
        points = [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]
    elif thing.shape == "star":
        radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
        points = [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]
    elif thing.shape == "cross":
        t = 0.34
        points = [
            (-t, -1),
            (t, -1),
            (t, -t),
            (1, -t),
            (1, t),
            (t, t),
            (t, 1),
            (-t, 1),
            (-t, t),
            (-1, t),
            (-1, -t),
            (-t, -t),
        ]
    else:
        points = [
            (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
            for t in steps
        ]
    angle = math.radians(thing.angle)
    cos, sin = math.cos(angle), math.sin(angle)
    points = [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x1, y1, x2, y2 = thing.box
    sx, sy = (x2 - x1) / (max(xs) - min(xs)), (y2 - y1) / (max(ys) - min(ys))
    return [(x1 + (x - min(xs)) * sx, y1 + (y - min(ys)) * sy) for x, y in points]


def paint_background(scene: Scene, side: int, rng: np.random.Generator) -> Image.Image:
    """The background, its texture and gray clutter lines."""
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    if scene.texture == "gradient":
        shade = (ramp[:, None] * rng.uniform(-1, 1) + ramp[None] * rng.uniform(-1, 1)) * 14
    elif scene.texture == "stripes":
        shade = np.sign(np.sin(ramp * rng.uniform(8, 30) + 1))[None] * rng.uniform(3, 9) + 0 * ramp[:, None]
    elif scene.texture == "checks":
        wave = np.sign(np.sin(ramp * rng.uniform(8, 24) + 1))
        shade = wave[:, None] * wave[None] * rng.uniform(3, 9)
    else:
        shade = np.zeros((side, side), np.float32)
    pixels = np.clip(np.asarray(scene.background, np.float32) + shade[..., None], 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(scene.clutter):
        x, y, dx, dy = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)
        gray = tuple(int(c * rng.uniform(0.75, 0.95)) for c in scene.background)
        ends = [x * side, y * side, (x + dx) * side, (y + dy) * side]
        pen.line(ends, fill=gray, width=max(1, side // 112))
    return image


def paint_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int, hole: tuple[int, int, int]) -> None:
    """One shape with a dark rim."""
    color = COLORS[thing.color]
    rim = tuple(int(c * 0.6) for c in color) if thing.color != "black" else (70, 70, 74)
    points = [(x * side, y * side) for x, y in outline(thing)]
    width = max(1, side // 112)
    pen.polygon(points, fill=color, outline=rim, width=width)
    if thing.shape == "ring":
        cx, cy = thing.center
        inner = [((cx + (x / side - cx) * 0.55) * side, (cy + (y / side - cy) * 0.55) * side) for x, y in points]
        pen.polygon(inner, fill=hole, outline=rim, width=width)


def paint_text(image: Image.Image, text: Text) -> None:
    """The text's plate and its lines, turned by the text's angle."""
    side = image.width
    font = load_font(text.font, max(8, round(text.height * side)))
    pitch = font.size * 1.25
    width = max(font.getlength(line) for line in text.lines) + 0.6 * font.size
    tall = pitch * len(text.lines) + 0.2 * font.size
    clear = (*(text.paper or text.ink), 0)
    layer = Image.new("RGBA", (round(width), round(tall)), (*text.paper, 255) if text.paper else clear)
    pen = ImageDraw.Draw(layer)
    for row, line in enumerate(text.lines):
        y = tall / 2 + (row - (len(text.lines) - 1) / 2) * pitch
        pen.text((width / 2, y), line, fill=(*text.ink, 255), font=font, anchor="mm")
    if text.angle:
        layer = layer.rotate(text.angle, Image.Resampling.BICUBIC, expand=True, fillcolor=clear)
    corner = (round(text.center[0] * side - layer.width / 2), round(text.center[1] * side - layer.height / 2))
    image.paste(layer, corner, layer)


def draw(scene: Scene, side: int = 224) -> Image.Image:
    """The scene as an RGB picture of `side` x `side` pixels."""
    rng = np.random.default_rng(scene.seed)
    image = paint_background(scene, side, rng)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        paint_thing(pen, thing, side, scene.background)
    if scene.text:
        paint_text(image, scene.text)
    if scene.noise:
        pixels = np.asarray(image, np.float32)
        pixels = pixels + rng.normal(0, scene.noise, (side, side, 1)).astype(np.float32)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image
