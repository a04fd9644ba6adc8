"""Prompts of Qwen-VL: raw text, the list format, chat messages and turns, token ids."""

from __future__ import annotations

import dataclasses
import itertools
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qvl_runtime.boxes import Box
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.grounding import GROUNDING, format_box
from qvl_runtime.families.qwen_vl.tokenizer import QwenTokenizer
from qvl_runtime.inputs.image_tags import IMAGE_TAGS, split_images
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import LOCAL, Access, Picture, Source
from qvl_runtime.inputs.prompt import (
    ChatPrompt,
    Parts,
    Place,
    Prompt,
    Slot,
    Window,
    checked_history,
    checked_images,
    checked_parts,
    count_places,
    fill,
    is_ids,
    is_image_part,
    is_messages,
    message_content,
    part_text,
    picture_place,
    sources,
    user_message,
)
from qvl_runtime.inputs.tokenizer import splittable
from qvl_runtime.inputs.video import Video

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
PICTURE_TAGS = frozenset({"<img>", "</img>", "<imgpad>"})


class _Encoded(NamedTuple):
    """Token ids, and the pictures in them: start and source of each."""

    ids: list[int]
    pictures: list[tuple[int, Source]]


@dataclasses.dataclass(frozen=True)
class QwenPrompts:
    """Builds prompts for Qwen-VL, Qwen-VL-Chat and Qwen-7B.

    Attributes
    ----------
    tokenizer : QwenTokenizer
    is_chat : bool
        Whether the model is a chat model.
    read : callable or None
        ``read(source, access)`` returns a picture; None for a text-only model.
    """

    tokenizer: QwenTokenizer
    is_chat: bool
    read: Callable[[Source, Access], Picture] | None

    def build(self, prompt: Any, images: Sequence[ImageSource] | None = None, access: Access = LOCAL) -> Prompt:
        """Build a prompt from any supported form.

        Parameters
        ----------
        prompt : str, list of dict, or sequence of int
            - raw text, with pictures as ``<img>path</img>``;
            - the list format: parts ``{"image": source}``, ``{"text": str}``, ``{"ref": str, "box": box or boxes}``; a
              picture becomes ``Picture N: <img>…</img>`` and a line end. For a chat model it is the user's turn;
            - chat messages: ``{"role": "system" | "user" | "assistant", "content": text or parts}``; the last message
              is not the assistant's;
            - token ids, with image slots.
        images : sequence of image sources, optional
            Images for the empty slots (``<img></img>``, or those in the ids), in order. If the prompt has no image,
            they are placed before it (or before the last message) as ``Picture N: <img></img>`` and a line end.

        Raises
        ------
        QvlError
            An unknown form, role, part or box, an unclosed ``<img>``, a wrong number of images, a picture that cannot
            be read or is not allowed, messages for a base model, or images for a text-only model.
        """
        images = checked_images(images)
        if is_ids(prompt):
            return self._prompt(self._from_ids(prompt, images), access)
        if is_messages(prompt):
            if not self.is_chat:
                raise QvlError("this is a base model, which knows no chat messages: pass the prompt as one str")
            return self._prompt(self._from_messages(prompt, images, access), access)
        if self.is_chat and not isinstance(prompt, str):
            return self._prompt(self._from_messages([user_message(prompt)], images, access), access)
        parts = self._fill([self._read(prompt, access)], images)[-1]
        opened = GROUNDING.opened(prompt) if isinstance(prompt, str) else ""
        return self._prompt(self._encode(parts, self._raw_forms(access)), access, opened)

    def chat(
        self,
        query: Any,
        history: Sequence[tuple[Any, str | None]] | None = None,
        images: Sequence[ImageSource] | None = None,
        *,
        system: str | None = None,
        window: Window,
        access: Access = LOCAL,
    ) -> ChatPrompt:
        """Build the prompt of the next turn of a conversation.

        Parameters
        ----------
        query : str or list of dict
            The user's turn: text or parts, as in `build`.
        history : sequence of (query, answer), optional
            Earlier turns, oldest first; an answer may be None. Answers are text: image tags in them are not opened.
        images : sequence of image sources, optional
            Images for the empty slots of history and query, in order. If the query has no image, the rest is placed
            before it.
        system : str, optional
            System prompt; `DEFAULT_SYSTEM` by default.

        Raises
        ------
        QvlError
            As for `build`.
        """
        turns = checked_history(history)
        spoken, pictures = [self._read(DEFAULT_SYSTEM if system is None else system, access)], 0
        for asked in [*(asked for asked, _ in turns), query]:
            pictures += count_places(spoken[-1:])
            spoken.append(self._read(asked, access, pictures))
        spoken = self._fill(spoken, checked_images(images))

        newline = _Encoded(self.tokenizer.encode_ordinary("\n"), [])
        user = self._user_forms(access)
        first = self._say("system", spoken[0], user)
        last = _join([newline, self._say("user", spoken[-1], user), self._answer_head()])
        said = []
        for asked, (_, answer) in zip(spoken[1:-1], turns):
            answered = [] if answer is None else [self._say("assistant", [answer], self._answer_forms())]
            said.append(_join([newline, self._say("user", asked, user), newline, *answered]))
        left_out = window.left_out(len(first.ids), [len(turn.ids) for turn in said], len(last.ids))
        prompt = self._prompt(_join([first, *said[left_out:], last]), access)
        return ChatPrompt(prompt, _for_history(query, spoken[-1], access), left_out)

    def answer(self, text: str) -> list[int]:
        """Encode an answer, including the token that ends it in a chat."""
        if self.is_chat:
            return [*self._encode([text], self._answer_forms()).ids, self.tokenizer.im_end_id]
        return self._encode([text], self._raw_forms(Access(paths=False))).ids

    # ------------------------------------------------------------------------------------------------ parts
    def _read(self, content: Any, access: Access, pictures_before: int = 0) -> Parts:
        """Convert text or a list of parts to text and places for pictures.

        Each text is searched for tags separately: a tag cannot span two parts.
        """
        if isinstance(content, str):
            return self._split(content, access)
        return _from_parts(content, pictures_before, lambda text: self._split(text, access))

    def _split(self, text: str, access: Access) -> Parts:
        if not self.tokenizer.has_image_tags or not access.paths:
            return [text]
        return [Place(piece or None) if i % 2 else piece for i, piece in enumerate(split_images(text))]

    def _fill(self, spoken: list[Parts], images: list[ImageSource]) -> list[Parts]:
        """Assign images to empty places; the rest is placed before the last text."""
        if self.read is None and (images or count_places(spoken)):
            raise QvlError("this model has no vision part: it takes no images")
        extra = fill(spoken, images)
        numbered = enumerate(extra, count_places(spoken) + 1)
        before = [part for n, image in numbered for part in (f"Picture {n}: ", Place(image), "\n")]
        return [*spoken[:-1], before + spoken[-1]]

    # ------------------------------------------------------------------------------------------------ encoding
    def _raw_forms(self, access: Access) -> frozenset[str]:
        """Special tokens in a raw prompt. Image spans are cut out before; a remaining ``<img>`` is text."""
        forms = frozenset(self.tokenizer.encoding.special_tokens_set)
        return forms - ({"<img>"} if access.paths else PICTURE_TAGS)

    def _user_forms(self, access: Access) -> frozenset[str]:
        """Special tokens in a user's text: control tokens such as ``<|im_end|>`` are plain text."""
        return self._raw_forms(access) & frozenset(IMAGE_TAGS)

    def _answer_forms(self) -> frozenset[str]:
        """Special tokens in an answer: those of grounding."""
        return self._raw_forms(Access()) & (frozenset(IMAGE_TAGS) - PICTURE_TAGS)

    def _encode(self, parts: Parts, special: frozenset[str]) -> _Encoded:
        ids: list[int] = []
        pictures: list[tuple[int, Source]] = []
        tokenizer = self.tokenizer
        text = ""
        for part in [*parts, None]:
            if isinstance(part, str):
                text += part  # adjacent texts are encoded together: a token may span both
                continue
            normal = splittable(unicodedata.normalize("NFC", text))
            ids += tokenizer.encoding.encode(normal, allowed_special=special, disallowed_special=())
            text = ""
            if part is not None:
                assert not isinstance(part.filled, Video), "this family takes no videos"
                pictures.append((len(ids) + 1, part.filled))
                ids += tokenizer.image_slot()
        return _Encoded(ids, pictures)

    def _say(self, role: str, parts: Parts, special: frozenset[str]) -> _Encoded:
        """Encode one turn: role, line end and content separately, as in training."""
        ordinary = self.tokenizer.encode_ordinary
        head = _Encoded([self.tokenizer.im_start_id, *ordinary(role), *ordinary("\n")], [])
        return _join([head, self._encode(parts, special), _Encoded([self.tokenizer.im_end_id], [])])

    def _answer_head(self) -> _Encoded:
        newline = self.tokenizer.encode_ordinary("\n")
        start = [self.tokenizer.im_start_id, *self.tokenizer.encode_ordinary("assistant")]
        return _Encoded([*newline, *start, *newline], [])

    def _from_messages(
        self, messages: Sequence[Mapping[str, Any]], images: list[ImageSource], access: Access
    ) -> _Encoded:
        roles = [str(message.get("role")) for message in messages]
        for number, role in enumerate(roles, 1):
            if role not in ROLES:
                raise QvlError(f"message {number} has the role {role!r:.40}: it must be one of {', '.join(ROLES)}")
        if roles[-1] == "assistant":
            raise QvlError("the last message has the role 'assistant': it must be one that waits for an answer")
        spoken: list[Parts] = [] if roles[0] == "system" else [[DEFAULT_SYSTEM]]
        pictures = 0
        for number, message in enumerate(messages, 1):
            pictures += count_places(spoken[-1:])
            spoken.append(self._message(message, number, access, pictures))
        spoken = self._fill(spoken, images)
        newline = _Encoded(self.tokenizer.encode_ordinary("\n"), [])
        forms = {role: self._user_forms(access) for role in ROLES} | {"assistant": self._answer_forms()}
        if roles[0] != "system":
            roles.insert(0, "system")
        turns = [self._say(role, parts, forms[role]) for role, parts in zip(roles, spoken)]
        separated = [part for turn in turns for part in (newline, turn)][1:]
        return _join([*separated, self._answer_head()])

    def _message(self, message: Mapping[str, Any], number: int, access: Access, pictures_before: int) -> Parts:
        if message["role"] != "assistant":
            return self._read(message_content(message, number), access, pictures_before)
        content = message.get("content") or ""
        return ["".join(map(part_text, checked_parts(content)))] if not isinstance(content, str) else [content]

    def _from_ids(self, ids: Any, images: list[ImageSource]) -> _Encoded:
        tokenizer, ids = self.tokenizer, [int(i) for i in ids]
        for i in ids:
            tokenizer.token_bytes(i)  # raises for an id outside the vocabulary
        if images and self.read is None:
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
        # The published tokenizer writes the path into the slot; its ids need no images.
        named = list(images) if images or not all(paths) else paths
        if len(named) != len(starts):
            raise QvlError(
                f"the token ids have {len(starts)} image slots, but images has {len(named)}: give one for each"
            )
        return _Encoded(ids, [(start + 1, source) for start, source in zip(starts, named)])

    def _prompt(self, encoded: _Encoded, access: Access, opened: str = "") -> Prompt:
        """Read the pictures, so that all input errors occur here."""
        read = self.read
        if read is None:
            return Prompt(encoded.ids, [], opened)
        return Prompt(encoded.ids, [Slot(start, read(source, access)) for start, source in encoded.pictures], opened)


def _from_parts(content: Any, pictures_before: int, split: Callable[[str], Parts]) -> Parts:
    """Convert the list format to text and places; `split` finds the places in a text."""
    parts: Parts = []
    number = pictures_before
    for part in checked_parts(content):
        if is_image_part(part):
            number += 1
            parts += [f"Picture {number}: ", picture_place(part), "\n"]
        elif "text" in part:
            found = split(part_text(part))
            number += count_places([found])
            parts += found
        elif "box" in part:
            boxes = _boxes(part)
            parts += map(format_box, boxes) if boxes else [_ref(part)]
        else:
            hint = ": this model takes no videos; pass frames as pictures" if "video" in part else ""
            raise QvlError(f"a part of a prompt needs 'text', 'image', 'image_url' or 'box'; found {part!r:.80}{hint}")
    return parts


def _ref(part: Mapping[str, Any]) -> str:
    return f"<ref>{part['ref']}</ref>" if part.get("ref") is not None else ""


def _boxes(part: Mapping[str, Any]) -> list[Box]:
    boxes = part["box"]
    if isinstance(boxes, Sequence) and not boxes:
        return []
    try:
        corners = np.array(boxes, np.float64)
        corners = corners.reshape(1, 4) if corners.ndim == 1 else corners
        if corners.shape != (len(corners), 4) or not ((corners >= 0) & (corners <= 1000)).all():
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise QvlError(
            f"a box is [x1, y1, x2, y2] in thousandths of the picture, 0 to 999; found {boxes!r:.80}"
        ) from None
    refs = itertools.chain([part.get("ref")], itertools.repeat(None))
    return [Box(ref, *map(math.trunc, corner)) for ref, corner in zip(refs, corners)]


def _path(place: Place) -> str:
    return str(place.source) if isinstance(place.source, str | Path) else ""


def _for_history(query: Any, parts: Parts, access: Access) -> Any:
    """Return the query with its pictures: text if every picture has a path, else parts."""
    pictures = sources(parts)
    if not pictures and isinstance(query, str):
        return query
    if access.paths and all(isinstance(source, str | Path) for source in pictures):
        shown = (part if isinstance(part, str) else f"<img>{_path(part)}</img>" for part in parts)
        return "".join(shown)
    if isinstance(query, str) and (not access.paths or "<img>" not in query):
        return [*({"image": source} for source in pictures), {"text": query}]
    return query


def _join(parts: Sequence[_Encoded]) -> _Encoded:
    ids: list[int] = []
    pictures: list[tuple[int, Source]] = []
    for part in parts:
        pictures += [(len(ids) + start, source) for start, source in part.pictures]
        ids += part.ids
    return _Encoded(ids, pictures)
