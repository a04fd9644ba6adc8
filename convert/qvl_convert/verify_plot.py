"""The picture of a `Report`: the divergence by position, and the error by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qvl_convert.verify import Report
from qvl_runtime.errors import QvlError

SIZE, MARGIN, GAP = (1200, 900), (90, 60), 90
INK, GRID, LINE = (30, 30, 34), (224, 224, 228), (36, 84, 214)


def plot(report: Report, path: str | Path) -> None:
    """Draw a report into an image file, its format by its ending.

    Raises
    ------
    QvlError
        When the file cannot be written.
    """
    image = Image.new("RGB", SIZE, "white")
    pen, height = ImageDraw.Draw(image), (SIZE[1] - 2 * MARGIN[1] - GAP) // 2
    at, kl = zip(*report.kl_by_position)
    _panel(pen, MARGIN[1], height, "KL divergence by position, nats", [str(a) for a in at], kl)
    names, errors = zip(*report.layers)
    _panel(pen, MARGIN[1] + height + GAP, height, "relative error by layer", names, errors)
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        raise QvlError(f"{path}: cannot be written ({error}); name a .png file in a folder that exists") from None


def _panel(
    pen: ImageDraw.ImageDraw, top: int, height: int, title: str, names: Sequence[str], values: Sequence[float]
) -> None:
    """One line chart with its axis from 0."""
    left, right, bottom = MARGIN[0], SIZE[0] - 30, top + height
    font, largest = ImageFont.load_default(16), max(values) or 1.0
    pen.text((left, top - 12), title, fill=INK, font=ImageFont.load_default(20), anchor="ls")
    for step in range(5):
        y = bottom - height * step / 4
        pen.line((left, y, right, y), fill=GRID)
        pen.text((left - 8, y), f"{largest * step / 4:.2g}", fill=INK, font=font, anchor="rm")
    points = [
        (left + (right - left) * (i + 0.5) / len(values), bottom - height * value / largest)
        for i, value in enumerate(values)
    ]
    if len(points) > 1:
        pen.line(points, fill=LINE, width=3)
    for x, y in points:
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=LINE)
    every = -(-len(names) // 10)
    for (x, _), name in list(zip(points, names))[::every]:
        pen.text((x, bottom + 8), name, fill=INK, font=font, anchor="ma")
