"""Pictures in a text: ``<img>source</img>``, and the tags that may not stand inside."""

from __future__ import annotations

import re

from qvl_runtime.errors import QvlError

IMAGE_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")

_ANY_TAG = re.compile("|".join(map(re.escape, IMAGE_TAGS)))


def cut_images(text: str) -> list[str]:
    """Split a text at its image spans, as `split_images`; tags that do not pair are text."""
    pieces, done = [], 0
    # A regular expression would search for the end of every <img>, which takes quadratic time where none ends.
    while (start := text.find("<img>", done)) >= 0 and (end := text.find("</img>", start)) >= 0:
        pieces += [text[done:start], text[start + len("<img>") : end]]
        done = end + len("</img>")
    return [*pieces, text[done:]]


def split_images(text: str) -> list[str]:
    """Split a text at its image spans.

    Parameters
    ----------
    text : str

    Returns
    -------
    list of str
        Alternately text and what stood between ``<img>`` and ``</img>``: text, path, text, path, ..., text.

    Raises
    ------
    QvlError
        An ``<img>`` that is never closed, or another tag inside an image span.

    Examples
    --------
    >>> split_images("Picture 1: <img>a.png</img> and more")
    ['Picture 1: ', 'a.png', ' and more']
    """
    pieces = cut_images(text)
    for path in pieces[1::2]:
        if tag := _ANY_TAG.search(path):
            raise QvlError(f"tags do not nest: {tag[0]} stands inside <img>{_shorten(path)}</img>; put it after")
    for piece in pieces[0::2]:
        _, found, rest = piece.partition("<img>")
        if found:
            raise QvlError(f"unclosed image tag: <img>{_shorten(rest)} has no </img>; close it, or leave it out")
    return pieces


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
