"""Plot of a `Report`: divergence by position and error by layer, each with its noise floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qvl_convert.verify import Report
from qvl_runtime.saving import save

SIZE, MARGIN, GAP = (1200, 940), (90, 90), 90
INK, GRID, LINE, FLOOR = (30, 30, 34), (224, 224, 228), (36, 84, 214), (150, 150, 158)


def plot(report: Report, path: str | Path, *, title: str) -> None:
    """Plot a report with its noise floor to an image file; the extension selects the format.

    Raises
    ------
    QvlError
        If the file cannot be written.
    """
    image = Image.new("RGB", SIZE, "white")
    pen, height = ImageDraw.Draw(image), (SIZE[1] - 2 * MARGIN[1] - GAP) // 2
    pen.text((MARGIN[0], 40), title, fill=INK, font=ImageFont.load_default(24), anchor="ls")
    pen.text((SIZE[0] - 30, 40), "noise floor", fill=FLOOR, font=ImageFont.load_default(20), anchor="rs")
    pen.text((SIZE[0] - 160, 40), "this file", fill=LINE, font=ImageFont.load_default(20), anchor="rs")
    at, kl = zip(*report.kl_by_position)
    floor = [value for _, value in report.floor_by_position]
    _panel(pen, MARGIN[1], height, "KL divergence by position, nats", [str(a) for a in at], kl, floor)
    names, errors = zip(*report.layers)
    _panel(pen, MARGIN[1] + height + GAP, height, "relative error by layer", names, errors, report.floor_layers)
    save(image, path)


def round_ticks(largest: float, most: int = 6) -> list[float]:
    """Return at most `most` multiples of 1, 2 or 5 times a power of ten, from 0 to at least `largest`."""
    if not 0 < largest < math.inf:
        return [0.0, 1.0]
    exponent = math.floor(math.log10(largest))
    steps = [factor * 10.0**power for power in range(exponent - 1, exponent + 2) for factor in (1, 2, 5)]
    step = next(step for step in steps if math.ceil(largest / step) < most)
    return [i * step for i in range(math.ceil(largest / step) + 1)]


def _panel(
    pen: ImageDraw.ImageDraw,
    top: int,
    height: int,
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    floor: Sequence[float],
) -> None:
    """Draw a chart of two lines with an axis from 0; values that are not finite are gaps."""
    left, right, bottom = MARGIN[0], SIZE[0] - 30, top + height
    ticks = round_ticks(max((v for v in (*values, *floor) if math.isfinite(v)), default=0))
    font = ImageFont.load_default(16)
    pen.text((left, top - 12), title, fill=INK, font=ImageFont.load_default(20), anchor="ls")
    for tick in ticks:
        y = bottom - height * tick / ticks[-1]
        pen.line((left, y, right, y), fill=GRID)
        pen.text((left - 8, y), f"{tick:.6g}", fill=INK, font=font, anchor="rm")
    places = [left + (right - left) * (i + 0.5) / len(values) for i in range(len(values))]
    for line, colour in ((floor, FLOOR), (values, LINE)):
        points = [(x, bottom - height * v / ticks[-1]) for x, v in zip(places, line) if math.isfinite(v)]
        if len(points) > 1:
            pen.line(points, fill=colour, width=3)
        for x, y in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    every = -(-len(names) // 10)
    for x, name in list(zip(places, names))[::every]:
        pen.text((x, bottom + 8), name, fill=INK, font=font, anchor="ma")
