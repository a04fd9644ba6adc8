"""Every form of prompt becomes ids with image slots, and the pictures for the slots in order."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.grounding import Box, format_box
from qvl_runtime.inputs.images import ImageSource, is_url, refuse_url
from qvl_runtime.inputs.tokenizer import Tokenizer, split_images

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes
    ----------
    ids : list of int
        Every picture takes a slot: ``<img>``, n_queries positions that its features replace, ``</img>``.
    images : list of image sources
        As `load_image` takes them, one for every slot, in order.
    left_out : int
        Turns of the history, from the oldest on, that there was no room for.
    """

    ids: list[int]
    images: list[ImageSource]
    left_out: int = 0


@dataclasses.dataclass
class _Slot:
    """A place for a picture; the source is None until `_fill` finds one for it."""

    source: ImageSource | None


_Parts = list[str | _Slot]


def build_prompt(
    prompt: Any,
    images: Sequence[ImageSource] | None,
    tokenizer: Tokenizer,
    *,
    chat: bool,
    allow_urls: bool = False,
) -> Prompt:
    """Make a prompt of any form ready for the model.

    Parameters
    ----------
    prompt : str, list of dict, or sequence of int
        - a text, taken as it is, with pictures as ``<img>path</img>``;
        - the list format: pieces ``{"image": source}``, ``{"text": str}``, ``{"ref": str, "box": box or boxes}``; a
          picture becomes ``Picture N: <img>…</img>`` and a line end;
        - chat messages: ``{"role": "system" | "user" | "assistant", "content": text or pieces}``, where a piece may
          also be OpenAI's ``{"type": "image_url", "image_url": {"url": …}}``; the last message is the user's;
        - token ids, with image slots.
    images : sequence of image sources, optional
        For the empty slots (``<img></img>``, or those in the ids) in order. If the prompt has no image, they go
        before it (or before the last message) as ``Picture N: <img></img>`` and a line end.
    tokenizer : Tokenizer
    chat : bool
        Whether the model knows chat messages.
    allow_urls : bool
        Whether http(s) URLs are accepted as sources.

    Raises
    ------
    QvlError
        A form, role, piece or box that is not one of the above, an unclosed ``<img>``, more or fewer images than
        slots, a URL that is not allowed, messages for a base model, images for a model without vision.
    """
    images = _checked_images(images)
    if _is_ids(prompt):
        made = _from_ids(prompt, images, tokenizer)
    elif _is_messages(prompt):
        if not chat:
            raise QvlError("this is a base model, which knows no chat messages: pass the prompt as one str")
        made = _from_messages(prompt, images, tokenizer)
    else:
        parts = _read(prompt, tokenizer)
        parts = _fill([parts], images, tokenizer)[-1]
        made = Prompt(tokenizer.encode(_text(parts, empty=True)), _sources(parts))
    return _check_urls(made, allow_urls)


def build_chat(
    tokenizer: Tokenizer,
    query: Any,
    history: Sequence[tuple[Any, str | None]] | None = None,
    images: Sequence[ImageSource] | None = None,
    *,
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = 6144,
    max_tokens: int | None = None,
    block: int = 1,
    allow_urls: bool = False,
) -> tuple[Prompt, Any]:
    """Make the prompt for one more turn of a conversation.

    Parameters
    ----------
    tokenizer : Tokenizer
    query : str or list of dict
        The user's turn: a text or pieces, as in `build_prompt`.
    history : sequence of (query, answer), optional
        Earlier turns, oldest first; an answer may be None.
    images : sequence of image sources, optional
        For the empty slots of history and query in order; if the query has no image, what is left goes before it.
    system : str
    max_window_size : int
        Turns are kept from the newest back while system, kept turns and the next one together have fewer tokens
        than this. The query is not counted, and always kept.
    max_tokens : int, optional
        Turns also leave where the whole prompt, with the query, would have more tokens than this.
    block : int
        Turns leave in blocks of at least so many tokens: then the prompts of the next turns begin alike, and what was
        computed for one serves the others. 1 is the published rule, after which every prompt begins differently.
    allow_urls : bool
        Whether http(s) URLs are accepted as sources.

    Returns
    -------
    Prompt
    str or list of dict
        The query for the next call's history: a text if every picture in it has a path or URL, else pieces.

    Raises
    ------
    QvlError
        As `build_prompt`.
    """
    images = _checked_images(images)
    spoken, turns = [_read(system, tokenizer)], []
    for turn in history or ():
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise QvlError(f"a turn of the history must be a pair (query, answer), not {turn!r:.80}")
        asked = _read(turn[0], tokenizer, _count_slots(spoken))
        answered = None if turn[1] is None else _read(turn[1], tokenizer)
        turns.append((asked, answered))
        spoken += [asked, answered or []]
    spoken.append(_read(query, tokenizer, _count_slots(spoken)))
    asking = _fill(spoken, images, tokenizer)[-1]

    newline = Prompt(tokenizer.encode_ordinary("\n"), [])
    first = _say(tokenizer, "system", spoken[0])
    last = _join([newline, _say(tokenizer, "user", asking), _answer_head(tokenizer)])
    said = []
    for asked, answered in turns:
        answer = [] if answered is None else [_say(tokenizer, "assistant", answered)]
        said.append(_join([newline, _say(tokenizer, "user", asked), newline, *answer]))
    room = math.inf if max_tokens is None else max_tokens - len(last.ids)
    left_out = _turns_that_leave([len(turn.ids) for turn in said], len(first.ids), max_window_size, room, block)
    prompt = dataclasses.replace(_join([first, *said[left_out:], last]), left_out=left_out)
    return _check_urls(prompt, allow_urls), _for_history(query, asking)


def _turns_that_leave(lengths: list[int], size: int, max_window_size: int, room: float, block: int) -> int:
    """How many turns, from the oldest on; `size` tokens come before them. See `build_chat`."""
    kept = 0
    for length in reversed(lengths):
        size += length
        if size >= max_window_size or size > room:
            break
        kept += 1
    left_out = len(lengths) - kept
    tokens = sum(lengths[:left_out])
    wanted = math.ceil(tokens / block) * block
    while tokens < wanted and left_out < len(lengths) - 1:
        tokens += lengths[left_out]
        left_out += 1
    return left_out


def list_to_text(pieces: Sequence[Mapping[str, Any]]) -> str:
    """Write the list format as text, with the paths of its pictures between their tags.

    Examples
    --------
    >>> list_to_text([{"image": "a.png"}, {"ref": "dog", "box": [1, 2, 3, 4]}, {"text": "?"}])
    'Picture 1: <img>a.png</img>\\n<ref>dog</ref><box>(1,2),(3,4)</box>?'
    """
    return _text(_from_pieces(pieces, 0))


def _read(content: Any, tokenizer: Tokenizer, pictures_before: int = 0) -> _Parts:
    """A text or a list of pieces as text and slots."""
    pieces = [content] if isinstance(content, str) else _from_pieces(content, pictures_before)
    parts: _Parts = []
    for is_text, group in itertools.groupby(pieces, lambda piece: isinstance(piece, str)):
        if not is_text:
            parts += group
        elif tokenizer.has_image_tags:
            split = split_images("".join(group))
            parts += [_Slot(piece or None) if i % 2 else piece for i, piece in enumerate(split)]
        else:
            parts.append("".join(group))
    return parts


def _from_pieces(pieces: Any, pictures_before: int) -> _Parts:
    if not isinstance(pieces, Sequence) or isinstance(pieces, bytes):
        raise QvlError(
            f"a prompt must be a str, a list of pieces or messages, or token ids, not {type(pieces).__name__}"
        )
    parts: _Parts = []
    number = pictures_before
    for piece in pieces:
        if not isinstance(piece, Mapping):
            raise QvlError(f"a piece of a prompt must be a dict, not {piece!r:.80}")
        if "image" in piece or "image_url" in piece:
            number += 1
            parts += [f"Picture {number}: ", _Slot(_piece_source(piece)), "\n"]
        elif "text" in piece:
            if not isinstance(piece["text"], str):
                raise QvlError(f"the text of a piece must be a str, not {type(piece['text']).__name__}")
            parts.append(piece["text"])
        elif "box" in piece:
            parts += map(format_box, _piece_boxes(piece))
        else:
            raise QvlError(f"a piece of a prompt needs 'text', 'image', 'image_url' or 'box'; found {piece!r:.80}")
    return parts


def _piece_source(piece: Mapping[str, Any]) -> ImageSource | None:
    source = piece["image"] if "image" in piece else piece["image_url"]
    if isinstance(source, Mapping):
        source = source.get("url")
    return None if isinstance(source, str) and not source else source


def _piece_boxes(piece: Mapping[str, Any]) -> list[Box]:
    boxes = piece["box"]
    try:
        corners = np.array(boxes, np.float64)
        corners = corners.reshape(1, 4) if corners.ndim == 1 else corners
        if corners.shape != (len(corners), 4) or not ((corners >= 0) & (corners <= 1000)).all():
            raise ValueError
    except (TypeError, ValueError):
        raise QvlError(
            f"a box is [x1, y1, x2, y2] in thousandths of the picture, 0 to 999; found {boxes!r:.80}"
        ) from None
    refs = itertools.chain([piece.get("ref")], itertools.repeat(None))
    return [Box(ref, *map(math.trunc, corner)) for ref, corner in zip(refs, corners)]


def _count_slots(spoken: Sequence[_Parts]) -> int:
    return sum(isinstance(part, _Slot) for parts in spoken for part in parts)


def _fill(spoken: list[_Parts], images: list[ImageSource], tokenizer: Tokenizer) -> list[_Parts]:
    """Give the empty slots their pictures; those left over go before the last text, if that has no picture."""
    slots = [part for parts in spoken for part in parts if isinstance(part, _Slot)]
    if not tokenizer.has_image_tags and (slots or images):
        raise QvlError("this model has no vision part: it takes no images")
    empty = [slot for slot in slots if slot.source is None]
    extra = images[len(empty) :]
    if len(images) < len(empty) or (extra and _count_slots(spoken[-1:])):
        raise QvlError(
            f"the prompt has {len(empty)} empty image slots (<img></img>), but images has {len(images)}: "
            "give one image for each"
        )
    for slot, image in zip(empty, images):
        slot.source = image
    numbered = enumerate(extra, len(slots) + 1)
    before = [part for n, image in numbered for part in (f"Picture {n}: ", _Slot(image), "\n")]
    return [*spoken[:-1], before + spoken[-1]]


def _text(parts: _Parts, *, empty: bool = False) -> str:
    """The parts as text; `empty` leaves the paths out, so that any source makes a slot."""
    shown = [part if isinstance(part, str) else "" if empty else part.source or "" for part in parts]
    return "".join(f"<img>{s}</img>" if isinstance(part, _Slot) else s for part, s in zip(parts, shown))


def _sources(parts: _Parts) -> list[ImageSource]:
    return [part.source for part in parts if isinstance(part, _Slot)]


def _for_history(query: Any, parts: _Parts) -> Any:
    sources = _sources(parts)
    if all(isinstance(source, str | Path) for source in sources):
        return _text(parts)
    if isinstance(query, str) and "<img>" not in query:
        return [*({"image": source} for source in sources), {"text": query}]
    return query


def _say(tokenizer: Tokenizer, role: str, parts: _Parts) -> Prompt:
    """One turn: role, line end and content are encoded separately, as in training."""
    content = tokenizer.encode_chat(_text(parts, empty=True))
    head = [tokenizer.im_start_id, *tokenizer.encode_ordinary(role), *tokenizer.encode_ordinary("\n")]
    return Prompt([*head, *content, tokenizer.im_end_id], _sources(parts))


def _answer_head(tokenizer: Tokenizer) -> Prompt:
    newline = tokenizer.encode_ordinary("\n")
    return Prompt([*newline, tokenizer.im_start_id, *tokenizer.encode_ordinary("assistant"), *newline], [])


def _join(prompts: Sequence[Prompt]) -> Prompt:
    return Prompt([i for p in prompts for i in p.ids], [image for p in prompts for image in p.images])


def _from_messages(messages: Sequence[Mapping[str, Any]], images: list[ImageSource], tokenizer: Tokenizer) -> Prompt:
    roles = [message.get("role") for message in messages]
    for number, role in enumerate(roles):
        if role not in ROLES:
            raise QvlError(f"message {number + 1} has the role {role!r}: it must be one of {', '.join(ROLES)}")
        if role == "system" and number > 0:
            raise QvlError(f"message {number + 1} has the role 'system': only the first message may")
    if roles[-1] != "user":
        raise QvlError(f"the last message has the role {roles[-1]!r}: it must be the user's, who waits for an answer")
    spoken: list[_Parts] = []
    if roles[0] != "system":
        roles.insert(0, "system")
        spoken.append([DEFAULT_SYSTEM])
    for message in messages:
        content = message.get("content")
        spoken.append(_read("" if content is None else content, tokenizer, _count_slots(spoken)))
    spoken = _fill(spoken, images, tokenizer)
    newline = Prompt(tokenizer.encode_ordinary("\n"), [])
    turns = [_say(tokenizer, role, parts) for role, parts in zip(roles, spoken)]
    separated = [prompt for turn in turns for prompt in (newline, turn)][1:]
    return _join([*separated, _answer_head(tokenizer)])


def _from_ids(ids: Any, images: list[ImageSource], tokenizer: Tokenizer) -> Prompt:
    ids = [int(i) for i in ids]
    for i in ids:
        tokenizer.token_bytes(i)  # refuses an id outside the vocabulary
    if images and not tokenizer.has_image_tags:
        raise QvlError("this model has no vision part: it takes no images")
    starts = [position for position, i in enumerate(ids) if i == tokenizer.img_start_id]
    paths = []
    for start in starts:
        end = start + 1 + tokenizer.n_queries
        slot = ids[start + 1 : end]
        if ids[end : end + 1] != [tokenizer.img_end_id] or tokenizer.img_end_id in slot:
            raise QvlError(
                f"the image slot at position {start} must be <img>, {tokenizer.n_queries} ids, </img>; "
                "take the ids from tokenizer.encode"
            )
        paths.append(tokenizer.decode(ids[start : end + 1])[len("<img>") : -len("</img>")])
    # The published tokenizer writes the path into the slot; with its ids no images are needed.
    sources = list(images) if images or not all(paths) else paths
    if len(sources) != len(starts):
        raise QvlError(
            f"the token ids have {len(starts)} image slots, but images has {len(sources)}: give one for each"
        )
    return Prompt(ids, sources)


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise QvlError(f"token ids must be a 1-D array of integers, not {prompt.dtype} {list(prompt.shape)}")
        return True
    return _all_are(int | np.integer, prompt)


def _is_messages(prompt: Any) -> bool:
    return _all_are(Mapping, prompt) and any("role" in message for message in prompt)


def _all_are(kind: Any, prompt: Any) -> bool:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        return False
    return bool(prompt) and all(isinstance(item, kind) for item in prompt)


def _checked_images(images: Any) -> list[ImageSource]:
    if isinstance(images, str | bytes | Path | Image.Image | np.ndarray):
        raise QvlError("images must be a list of images: write images=[image]")
    return list(images or ())


def _check_urls(prompt: Prompt, allow_urls: bool) -> Prompt:
    for source in prompt.images:
        if is_url(source) and not allow_urls:
            refuse_url(source)
    return prompt
