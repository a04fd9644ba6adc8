"""Prompts of Qwen2-VL and its successors: raw text, chat messages and turns, token ids.

Messages are rendered to text, special tokens and places for pictures, which `encoding` turns into token ids. Special
tokens typed in a message are plain text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.config import ModelConfig
from qvl_runtime.families.qwen2_vl.encoding import Encoder, joined
from qvl_runtime.families.qwen2_vl.grounding import GROUNDING
from qvl_runtime.families.qwen2_vl.template import Message, Piece, SpecialToken, Template
from qvl_runtime.inputs.image_tags import cut_images
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access, Picture, Source
from qvl_runtime.inputs.prompt import (
    ChatPrompt,
    Parts,
    Place,
    Prompt,
    Window,
    checked_history,
    checked_images,
    checked_parts,
    count_places,
    fill,
    is_ids,
    is_image_part,
    is_messages,
    part_text,
    picture_place,
    sources,
    user_message,
)
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.inputs.tools import ToolCall
from qvl_runtime.inputs.video import is_video_part, read_video


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Builds prompts: `qvl_runtime.families.base.Prompts`.

    Attributes
    ----------
    tokenizer : Tokenizer
    config : ModelConfig
    template : Template
    read : callable
        ``read(source, access)`` returns a picture.
    """

    tokenizer: Tokenizer
    config: ModelConfig
    template: Template
    read: Callable[[Source, Access], Picture]

    @property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.config, self.read, self.template.TIMESTAMPS)

    def build(self, prompt: Any, images: Sequence[ImageSource] | None, access: Access) -> Prompt:
        """Build a prompt from any supported form.

        Parameters
        ----------
        prompt : str, list of dict, or sequence of int
            - raw text. A picture is ``<img>source</img>``, or ``<img></img>`` or its published form
              ``<|vision_start|><|image_pad|><|vision_end|>``, which take the next of `images`;
            - chat messages: ``{"role", "content": text or parts}``. A part is ``{"type": "text", "text": …}``,
              ``{"type": "image", "image" or "url": source}`` or OpenAI's ``{"type": "image_url", …}``; a picture part
              without a source takes the next of `images`. ``{"type": "box", "text": …}`` is text in which box
              tags are special. A video is ``{"type": "video", "video": frames}`` with
              "fps" (2.0 by default) or "times" in seconds. A list of parts alone is the user's message;
            - token ids, with as many ``<|image_pad|>`` between vision tags as a picture has tokens.
        images : sequence of image sources, optional
            Images for the empty places, in order. If a text has no place, they are placed before it.

        Raises
        ------
        QvlError
            An unknown form, role or part, a wrong number of images, or a picture that cannot be read or is not allowed.
        """
        images = checked_images(images)
        if is_ids(prompt):
            return self._encoder.from_ids([int(i) for i in prompt], images, access)
        if isinstance(prompt, str):
            parts = self._places(prompt, access, self._vision_form)
            before = [Place(image) for image in fill([parts], images)]
            return self._encoder.encode([*before, *self._special_tokens(parts)], access, GROUNDING.opened(prompt))
        messages = prompt if is_messages(prompt) else [user_message(prompt)]
        read = [self._message(message, number, access) for number, message in enumerate(messages, 1)]
        if read[-1].role == "assistant":
            raise QvlError("the last message has the role 'assistant': it must be one that waits for an answer")
        if fill([message.content for message in read], images):
            raise QvlError("the messages have no places for these images: write a part {'type': 'image'} for each")
        return self._encoder.encode([*self._rendered(read), *self.template.answer_head()], access)

    def chat(
        self,
        query: Any,
        history: Sequence[tuple[Any, str | None]] | None,
        images: Sequence[ImageSource] | None,
        *,
        system: str | None,
        window: Window,
        access: Access,
    ) -> ChatPrompt:
        """Build the prompt of the next turn of a conversation.

        Parameters
        ----------
        query : str or list of dict
            The user's turn: text or parts, as in `build`.
        history : sequence of (query, answer), optional
            Earlier turns, oldest first; an answer may be None. Answers are text: image tags in them are not opened.
        images : sequence of image sources, optional
            Images for the empty places of history and query, in order. If the query has none, the rest is placed
            before it.
        system : str, optional
            System prompt; by default that of the family.

        Raises
        ------
        QvlError
            As for `build`.
        """
        turns = checked_history(history)
        asked = [self._content(question, access) for question, _ in turns]
        asking = self._content(query, access)
        extra = fill([*asked, asking], checked_images(images))
        asking[:0] = [Place(image) for image in extra]
        first = self.template.system(None if system is None else [part_text({"text": system})])
        last = [*self.template.turns([Message("user", asking)]), *self.template.answer_head()]
        said = []
        for question, (_, answer) in zip(asked, turns):
            answered = [] if answer is None else [Message("assistant", self._answer(answer))]
            said.append(self._encoder.encode(self.template.turns([Message("user", question), *answered]), access))
        begun, asked_now = self._encoder.encode(first, access), self._encoder.encode(last, access)
        left_out = window.left_out(len(begun.ids), [len(turn.ids) for turn in said], len(asked_now.ids))
        prompt = joined([begun, *said[left_out:], asked_now])
        return ChatPrompt(prompt, _for_history(query, asking), left_out)

    def answer(self, text: str) -> list[int]:
        """Encode an earlier answer, including the token that ended it."""
        return [*self._encoder.encode(self._answer(text), Access(paths=False)).ids, self.tokenizer.im_end_id]

    # ------------------------------------------------------------------------------------------------ messages
    def _message(self, message: Any, number: int, access: Access) -> Message:
        role, content = message.get("role"), message.get("content")
        if role not in self.template.ROLES:
            known = ", ".join(self.template.ROLES)
            raise QvlError(f"message {number} has the role {role!r:.40}: it must be one of {known}")
        calls = _tool_calls(message.get("tool_calls"), number)
        if content is None and not calls:
            raise QvlError(f"message {number} has no content: give a str, or a list of parts")
        if calls and role != "assistant":
            raise QvlError(f"message {number} has the role {role!r}: only an assistant's has tool_calls")
        if role == "assistant":
            reasoning = message.get("reasoning_content")
            if reasoning is not None and not isinstance(reasoning, str):
                raise QvlError(f"message {number} has the reasoning_content {reasoning!r:.60}; expected a str")
            if not content:
                return Message(role, [], calls, reasoning)
            text = content
            if not isinstance(text, str):
                text = "".join(_only_text(part, role) for part in checked_parts(text))
            return Message(role, self._answer(text), calls, reasoning)
        # What a tool returns is foreign text, which must not open a file.
        texts = dataclasses.replace(access, paths=False) if role == "tool" else access
        read = self._content(content, texts)
        if role == "system" and count_places([read]):
            raise QvlError("the system's message takes no pictures: put them into the user's")
        return Message(role, read)

    def _rendered(self, messages: Sequence[Message]) -> list[Piece]:
        has_system = messages[0].role == "system"
        system = self.template.system(messages[0].content if has_system else None)
        return [*system, *self.template.turns(messages[1:] if has_system else messages)]

    def _content(self, content: Any, access: Access) -> Parts:
        """Convert text or a list of parts to text and places."""
        if isinstance(content, str):
            return self._places(content, access)
        read: Parts = []
        for part in checked_parts(content):
            if is_image_part(part):
                read.append(picture_place(part))
            elif is_video_part(part):
                read.append(Place(read_video(part)))
            elif part.get("type") == "box" and "text" in part:
                read += self._special_tokens([part_text(part)], GROUNDING.tags & self.tokenizer.special.keys())
            elif "text" in part:
                read += self._places(part_text(part), access)
            else:
                raise QvlError(f"a part of a message needs 'text', 'image', 'image_url' or 'video'; found {part!r:.80}")
        return read

    def _answer(self, text: str) -> list[Piece]:
        """Convert an earlier answer: special tokens of grounding, tools and reasoning are recognized."""
        structure = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
        vision = {form for form in self.tokenizer.special if re.fullmatch(r"<\|(vision|image|video)_\w+\|>", form)}
        return self._special_tokens([text], self.tokenizer.special.keys() - structure - vision)

    # ------------------------------------------------------------------------------------------------ pieces
    @property
    def _vision_form(self) -> str:
        """Return the published text of a picture in a prompt."""
        ids = (self.config.vision_start_token_id, self.config.image_token_id, self.config.vision_end_token_id)
        return "".join(self.tokenizer.token_bytes(i).decode() for i in ids)

    def _places(self, text: str, access: Access, vision_form: str = "") -> Parts:
        """Split text at image tags, and at `vision_form` if given. Without access to paths, tags are text."""
        tagged = cut_images(text) if access.paths else [text]
        parts: Parts = []
        for i, piece in enumerate(tagged):
            if i % 2:
                parts.append(Place(piece or None))
                continue
            for j, plain in enumerate(piece.split(vision_form) if vision_form else [piece]):
                parts += [Place(None), plain] if j else [plain]
        return parts

    def _special_tokens(self, parts: Sequence[Piece], special: Any = None) -> list[Piece]:
        """Convert special tokens in the texts of `parts` to `SpecialToken`."""
        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, Place):
                pieces.append(part)
                continue
            cut = self.tokenizer.split_special(part, self.tokenizer.special.keys() if special is None else special)
            pieces += [SpecialToken(piece) if i % 2 else piece for i, piece in enumerate(cut)]
        return pieces


def _only_text(part: Mapping[str, Any], role: str) -> str:
    if is_image_part(part) or is_video_part(part) or "text" not in part:
        raise QvlError(f"the {role}'s message takes text parts only; found {part!r:.80}")
    return part_text(part)


def _tool_calls(calls: Any, number: int) -> list[Mapping[str, Any]]:
    """Return the functions that a message calls, with `name` and `arguments`."""
    if calls is None:
        return []
    functions = []
    for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str | ToolCall) else [calls]:
        if isinstance(call, ToolCall):
            call = call._asdict()
        function = call.get("function", call) if isinstance(call, Mapping) else None
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if not isinstance(function, Mapping) or not named or not isinstance(function.get("arguments"), str | Mapping):
            raise QvlError(f"message {number}: a tool call needs 'name' and 'arguments'; found {call!r:.80}")
        functions.append(function)
    return functions


def _for_history(query: Any, parts: Parts) -> Any:
    """Return the query with its pictures: text if every picture is in an image tag, else parts."""
    found = sources(parts)
    tagged = isinstance(query, str) and len(cut_images(query)) == 2 * len(found) + 1
    tags = any(isinstance(part, SpecialToken) for part in parts)  # box tags, which remain special
    if not (found or tags) or (tagged and all(isinstance(source, str | Path) for source in found)):
        return "".join(f"<img>{part.source!s}</img>" if isinstance(part, Place) else part for part in parts)
    return [_part(part) for part in parts if part != ""]


def _part(part: str | Place) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "box" if isinstance(part, SpecialToken) else "text", "text": str(part)}
    return part.to_part()
