"""Plot of a comparison: scores with intervals, and published scores as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qvl_runtime.evaluation.comparison import Row
from qvl_runtime.saving import save

WIDTH, ROW, TOP, LEFT, RIGHT, BOTTOM = 1000, 56, 90, 260, 60, 60
INK, GRID, BAR, SPREAD, PUBLISHED = (30, 30, 34), (224, 224, 228), (120, 150, 226), (20, 40, 110), (190, 60, 30)
TICKS = 5


def draw(rows: Sequence[Row], path: Path, *, title: str, published: Mapping[str, float]) -> None:
    """Plot a comparison to an image file; the extension selects the format.

    Raises
    ------
    QvlError
        If the file cannot be written.
    """
    height = TOP + ROW * len(rows) + BOTTOM
    image = Image.new("RGB", (WIDTH, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    highest = 1.05 * max([row.interval[1] for row in rows] + [row.score for row in rows] + list(published.values()))
    scale = (WIDTH - LEFT - RIGHT) / (highest if highest > 0 else 1.0)
    pen.text((20, 40), title, fill=INK, font=ImageFont.load_default(22), anchor="ls")
    base = TOP + ROW * len(rows)
    for tick in (highest * i / TICKS for i in range(TICKS + 1)):
        x = LEFT + tick * scale
        pen.line((x, TOP, x, base), fill=GRID)
        pen.text((x, base + 10), f"{tick:.4g}", fill=INK, font=font, anchor="ma")
    for number, row in enumerate(rows):
        y = TOP + ROW * number + ROW // 2
        pen.rectangle((LEFT, y - 14, LEFT + max(0.0, row.score) * scale, y + 14), fill=BAR)
        low, high = (LEFT + value * scale for value in row.interval)
        pen.line((low, y, high, y), fill=SPREAD, width=3)
        for x in (low, high):
            pen.line((x, y - 8, x, y + 8), fill=SPREAD, width=3)
        pen.text((LEFT - 10, y), f"{row.name}  {row.score:.2f}", fill=INK, font=font, anchor="rm")
    for name, score in published.items():
        x = LEFT + score * scale
        pen.line((x, TOP - 6, x, base), fill=PUBLISHED, width=2)
        pen.text((x, TOP - 10), f"{name}, published", fill=PUBLISHED, font=font, anchor="ms")
    save(image, path)
