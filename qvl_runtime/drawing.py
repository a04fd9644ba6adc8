"""Draw boxes and their labels on a picture."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from qvl_runtime.boxes import Box
from qvl_runtime.inputs.images import ImageSource, load_image
from qvl_runtime.saving import save

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")

# Fonts with Chinese characters, as named on Linux, Windows and macOS; then one with most other scripts.
FONT_FILES = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "simsun.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)


class Drawing(NamedTuple):
    """A picture with boxes, and a legend of the labels that are drawn as a number: ``{2: "击掌"}``."""

    image: Image.Image
    legend: dict[int, str]

    @property
    def note(self) -> str:
        """One line that says what the numbers stand for; empty if there are none."""
        named = ", ".join(f"{number} is {label}" for number, label in self.legend.items())
        return f"no installed font has the characters of labels that are drawn as numbers: {named}" if named else ""


def draw_boxes(image: ImageSource, boxes: Sequence[Box], out_path: str | Path | None = None) -> Drawing:
    """Draw boxes and their labels on a copy of a picture.

    A label is drawn in the first installed font that has all its characters. If there is none, the number of the
    box is drawn instead (from 1, in the order of `boxes`) and the legend maps it to the label.

    Parameters
    ----------
    image : path, bytes, PIL image or array
        As for `load_image`.
    boxes : sequence of Box
    out_path : str or pathlib.Path, optional
        Save the picture here, in the format of the file's extension.

    Returns
    -------
    Drawing
        The picture (mode RGB, same size) and the legend, which is empty if every label could be drawn.

    Raises
    ------
    QvlError
        The picture cannot be read, or `out_path` cannot be written.
    """
    picture = load_image(image)
    width, height = picture.size
    pen = ImageDraw.Draw(picture)
    line = max(2, round(min(width, height) / 200))
    font_size = max(12, round(min(width, height) / 28))
    legend: dict[int, str] = {}
    labels = []
    for number, box in enumerate(boxes, 1):
        left, top, right, bottom = box.to_pixels(width, height)
        left, right = sorted(min(x, width - 1) for x in (left, right))
        top, bottom = sorted(min(y, height - 1) for y in (top, bottom))
        colour = COLOURS[(number - 1) % len(COLOURS)]
        pen.rectangle((left, top, right, bottom), outline=colour, width=line)
        if label := _printable(box.ref or ""):
            font = next((f for f in _fonts(font_size) if _has_glyphs(f, label)), None)
            if font is None:
                legend[number] = label
                font, label = _fonts(font_size)[0], str(number)
            labels.append((left, top, label, font, colour))
    for left, top, label, font, colour in labels:
        _write_label(pen, picture.size, left, top, label, font, colour)
    if out_path is not None:
        save(picture, out_path)
    return Drawing(picture, legend)


def _printable(ref: str) -> str:
    """Put a label on one line, without invisible characters."""
    return "".join(c for c in " ".join(ref.split()) if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


@functools.cache
def _fonts(size: int) -> list[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Return Pillow's Latin font, then the installed fonts of `FONT_FILES`."""
    fonts = [ImageFont.load_default(size)]
    for name in FONT_FILES:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except (OSError, ImportError):
            continue
    return fonts


def _has_glyphs(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> bool:
    """Whether a font has a glyph for every character."""
    try:
        # Two code points that are never characters: a font draws its "missing glyph" sign for them.
        missing = {_glyph(font, "\uffff"), _glyph(font, "\U0010ffff")}
        return all(_glyph(font, c) not in missing for c in set(text) - {" "})
    except UnicodeError:  # Pillow's bitmap font is Latin-1; without FreeType there is no other
        return text.isascii()


def _glyph(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, character: str) -> bytes:
    size = round(getattr(font, "size", 16))
    canvas = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size // 4, size // 4), character, fill=255, font=font)
    return canvas.tobytes()


def _write_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    left: int,
    top: int,
    label: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: str,
) -> None:
    """Draw a label on a filled strip above its box, or inside the box if there is no space above."""
    x1, y1, x2, y2 = pen.textbbox((0, 0), label, font=font)
    width, height = x2 - x1 + 4, y2 - y1 + 4
    x = int(max(0, min(left, size[0] - width)))
    y = int(top - height if top >= height else min(top, max(0, size[1] - height)))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    pen.text((x + 2 - x1, y + 2 - y1), label, fill="white", font=font)
