"""Supervised attention, for training only: the cells of the feature grid that each token of an answer depends on.

Without it the decoder takes thousands of steps to learn that the numbers after `<box>(` depend on the cells of the
thing that the phrase before names. So two heads of one layer are trained to attend to these cells, where the question
or the answer determines them. A third head is trained to share its attention evenly between the centers of all counted
things and everything outside of the picture: the share left for the latter gives their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from targets import cell_of, covered
from tiktoken import Encoding

from qvl_runtime.demo.conversations import Exchange, full, kind, left_to_right, references
from qvl_runtime.demo.scenes import Scene, Thing

LAYER, HEADS, COUNTING = 2, (3, 1), 2
"""The layer, its two heads with supervised cells, and the head that counts."""
BOX = re.compile(rb"(?:<ref>([^<]*)</ref>)?<box>(\((\d+),(\d+)\),\((\d+),(\d+)\))</box>")
PREFIX = re.compile("In picture (\\d): |第(\\d)张图：")
WHICH = re.compile("Which picture has an? (.*)\\?|哪张图里有(.*)？")
COUNTED = re.compile("How many (.*?)(?:(?<=cross)e)?s are there|(?:有几个|有多少个)(.*?)？")
EXTREMES = {"leftmost": 0, "最左边": 0, "rightmost": 1, "最右边": 1, "top": 2, "最上面": 2, "bottom": 3, "最下面": 3}
Look = tuple[int, int, np.ndarray]
"""Picture, which of `HEADS`, and cells."""


def in_picture(box: Sequence[float], grid: int) -> np.ndarray:
    """The cells a unit-square box covers, bool [cells]."""
    return covered(box, grid).reshape(-1)


def boxed(found: re.Match, grid: int) -> np.ndarray:
    """The cells a match of `BOX` covers."""
    return in_picture([int(v) / 1000 for v in found.groups()[2:]], grid)


def called(noun: str, language: str, scene: Scene) -> list[Thing]:
    """The things that a noun phrase without a size matches."""
    return [
        thing
        for thing in scene.things
        for option in ({}, {"color": thing.color}, {"shape": thing.shape}, {"color": thing.color, "shape": thing.shape})
        if kind(language, **option) == noun
    ]


def named(question: str, language: str, scene: Scene) -> list[Thing]:
    """The things that a question's phrases identify, in order."""
    found = []
    for thing in scene.things:
        for option in references(scene, thing):
            phrase = kind(language, **option) if language == "zh" else f"the {kind(language, **option)}"
            found += [(m.start(), m.end(), thing) for m in re.finditer(re.escape(phrase), question)]
    whole = [f for f in found if not any(o[0] <= f[0] and f[1] <= o[1] and o[:2] != f[:2] for o in found)]
    return [thing for _, _, thing in sorted(whole, key=lambda f: f[0])]


def asked_about(exchange: Exchange, scenes: Sequence[Scene], grid: int) -> Iterator[Look]:
    """The cells that all answers of an exchange depend on, if its first question determines them."""
    question, answer = exchange.turns[0]
    language, picture = exchange.language, 0
    prefix, which = PREFIX.match(question), WHICH.match(question)
    if prefix:
        picture = int(prefix[1] or prefix[2]) - 1
    elif which:
        picture = int(answer) - 1
        yield picture, 0, in_picture(called(which[1] or which[2], language, scenes[picture])[0].box, grid)
        return
    elif exchange.skill == "name":
        yield 0, 0, boxed(BOX.search(question.encode()), grid)
        return
    elif exchange.skill == "position":
        for word, side in EXTREMES.items():
            if f"{word} object" in question or f"{word}的物体" in question:
                order = sorted(scenes[0].things, key=lambda t: t.center[side // 2])
                yield 0, 0, in_picture(order[-(side % 2)].box, grid)
                return
    elif exchange.skill not in ("color", "shape", "size", "second"):
        return
    for head, thing in enumerate(named(question, language, scenes[picture])[: len(HEADS)]):
        yield picture, head, in_picture(thing.box, grid)


def counted(exchange: Exchange, scenes: Sequence[Scene], grid: int) -> tuple[int, np.ndarray] | None:
    """Picture index, and the number of counted things with their center in each cell, float32 [cells]."""
    question, language, picture = exchange.turns[0][0], exchange.language, 0
    prefix = PREFIX.match(question)
    if exchange.skill == "compare" and prefix:
        picture = int(prefix[1] or prefix[2]) - 1
    elif exchange.skill != "count":
        return None
    noun = COUNTED.search(question)
    if not noun:
        return None
    cells = np.zeros((grid, grid), np.float32)
    for thing in called(noun[1] or noun[2], language, scenes[picture]):
        cells[cell_of(*thing.center, grid)] += 1
    return picture, cells.reshape(-1)


def spans(exchange: Exchange, turn: int, scene: Scene, grid: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Byte ranges of a turn's answer and the cells they depend on, where the answer determines them."""
    answer = exchange.turns[turn][1].encode()
    for found in BOX.finditer(answer):
        begin = found.start(1) if exchange.skill == "ground" else found.start(2) + 1
        yield begin, found.end(2), boxed(found, grid)
    begin = 0
    if exchange.skill == "describe":
        for thing in left_to_right(scene):
            name = full(thing, exchange.language).encode()
            begin = answer.index(name, begin)
            yield begin, begin + len(name), in_picture(thing.box, grid)
            begin += len(name)
    elif exchange.skill == "read":
        for char, x, y in scene.text.marks:
            begin = answer.index(char.encode(), begin)
            cells = np.zeros((grid, grid), bool)
            cells[cell_of(x, y, grid)] = True
            yield begin, begin + len(char.encode()), cells.reshape(-1)
            begin += len(char.encode())


def looks(
    exchange: Exchange, scenes: Sequence[Scene], grid: int, encoding: Encoding
) -> Iterator[tuple[int, int, int, int, np.ndarray]]:
    """Turn, index of a token in the turn's answer, and the cells that it should attend to."""
    everywhere = list(asked_about(exchange, scenes, grid))
    for turn, (_, answer) in enumerate(exchange.turns):
        wanted = list(spans(exchange, turn, scenes[0], grid))
        offset = 0
        for i, token in enumerate(encoding.encode(answer, allowed_special="all") if wanted or everywhere else ()):
            here = [(0, 0, cells) for begin, end, cells in wanted if begin <= offset < end]
            for look in here[:1] or everywhere:
                yield turn, i, *look
            offset += len(encoding.decode_single_token_bytes(token))


def counting_loss(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, where: torch.Tensor, cells: torch.Tensor
) -> tuple[torch.Tensor, str]:
    """Divergence of the counting head's attention from even shares.

    Parameters
    ----------
    q, k : [B, heads, T, d]
        Rotated queries and keys of layer `LAYER`.
    mask : [B, 1, T, T]
        Added to the scores.
    where : int64 [n, 3]
        Row, column and the column of the picture's first cell.
    cells : float32 [n, cells]
        Number of counted things in each cell.
    """
    row, column, first = where.T
    scores = torch.einsum("ntd,nd->nt", k[row, COUNTING], q[row, COUNTING, column]).float() * q.shape[-1] ** -0.5
    shares = (scores + mask[row, 0, column]).softmax(-1)
    seen = shares.gather(1, first[:, None] + torch.arange(cells.shape[1], device=k.device))
    outside = 1 - seen.sum(-1)
    whole = cells.sum(-1) + 1
    lacking = -((seen + 1e-6).log() * cells).sum(-1) - outside.clamp(min=1e-6).log()
    return (lacking / whole - whole.log()).mean(), f"off {(outside * whole - 1).abs().mean().item():.2f}"


def loss(q: torch.Tensor, k: torch.Tensor, where: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Negative log of the heads' attention to a picture that falls on the target cells.

    Parameters
    ----------
    q, k : [B, heads, T, d]
        Rotated queries and keys of layer `LAYER`.
    where : int64 [n, 4]
        Row, column, the column of the picture's first cell, and the head.
    cells : bool [n, cells]
        The target cells.
    """
    row, column, first, head = where.T
    keys = k[row[:, None], head[:, None], first[:, None] + torch.arange(cells.shape[1], device=k.device)]
    scores = (keys * q[row, head, column][:, None]).float().sum(-1) * q.shape[-1] ** -0.5
    seen = (scores.softmax(-1) * cells).sum(-1)
    return -(seen + 1e-6).log().mean(), f"gaze {seen.mean().item():.3f}"
