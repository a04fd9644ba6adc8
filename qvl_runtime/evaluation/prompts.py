"""Prompts of each family as published with its evaluation, and the length of answers.

Qwen-VL's scripts also use raw text for Qwen-VL-Chat; MME and TouchStone use chat turns. No scripts were published for
the newer families: `CHAT` has the prompts of VLMEvalKit's adapter, and Qwen2.5-VL's own prompt for boxes.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.data import Sample

RAW_FAMILIES = ("qwen",)
"""Families that use `RAW` and `TALK`; others use `CHAT`."""

RAW = {
    "caption": "<img></img>Describe the image in English:",
    "question": "<img></img>{question} Answer:",
    "phrase": "<img></img><ref>{phrase}</ref><box>",
    "choice": "<img></img>Context: {hint}\nQuestion: {question}\nOptions: {options}\nAnswer:",
    "ready": "{prompt}",
}
TALK = {"yes or no": "<img></img>\n{question}", "talk": "Picture 1: <img></img>\n{question}"}
"""Qwen-VL's chat turns."""

CHAT = {
    "caption": "Please describe this image in general. Directly provide the description, do not include prefix like "
    '"This image depicts". ',
    "question": "{question}\nPlease try to answer the question with short words or phrases if possible.",
    "phrase": "Locate {phrase}, output its bbox coordinates using JSON format.",
    "choice": "Hint: {hint}\nQuestion: {question}\nOptions:\n{options}\n"
    "Please select the correct answer from the options above.",
    "ready": "{prompt}",
    "yes or no": "{question}",
    "talk": "{question}",
}
NO_HINT = "N/A"
JSON_BOX_TOKENS = 128
"""A box takes up to 28 tokens in Qwen-VL; newer families add JSON."""

FIELDS = {
    "caption": (),
    "question": ("question",),
    "phrase": ("phrase",),
    "choice": ("hint", "question", "options"),
    "ready": ("prompt",),
    "yes or no": ("question",),
    "talk": ("question",),
}
"""Fields of a sample by kind of prompt."""


@dataclasses.dataclass(frozen=True)
class Wording:
    """The prompts of a model.

    Attributes
    ----------
    templates : mapping of str
        Templates by kind.
    turns : frozenset of str
        Kinds that use a chat turn; others use raw text.
    tagged : bool
        Whether pictures are ``<img></img>`` in the text; else they are placed before it.
    """

    templates: Mapping[str, str]
    turns: frozenset[str]
    tagged: bool

    def prompt(self, kind: str, sample: Sample) -> Any:
        """Return the prompt for `Model.generate` and `Model.score`; the pictures are those of the sample."""
        template = self.templates[kind]
        if not self.tagged and sample.texts.get("hint") == NO_HINT:
            template = template.replace("Hint: {hint}\n", "")
        text = template.format_map(sample.texts)
        if kind not in self.turns:
            return text
        content: Any = text
        if not self.tagged:
            text = text.replace("<img></img>\n", "").replace("<img></img>", "")
            content = [{"type": "image"} for _ in sample.pictures] + [{"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    def lengths(self, kind: str, longest: int, shortest: int) -> dict[str, int]:
        """Return length options of `Model.generate`. Only raw text has a minimum length."""
        if not self.tagged and kind == "phrase":
            longest = max(longest, JSON_BOX_TOKENS)
        return {"max_new_tokens": longest, "min_new_tokens": 0 if kind in self.turns else shortest}

    def letters(self, kind: str, sample: Sample) -> list[str]:
        """Return the continuations for a sample's options."""
        return [letter if kind in self.turns else f" {letter}" for letter in sample.letters]


def wording(blob: Blob, kind: str, own: Mapping[str, Any] | None = None) -> Wording:
    """Return the published prompts of a model's family, or custom ones.

    Parameters
    ----------
    blob : Blob
        The model's file.
    kind : str
        Kind of the task's prompts.
    own : mapping, optional
        Templates by kind, and "turns": whether they are chat turns or raw text.

    Raises
    ------
    QvlError
        A template with an unknown field, or chat turns for a base model or one that reasons first.
    """
    tagged = blob.family.model_type in RAW_FAMILIES
    found = Wording({**RAW, **TALK}, frozenset(TALK), True) if tagged else Wording(CHAT, frozenset(CHAT), False)
    if own is not None:
        templates = {key: text for key, text in own.items() if key != "turns"}
        _check(templates, own.get("turns", False))
        turns = found.turns | set(templates) if own.get("turns", False) else found.turns - set(templates)
        found = dataclasses.replace(found, templates={**found.templates, **templates}, turns=turns)
    if kind in found.turns and not blob.generation_config.is_chat:
        raise QvlError(f"{blob.path}: is a base model, and this task is asked in chat turns; take the chat model")
    if kind in found.turns and blob.generation_config.thinking:
        raise QvlError(
            f"{blob.path}: reasons before it answers, and the answers of this task are too short for that; "
            "take the Instruct edition"
        )
    return found


def _check(templates: Mapping[str, Any], turns: Any) -> None:
    if not isinstance(turns, bool):
        raise QvlError(f"prompts: 'turns' is {turns!r:.40}, expected true or false")
    for kind, template in templates.items():
        if kind not in FIELDS or not isinstance(template, str):
            raise QvlError(f"prompts: {kind!r:.40} is no prompt; there are {', '.join(FIELDS)}")
        try:
            parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise QvlError(f"prompts: {kind!r} is no template ({error}); write braces twice") from None
        for _, field, form, conversion in parts:
            if field not in FIELDS[kind]:
                has = ", ".join(f"{{{field}}}" for field in FIELDS[kind]) or "none"
                raise QvlError(f"prompts: {kind!r} has no field {{{field}}}; it has {has}")
            if form or conversion:
                raise QvlError(f"prompts: {kind!r} writes {{{field}}} with a format; write the field alone")
