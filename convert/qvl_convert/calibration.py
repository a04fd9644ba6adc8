"""Calibration data: conversations with pictures, whose activations tell which weights matter.

Sources: Qwen-VL's fine-tuning JSON (a list of ``{"id", "conversations": [{"from", "value"}]}`` with
``Picture 1: <img>path</img>``), chat messages (``{"messages": [{"role", "content"}]}``, whose content may be a list of
parts as Hugging Face's and OpenAI's), the same objects one a line (JSON lines; ``{"text": …}`` is plain text there), a
folder of pictures (a caption in ``NAME.txt`` beside ``NAME.png``), or "builtin": scenes with shapes and print drawn by
the package, questions and answers about them, and passages of text, in English and Chinese.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from qvl_runtime.demo.conversations import ask
from qvl_runtime.demo.scenes import draw, random_scene
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_json
from qvl_runtime.file.opening import as_path, read_regular
from qvl_runtime.inputs.images import ImageSource, load_image
from qvl_runtime.inputs.prompt import build_prompt
from qvl_runtime.inputs.tokenizer import Tokenizer, split_images

log = logging.getLogger(__name__)

BUILTIN = "builtin"
FORM = "see Qwen-VL's fine-tuning format"
MAX_BAD = 10
MAX_DATA, MAX_CAPTION = 256 << 20, 1 << 20
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
WORDS = ("OPEN", "EXIT", "Hello", "Coffee", "Sale 50%", "Platform 9", "No. 12", "Paris", "STOP", "Menu", "Bus 42")

Turn = tuple[str, str]
"""A role ("system", "user", "assistant") and what is said."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One conversation or text.

    Attributes
    ----------
    ids : list of int
        With an image slot for each picture.
    images : list of image sources
        One for each slot, in order.
    asked : int
        How many of the ids come before the last answer; 0 where nothing is asked.
    """

    ids: list[int]
    images: list[ImageSource]
    asked: int = 0


def load(
    source: str | Path, tokenizer: Tokenizer, *, chat: bool, count: int = 32, max_tokens: int = 1024, seed: int = 0
) -> list[Sample]:
    """Read calibration data.

    Parameters
    ----------
    source : str or Path
        "builtin", or a file or folder as the module describes.
    tokenizer : Tokenizer
    chat : bool
        Whether the model knows chat turns; else conversations become plain text.
    count : int
        Samples to take, at random where there are more.
    max_tokens : int
        Longer samples are cut, before a picture rather than inside its slot.
    seed : int

    Raises
    ------
    QvlError
        When nothing can be read, more than `MAX_BAD` samples are bad (each is named and skipped), or none is left.
    """
    rng, source = np.random.default_rng(seed), as_path(source)
    for name, value in (("count", count), ("max_tokens", max_tokens)):
        if type(value) is not int or value < 1:
            raise QvlError(f"{name} is {value!r}; expected 1 or more")
    if str(source) == BUILTIN:
        found = _builtin(rng, count, pictures=tokenizer.has_image_tags)
    else:
        found = list(_read(source))
        found = [found[i] for i in rng.permutation(len(found))]
    samples, bad = [], 0
    for name, turns, images in found:
        if len(samples) == count:
            break
        try:
            samples.append(_cut(_sample(turns, images, _root(source), tokenizer, chat), max_tokens, tokenizer))
        except QvlError as error:
            bad += 1
            log.warning("%s: skipped: %s", name, error)
            if bad > MAX_BAD:
                raise QvlError(f"{source}: more than {MAX_BAD} bad samples, the last is {name}: {error}") from None
    if not samples:
        raise QvlError(f"{source}: holds no usable sample; expected conversations, texts or pictures")
    return samples


def digest(samples: list[Sample]) -> str:
    """A short hash of ids and pictures, by which an interrupted conversion knows its data again."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(np.array(sample.ids, np.int32).tobytes())
        for image in sample.images:
            total.update(load_image(image).tobytes())
    return total.hexdigest()[:32]


Found = tuple[str, list[Turn] | str, list[ImageSource]]
"""A name for messages, turns or a plain text, and pictures for its empty ``<img></img>``."""


def _root(source: Path) -> Path:
    return source if os.path.isdir(source) else source.parent


def _read(path: Path) -> Iterator[Found]:
    if os.path.isdir(path):
        yield from _read_folder(path)
        return
    remedy = "give a JSON file or a folder"
    content = read_regular(path, limit=MAX_DATA, remedy=remedy)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QvlError(f"{path}: cannot be read as calibration data ({error}); {remedy}") from None
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        for name, line in lines:
            yield name, *_entry(parse_json(line, f"{name}:", FORM))
        return
    entries = parse_json(text, f"{path}:", FORM)
    if not isinstance(entries, list):
        raise QvlError(f"{path}: holds no list of conversations; {FORM}")
    for number, entry in enumerate(entries, 1):
        label = entry.get("id", number) if isinstance(entry, dict) else number
        yield f"{path}, sample {label}", *_entry(entry)


def _entry(entry: Any) -> tuple[list[Turn] | str, list[ImageSource]]:
    """Turns or text of one object; what is wrong with it is found when it is made into a sample."""
    entry = entry if isinstance(entry, dict) else {}
    if isinstance(entry.get("text"), str):
        return entry["text"], []
    conversation = entry.get("conversations", entry.get("messages"))
    turns: list[Turn] = []
    images: list[ImageSource] = []
    for turn in conversation if isinstance(conversation, list) else []:
        turn = turn if isinstance(turn, dict) else {}
        who, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        turns.append((SPEAKERS.get(str(who).lower(), str(who)), _said(said, images)))
    return turns, images


def _said(said: Any, images: list[ImageSource]) -> Any:
    """A list of parts as text with empty image slots, whose pictures go to `images`; all else as it is."""
    if not isinstance(said, list):
        return said
    texts = []
    for part in said:
        part = part if isinstance(part, dict) else {}
        source = next((part[key] for key in ("image", "image_url", "url") if key in part), None)
        source = source.get("url") if isinstance(source, dict) else source
        if isinstance(source, str):
            images.append(source)
            texts.append(f"Picture {len(images)}: <img></img>\n")
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return None
    return "".join(texts)


def _read_folder(folder: Path) -> Iterator[Found]:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not paths:
        raise QvlError(f"{folder}: holds no pictures ({', '.join(PICTURES)})")
    for i, path in enumerate(paths):
        question = ("Describe the picture.", "描述这张图。")[i % 2]
        turns = [("user", f"Picture 1: <img></img>\n{question}")]
        caption = path.with_suffix(".txt")
        if os.path.lexists(caption):
            said = read_regular(caption, limit=MAX_CAPTION, remedy="a caption is a text file beside its picture")
            turns.append(("assistant", said.decode("utf-8", "replace").strip()))
        yield str(path), turns, [path]


def _builtin(rng: np.random.Generator, count: int, *, pictures: bool) -> list[Found]:
    """Two samples with pictures to one of text."""
    passages = (files(__package__) / "passages.txt").read_text(encoding="utf-8").strip().split("\n\n")
    order = rng.permutation(len(passages))
    found: list[Found] = []
    for i in range(count):
        if pictures and i % 3 != 2:
            found.append((f"builtin picture {i}", *_drawn(rng, 1 + (i % 6 == 4))))
        else:
            chosen = [passages[order[(3 * i + j) % len(passages)]] for j in range(3)]
            found.append((f"builtin text {i}", "\n\n".join(chosen), []))
    return found


def _drawn(rng: np.random.Generator, pictures: int) -> tuple[list[Turn], list[ImageSource]]:
    scenes = [random_scene(rng, words=WORDS, shares=(0.3, 0.2, 0.5, 0.0)) for _ in range(pictures)]
    exchanges = [exchange for _ in range(40) if (exchange := ask(rng, scenes)) is not None][:8]
    if pictures == 1 and (last := ask(rng, scenes, ("find", "ground")[int(rng.integers(2))])) is not None:
        exchanges[-1] = last
    slots = "".join(f"Picture {n}: <img></img>\n" for n in range(1, pictures + 1))
    spoken = [turn for exchange in exchanges for turn in exchange.turns]
    turns = [turn for question, answer in spoken for turn in (("user", question), ("assistant", answer))]
    turns[0] = ("user", slots + turns[0][1])
    return turns, [draw(scene, 448) for scene in scenes]


def _sample(turns: list[Turn] | str, images: list[ImageSource], root: Path, tokenizer: Tokenizer, chat: bool) -> Sample:
    images = [_from(root, image) for image in images]
    if isinstance(turns, str):
        turns = _resolve(turns, root, tokenizer)
        prompt = build_prompt(turns, images, tokenizer, chat=chat)
        return _checked(Sample(prompt.ids, prompt.images))
    for role, said in turns:
        if role not in SPEAKERS.values() or not isinstance(said, str):
            raise QvlError(f"a turn is {role!r}: {str(said)[:40]!r}; expected 'user' or 'assistant' and a text")
    if not any(role == "user" for role, _ in turns):
        raise QvlError("has no 'conversations' with a turn of the user")
    turns = [(role, _resolve(said, root, tokenizer)) for role, said in turns]
    answer = turns.pop()[1] if turns[-1][0] == "assistant" else None
    if chat:
        prompt = build_prompt([{"role": r, "content": said} for r, said in turns], images, tokenizer, chat=True)
        tail = [] if answer is None else [*tokenizer.encode_chat(answer), tokenizer.im_end_id]
    else:
        prompt = build_prompt("\n".join(said for _, said in turns) + "\n", images, tokenizer, chat=False)
        tail = [] if answer is None else tokenizer.encode(answer)
    return _checked(Sample(prompt.ids + tail, prompt.images, len(prompt.ids)))


def _resolve(text: str, root: Path, tokenizer: Tokenizer) -> str:
    """Paths of pictures that are relative to the data's folder, made good from here."""
    if not tokenizer.has_image_tags:
        return text
    pieces = [_from(root, piece) if i % 2 else piece for i, piece in enumerate(split_images(text))]
    return "".join(f"<img>{piece}</img>" if i % 2 else piece for i, piece in enumerate(pieces))


def _from(root: Path, source: ImageSource) -> ImageSource:
    """A path that is relative to the data's folder, made good from here."""
    if not isinstance(source, str) or not source or os.path.exists(source) or not os.path.exists(root / source):
        return source
    return str(root / source)


def _checked(sample: Sample) -> Sample:
    """Pictures that cannot be read are found now, not hours later."""
    for image in sample.images:
        load_image(image)
    return sample


def _cut(sample: Sample, max_tokens: int, tokenizer: Tokenizer) -> Sample:
    if len(sample.ids) <= max_tokens:
        return sample
    starts = [i for i, token in enumerate(sample.ids) if token == tokenizer.img_start_id]
    split = [start for start in starts if start < max_tokens < start + tokenizer.n_queries + 2]
    end = split[0] if split else max_tokens
    images = sample.images[: sum(start < end for start in starts)]
    kept = Sample(sample.ids[:end], images, sample.asked if sample.asked <= end else 0)
    if not kept.ids:
        raise QvlError(f"its first picture does not fit into {max_tokens} tokens")
    return kept
