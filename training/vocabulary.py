"""The demo model's vocabulary: byte pairs learned from the generator's own sentences, in qwen.tiktoken's format.

python training/vocabulary.py OUT/qwen.tiktoken
"""

from __future__ import annotations

import base64
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken
from lexicon import HANZI

from qvl_runtime.demo.conversations import ask
from qvl_runtime.demo.scenes import random_scene

RANKS = 768
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
)  # fmt: skip


def pieces(seed: int) -> Counter[bytes]:
    """Split pieces of the generator's sentences with their counts, without printed strings."""
    rng = np.random.default_rng(seed)
    counts: Counter[bytes] = Counter()
    fixed = "system\nYou are a helpful assistant.\nuser\nassistant\nPicture 1: Picture 2: \n"
    tags = regex.compile("|".join(regex.escape(s) for s in SPECIAL))
    for i in range(6000):
        scenes = [random_scene(rng, text_share=0) for _ in range(1 + i % 5 // 4)]
        exchange = ask(rng, scenes)
        turns = exchange.turns if exchange else ()
        for text in (fixed, *(t for turn in turns for t in turn)):
            for plain in tags.split(text):
                counts.update(p.encode() for p in regex.findall(PATTERN, plain))
    return counts + Counter({char.encode(): 200 for char in HANZI})


def learn(counts: Counter[bytes], size: int) -> list[bytes]:
    """Byte pair encoding: the 256 bytes, then repeatedly the most frequent pair (ties: the smaller bytes)."""
    tokens = [bytes([i]) for i in range(256)]
    words = {word: [bytes([b]) for b in word] for word in counts}
    while len(tokens) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            raise SystemExit(f"the sentences give only {len(tokens)} tokens, {size} wanted")
        left, right = min(pairs, key=lambda p: (-pairs[p], p))
        tokens.append(left + right)
        for word, parts in words.items():
            merged, i = [], 0
            while i < len(parts):
                if parts[i : i + 2] == [left, right]:
                    merged.append(left + right)
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            words[word] = merged
    return tokens


def read(path: Path) -> tiktoken.Encoding:
    """The vocabulary with the special tokens after its ranks."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {text: len(ranks) + i for i, text in enumerate(SPECIAL)}
    return tiktoken.Encoding("demo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def main() -> None:
    tokens = learn(pieces(seed=0), RANKS)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    Path(sys.argv[1]).write_bytes(b"".join(lines))


if __name__ == "__main__":
    main()
