"""Calibration data: conversations with pictures, whose activations measure the importance of weights.

Sources: Qwen-VL's fine-tuning JSON (a list of ``{"id", "conversations": [{"from", "value"}]}`` with
``Picture 1: <img>path</img>``), chat messages (``{"messages": [{"role", "content"}]}``, whose content may be a list of
parts as Hugging Face's and OpenAI's), the same objects as JSON lines (where ``{"text": …}`` is plain text), a
folder of pictures (with captions in ``NAME.txt`` beside ``NAME.png``), or "builtin": drawn scenes with shapes and
printed text, questions and answers about them, and passages of text, in English and Chinese.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from qvl_runtime.demo.conversations import ask
from qvl_runtime.demo.scenes import draw, random_scene
from qvl_runtime.errors import QvlError
from qvl_runtime.families.base import Grounding, Prompts
from qvl_runtime.families.config import Config
from qvl_runtime.file.json_text import parse_json
from qvl_runtime.file.opening import as_path, read_regular, shown
from qvl_runtime.inputs.image_tags import split_images
from qvl_runtime.inputs.images import PICTURE_SUFFIXES, SUFFIXES, ImageSource
from qvl_runtime.inputs.pictures import LOCAL, Picture
from qvl_runtime.inputs.prompt import SOURCE_KEYS, Prompt, Slot
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.options import whole_number

log = logging.getLogger(__name__)

BUILTIN = "builtin"
FORM = "docs/models.md names the formats"
MAX_BAD = 10
MAX_DATA, MAX_CAPTION = 256 << 20, 1 << 20
SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
SIDE = 448
"""Pixels along each side of a drawn picture."""
BOX = re.compile(r"(?:<ref>([^<]*)</ref>)?<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
WORDS = ("OPEN", "EXIT", "Hello", "Coffee", "Sale 50%", "Platform 9", "No. 12", "Paris", "STOP", "Menu", "Bus 42")

Content = str | list[dict[str, Any]]
"""Text with ``<img>path</img>``, or parts of a message."""

Turn = tuple[str, Content]
"""A role ("system", "user", "assistant") and its content."""


class Speaker(Protocol):
    """A model or checkpoint that samples are built for."""

    @property
    def config(self) -> Config: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def prompts(self) -> Prompts: ...

    @property
    def grounding(self) -> Grounding: ...

    @property
    def is_chat(self) -> bool: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One conversation or text.

    Attributes
    ----------
    ids : list of int
    slots : list of Slot
        The pictures among the ids.
    asked : int
        Number of ids before the last answer; 0 without a question.
    """

    ids: list[int]
    slots: list[Slot]
    asked: int = 0

    @property
    def images(self) -> list[ImageSource]:
        """The sources of the pictures."""
        return [cast(ImageSource, slot.picture.content) for slot in self.slots]  # samples have no videos


def load(
    source: str | os.PathLike, speaker: Speaker, *, count: int = 32, max_tokens: int = 1024, seed: int = 0
) -> list[Sample]:
    """Read calibration data.

    Parameters
    ----------
    source : str or Path
        "builtin", or a file or folder as described above.
    speaker : Speaker
        For a base model, conversations become plain text.
    count : int
        Number of samples, chosen at random if there are more.
    max_tokens : int
        Limit of a sample, in addition to the window. Longer samples are truncated, not within a picture's slot.
    seed : int

    Raises
    ------
    QvlError
        If nothing can be read, more than `MAX_BAD` samples are invalid (each is logged and skipped), or none is left.
    """
    rng, source = np.random.default_rng(seed), as_path(source)
    check_count(count)
    max_tokens = min(whole_number("max_tokens", max_tokens, 1), speaker.config.max_position_embeddings)
    if str(source) == BUILTIN:
        found = _builtin(rng, count, speaker)
    else:
        found = list(_read(source))
        found = [found[i] for i in rng.permutation(len(found))]
    samples: list[Sample] = []
    bad = 0
    for name, turns in found:
        if len(samples) == count:
            break
        try:
            sample = _sample(turns, _root(source), speaker)
            if not sample.ids:
                raise QvlError("its text is empty")
            samples.append(_cut(sample, max_tokens))
        except QvlError as error:
            bad += 1
            log.warning("%s: skipped: %s", name, error)
            if bad > MAX_BAD:
                raise QvlError(f"{source}: more than {MAX_BAD} bad samples, the last is {name}: {error}") from None
    if not samples:
        raise QvlError(f"{source}: holds no usable sample; expected conversations, texts or pictures")
    return samples


def check_count(count: int) -> None:
    """Raise a QvlError for an impossible number of samples."""
    whole_number("the number of conversations", count, 1)


def digest(samples: list[Sample]) -> str:
    """Return a short hash of ids and pictures, with which a resumed conversion checks its data."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(np.array(sample.ids, np.int32).tobytes())
        for slot in sample.slots:
            total.update(slot.picture.key)
    return total.hexdigest()[:32]


Found = tuple[str, list[Turn] | str]
"""A name for log messages, and turns or plain text."""


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
        # not `splitlines`: a string of JSON may hold other ends of lines, such as U+2028
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                name = f"{shown(path)}, line {number}"
                yield name, _entry(parse_json(line, f"{name}:", FORM))
        return
    entries = parse_json(text, f"{path}:", FORM)
    if not isinstance(entries, list):
        raise QvlError(f"{path}: holds no list of conversations; {FORM}")
    for number, entry in enumerate(entries, 1):
        label = entry.get("id", number) if isinstance(entry, dict) else number
        yield f"{shown(path)}, sample {label!r:.60}", _entry(entry)


def _entry(entry: Any) -> list[Turn] | str:
    """Extract turns or text of one object; they are validated when the sample is built."""
    entry = entry if isinstance(entry, dict) else {}
    if isinstance(entry.get("text"), str):
        return entry["text"]
    conversation = entry.get("conversations", entry.get("messages"))
    turns: list[Turn] = []
    for turn in conversation if isinstance(conversation, list) else []:
        turn = turn if isinstance(turn, dict) else {}
        who, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        turns.append((SPEAKERS.get(str(who).lower(), str(who)), _said(said)))
    return turns


def _said(said: Any) -> Any:
    """Normalize a list of parts of any supported format to pictures and texts.

    Another value is returned as it is, and so is the first unknown part: `_sample` refuses it, and names it.
    """
    if not isinstance(said, list):
        return said
    parts: list[dict[str, Any]] = []
    for part in said:
        part = part if isinstance(part, dict) else {}
        source = next((part[key] for key in SOURCE_KEYS if part.get(key) is not None), None)
        source = source.get("url") if isinstance(source, dict) else source
        if isinstance(source, str):
            parts.append({"image": source})
        elif isinstance(part.get("text"), str):
            parts.append({"text": part["text"]})
        else:
            return part
    return parts


def _read_folder(folder: Path) -> Iterator[Found]:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise QvlError(f"{folder}: holds no pictures ({', '.join(SUFFIXES)}); name the folder that does")
    for i, path in enumerate(paths):
        question = ("Describe the picture.", "描述这张图。")[i % 2]
        turns: list[Turn] = [("user", [{"image": path}, {"text": question}])]
        caption = path.with_suffix(".txt")
        if os.path.lexists(caption):
            said = read_regular(caption, limit=MAX_CAPTION, remedy="a caption is a text file beside its picture")
            turns.append(("assistant", said.decode("utf-8", "replace").strip()))
        yield shown(path), turns


def _builtin(rng: np.random.Generator, count: int, speaker: Speaker) -> list[Found]:
    """Create samples: two with pictures for each of text."""
    picture = None
    if speaker.config.sees:
        blank = np.zeros((SIDE, SIDE, 3), np.uint8)
        picture = speaker.prompts.build([{"image": blank}], None, LOCAL).slots[0].picture
    passages = (files(__package__) / "passages.txt").read_text(encoding="utf-8").strip().split("\n\n")
    order = rng.permutation(len(passages))
    found: list[Found] = []
    for i in range(count):
        if picture is not None and i % 3 != 2:
            turns = _drawn(rng, 1 + (i % 6 == 4), lambda text: _with_boxes(text, speaker.grounding, picture))
            found.append((f"builtin picture {i}", turns))
        else:
            chosen = [passages[order[(3 * i + j) % len(passages)]] for j in range(3)]
            found.append((f"builtin text {i}", "\n\n".join(chosen)))
    return found


def _drawn(rng: np.random.Generator, pictures: int, noted: Callable[[str], str]) -> list[Turn]:
    scenes = [random_scene(rng, words=WORDS, shares=(0.3, 0.2, 0.5, 0.0)) for _ in range(pictures)]
    exchanges = [exchange for _ in range(40) if (exchange := ask(rng, scenes)) is not None][:8]
    if pictures == 1 and (last := ask(rng, scenes, ("find", "ground")[int(rng.integers(2))])) is not None:
        exchanges[-1] = last
    spoken = [turn for exchange in exchanges for turn in exchange.turns]
    turns: list[Turn] = [turn for q, answer in spoken for turn in (("user", noted(q)), ("assistant", noted(answer)))]
    turns[0] = "user", [*({"image": draw(scene, SIDE)} for scene in scenes), {"text": turns[0][1]}]
    return turns


def _with_boxes(text: str, grounding: Grounding, picture: Picture) -> str:
    """A text of the drawn scenes, whose boxes are written as Qwen-VL does, in a family's own notation."""

    def corners(found: re.Match[str]) -> list[float]:
        # The middle of a thousandth, which rounding leaves in it.
        return [(int(n) + 0.5) / 1000 * side for n, side in zip(found.group(2, 3, 4, 5), picture.size * 2)]

    found = list(BOX.finditer(text))
    if found and all(match[1] for match in found) and not BOX.sub("", text):
        return grounding.write([(match[1], corners(match)) for match in found], picture)
    return BOX.sub(lambda match: (match[1] or "") + grounding.mark(corners(match), picture), text)


def _sample(turns: list[Turn] | str, root: Path, speaker: Speaker) -> Sample:
    if isinstance(turns, str):
        return _without_pixels(speaker.prompts.build(_resolve(turns, root, speaker), None, LOCAL))
    for role, said in turns:
        if role not in SPEAKERS.values() or not isinstance(said, str | list):
            raise QvlError(f"a turn is {role!r:.40}: {str(said)[:40]!r}; expected 'user' or 'assistant' and a text")
    if not any(role == "user" for role, _ in turns):
        raise QvlError("has no 'conversations' with a turn of the user")
    answer = _text(turns[-1][1]) if turns[-1][0] == "assistant" else None
    asked = [(role, _resolve(said, root, speaker)) for role, said in (turns if answer is None else turns[:-1])]
    if speaker.is_chat:
        prompt = speaker.prompts.build([{"role": r, "content": said} for r, said in asked], None, LOCAL)
    else:
        said = [part for _, content in asked for part in (*_parts(content), {"text": "\n"})]
        prompt = speaker.prompts.build(said, None, LOCAL)
    return _without_pixels(prompt, [] if answer is None else speaker.prompts.answer(answer), asks=True)


def _text(content: Content) -> str:
    if not all("text" in part for part in _parts(content)):
        raise QvlError("an answer has a picture; expected a text")
    return "".join(part["text"] for part in _parts(content))


def _parts(content: Content) -> list[dict[str, Any]]:
    return [{"text": content}] if isinstance(content, str) else content


def _resolve(content: Content, root: Path, speaker: Speaker) -> Content:
    """Resolve picture paths, which are relative to the data's folder."""
    if isinstance(content, list):
        return [part | {"image": _from(root, part["image"])} if "image" in part else part for part in content]
    if not speaker.config.sees:
        return content
    pieces = [str(_from(root, piece)) if i % 2 else piece for i, piece in enumerate(split_images(content))]
    if "<img>" in speaker.tokenizer.special or len(pieces) == 1:
        return "".join(f"<img>{piece}</img>" if i % 2 else piece for i, piece in enumerate(pieces))
    return [{"image": piece} if i % 2 else {"text": piece} for i, piece in enumerate(pieces) if piece]


def _from(root: Path, source: ImageSource) -> ImageSource:
    """Resolve a path that is relative to the data's folder."""
    if not isinstance(source, str) or not source or os.path.exists(source) or not os.path.exists(root / source):
        return source
    return str(root / source)


def _without_pixels(prompt: Prompt, answer: Sequence[int] = (), *, asks: bool = False) -> Sample:
    """Create a sample. The pictures were read to find errors early; their pixels are computed when needed."""
    slots = [slot._replace(picture=dataclasses.replace(slot.picture, prepared=None)) for slot in prompt.slots]
    return Sample([*prompt.ids, *answer], slots, len(prompt.ids) if asks else 0)


def _cut(sample: Sample, max_tokens: int) -> Sample:
    if len(sample.ids) <= max_tokens:
        return sample
    # The tokens before and after a slot open and close it.
    split = [slot.start - 1 for slot in sample.slots if slot.start - 1 < max_tokens < slot.end + 1]
    end = split[0] if split else max_tokens
    slots = [slot for slot in sample.slots if slot.end <= end]
    kept = Sample(sample.ids[:end], slots, sample.asked if sample.asked <= end else 0)
    if not kept.ids:
        raise QvlError(f"its first picture does not fit into {max_tokens} tokens")
    return kept
