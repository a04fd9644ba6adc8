"""Training rows: one to three pictures, then many independent questions that each see only the pictures.

A row is a shared prefix (system text and pictures) followed by branches. Every branch continues the positions of the
prefix and attends only to the prefix and itself, so it is exactly the prompt of a single conversation, while the
pictures are encoded once. Only the answers contribute to the loss.
"""

from __future__ import annotations

import numpy as np
import torch
from gaze import HEADS, counted, looks
from lexicon import scene_options
from pretrain_vision import DRAWN_AT, pixels_of
from targets import cell_targets
from tiktoken import Encoding

from qvl_runtime.demo.conversations import Exchange, ask
from qvl_runtime.demo.scenes import COLORS, SHAPES, Scene, random_scene


class Writer:
    """Turns conversations into ids the way the runtime's prompt builder does."""

    def __init__(self, encoding: Encoding, n_queries: int):
        self.encoding, self.n_queries = encoding, n_queries
        self.newline, self.image_start = self.text("\n"), self.text("<img>")[0]
        self.names = {i: encoding.decode_single_token_bytes(i) for i in range(encoding.max_token_value + 1)}
        self.user = self.text("<|im_start|>") + self.text("user") + self.newline
        self.assistant = self.text("<|im_start|>") + self.text("assistant") + self.newline
        self.end, self.stop = self.text("<|im_end|>"), self.text("<|endoftext|>")

    def text(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def prefix(self, pictures: int, raw: bool) -> list[int]:
        """Everything before the first question."""
        slot = f"<img>{'<imgpad>' * self.n_queries}</img>\n"
        ids = self.text("".join(f"Picture {i + 1}: {slot}" for i in range(pictures)))
        if raw:
            return ids
        head = self.text("<|im_start|>") + self.text("system") + self.newline
        head += self.text("You are a helpful assistant.") + self.end + self.newline
        return head + self.user + ids

    def branch(self, exchange: Exchange, raw: bool) -> tuple[list[int], np.ndarray, list[int]]:
        """The ids of a conversation after the prefix, the weight of predicting each, float64, and where answers begin.

        An answer has the weight 1, or 6 if it reads text, of which no character is easy to guess. The first digits of a
        box's numbers share another 1.5, the second digits 0.5: they determine the thing, and would hardly count among
        the many tokens that are easy to guess.
        """
        ids, wanted, begins = [], [], []
        for i, (question, answer) in enumerate(exchange.turns):
            if raw:
                asked, told = self.text(question), self.newline + self.text(answer) + self.stop
            else:
                again = self.newline + self.user if i else []
                asked = again + self.text(question) + self.end + self.newline + self.assistant
                told = self.text(answer) + self.end
            begins.append(len(ids) + len(asked) + raw)
            ids += asked + told
            wanted += [False] * len(asked) + [True] * len(told)
        weight = np.array(wanted) / sum(wanted) * (6 if exchange.skill == "read" else 1)
        places = np.array([self.digit(ids, i) if w else -1 for i, w in enumerate(wanted)])
        for place, share in ((0, 1.5), (1, 0.5)):
            digits = places == place
            if digits.any():
                weight += digits * share / digits.sum()
        return ids, weight, begins

    def digit(self, ids: list[int], i: int) -> int:
        """The place of token i in a box's number, -1 if it is in none."""
        begin = i
        while self.names[ids[begin]].isdigit():
            begin -= 1
        return i - begin - 1 if self.names[ids[begin]][-1:] in (b"(", b",") else -1


def random_scenes(rng: np.random.Generator, options: dict) -> list[Scene]:
    """One picture, or two or three that share a few kinds of shapes."""
    if rng.random() < 0.83:
        return [random_scene(rng, text_share=0.5, **options)]
    kinds = [(str(s), str(c)) for s in rng.choice(SHAPES, 3) for c in rng.choice(list(COLORS), 3)]
    count = 2 if rng.random() < 0.75 else 3
    return [random_scene(rng, 4, 0.0, kinds, **options) for _ in range(count)]


class Rows:
    """Endless batches of rows, from one seed.

    A batch: ids, positions, segment (0 prefix, 1.. branches, -1 padding), weight of predicting each token [B, T];
    pixels uint8 [N, 3, S, S] and cell targets of all its pictures, and of two more pictures a row without
    questions; `where` and `cells` of `gaze.loss` and of `gaze.counting_loss`; the exchanges of every row.
    """

    def __init__(self, writer: Writer, seed: int, batch: int, length: int, size: int, grid: int, level: str):
        self.writer, self.seed, self.batch, self.length = writer, seed, batch, length
        self.size, self.grid, self.options = size, grid, scene_options(level)

    def row(self, rng: np.random.Generator) -> tuple[np.ndarray, list[Scene], list[Exchange], list, list]:
        scenes = random_scenes(rng, self.options)
        raw = len(scenes) == 1 and rng.random() < 0.2
        prefix = self.writer.prefix(len(scenes), raw)
        starts = [i + 1 for i, t in enumerate(prefix) if t == self.writer.image_start]
        columns = [(t, i, 0, 0.0) for i, t in enumerate(prefix)]
        exchanges: list[Exchange] = []
        gazes, tallies = [], []
        failures, asked = 0, set()
        while failures < 12:
            exchange = ask(rng, scenes)
            if exchange is None or exchange.turns in asked or (raw and len(exchange.turns) > 1):
                failures += 1
                continue
            asked.add(exchange.turns)
            ids, weight, begins = self.writer.branch(exchange, raw)
            if len(columns) + len(ids) > self.length:
                failures += 3
                continue
            exchanges.append(exchange)
            for turn, i, picture, head, cells in looks(exchange, scenes, self.grid, self.writer.encoding):
                gazes.append((len(columns) + begins[turn] + i - 1, starts[picture], HEADS[head], cells))
            tally = counted(exchange, scenes, self.grid)
            if tally:
                tallies.append((len(columns) + begins[0] - 1, starts[tally[0]], tally[1]))
            columns += [(t, len(prefix) + i, len(exchanges), w) for i, (t, w) in enumerate(zip(ids, weight))]
        columns += [(0, 0, -1, 0.0)] * (self.length - len(columns))
        return np.array(columns).T, scenes, exchanges, gazes, tallies

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        while True:
            rows = [self.row(rng) for _ in range(self.batch)]
            scenes = [s for row in rows for s in row[1]]
            scenes += [random_scene(rng, text_share=0.7, **self.options) for _ in range(2 * self.batch)]
            table = np.stack([row[0] for row in rows])
            sides = rng.choice(DRAWN_AT, len(scenes), p=(0.3, 0.3, 0.19, 0.19, 0.02))
            gazes = [(i, *gaze) for i, row in enumerate(rows) for gaze in row[3]]
            tallies = [(i, *tally) for i, row in enumerate(rows) for tally in row[4]]
            yield (
                *(torch.from_numpy(table[:, i].astype(np.int64)) for i in range(3)),
                torch.from_numpy(table[:, 3].astype(np.float32)),
                torch.from_numpy(np.stack([pixels_of(s, self.size, int(d)) for s, d in zip(scenes, sides)])),
                torch.from_numpy(np.stack([cell_targets(s, self.grid) for s in scenes])),
                torch.tensor([g[:4] for g in gazes]),
                torch.from_numpy(np.stack([g[4] for g in gazes])),
                torch.tensor([t[:3] for t in tallies]).view(-1, 3),
                torch.from_numpy(np.array([t[3] for t in tallies], np.float32)).view(-1, self.grid**2),
                [row[2] for row in rows],
            )


def attention_mask(segment: torch.Tensor) -> torch.Tensor:
    """Additive bfloat16 [B, 1, T, T]: 0 where a row may look, -inf elsewhere."""
    length = segment.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    same = (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
    return torch.zeros(same.shape, dtype=torch.bfloat16, device=segment.device).masked_fill(
        ~(same & before), float("-inf")
    )[:, None]
