"""Encoding of rendered prompts: pieces to token ids with slots for pictures.

The text between two special tokens is tokenized as a whole, so a content that begins with a newline merges with the
newline of its role.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.config import ModelConfig
from qvl_runtime.families.qwen2_vl.template import Piece, SpecialToken
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access, Picture, Source
from qvl_runtime.inputs.prompt import Place, Prompt, Slot
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.inputs.video import Video


@dataclasses.dataclass(frozen=True)
class _Placeholder:
    """A picture that was read, and its placeholder token; `time` as in `Slot`."""

    picture: Picture
    token: int
    time: int | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes rendered prompts.

    Attributes
    ----------
    tokenizer : Tokenizer
    config : ModelConfig
    read : callable
        ``read(source, access)`` returns a picture.
    timestamps : bool
        As `Template.TIMESTAMPS`.
    """

    tokenizer: Tokenizer
    config: ModelConfig
    read: Callable[[Source, Access], Picture]
    timestamps: bool

    def encode(self, pieces: Sequence[Piece], access: Access, opened: str = "") -> Prompt:
        """Encode pieces to token ids and read their pictures, so that all input errors occur here.

        Parameters
        ----------
        pieces : sequence of Piece
            A rendered prompt; its places are filled.
        access : Access
        opened : str
            As in `Prompt`.

        Raises
        ------
        QvlError
            A picture that cannot be read or is not allowed, or a placeholder in the text.
        """
        ids: list[int] = []
        slots: list[Slot] = []
        text = ""
        tagged = (part for piece in [*pieces, SpecialToken()] for part in self._tagged(piece, access))
        for piece in tagged:
            if isinstance(piece, str) and not isinstance(piece, SpecialToken):
                text += piece
                continue
            ids += self.tokenizer.encode_ordinary(text)
            text = ""
            if isinstance(piece, _Placeholder):
                slots.append(Slot(len(ids), piece.picture, piece.time))
                ids += [piece.token] * piece.picture.tokens
            elif piece:
                if piece not in self.tokenizer.special:
                    raise QvlError(f"this model's tokenizer has no {piece}, which the chat template needs here")
                ids.append(self.tokenizer.special[piece])
        self._check_slots(ids, slots)
        return Prompt(ids, slots, opened, self._reasoning_end(ids))

    def from_ids(self, ids: list[int], images: Sequence[ImageSource], access: Access) -> Prompt:
        """Read the pictures of the slots among token ids.

        Raises
        ------
        QvlError
            An id outside the vocabulary, a malformed slot, or another number of images than of slots.
        """
        config = self.config
        for i in ids:
            self.tokenizer.token_bytes(i)  # raises for an id outside the vocabulary
        pads = [i for i, token in enumerate(ids) if token == config.image_token_id]
        starts = [i for i in pads if not i or ids[i - 1] != config.image_token_id]
        if len(starts) != len(images):
            raise QvlError(
                f"the token ids have {len(starts)} image slots, but images has {len(images)}: give one for each"
            )
        slots = [Slot(start, self.read(image, access)) for start, image in zip(starts, images)]
        for slot in slots:
            wanted = [*[config.image_token_id] * slot.picture.tokens, config.vision_end_token_id]
            before = ids[slot.start - 1] if slot.start else None
            if before != config.vision_start_token_id or ids[slot.start : slot.end + 1] != wanted:
                raise QvlError(
                    f"the image slot at position {slot.start} must be vision_start, {slot.picture.tokens} image_pad "
                    f"(for {slot.picture.grid[0]} x {slot.picture.grid[1]} tokens), vision_end"
                )
        self._check_slots(ids, slots)
        return Prompt(ids, slots, reasoning_end=self._reasoning_end(ids))

    def _tagged(self, piece: Piece, access: Access) -> Iterator[str | _Placeholder]:
        """Read the pictures of a piece; each is placed between vision tags."""
        if not isinstance(piece, Place):
            yield piece
            return
        config = self.config
        tags = (config.vision_start_token_id, config.vision_end_token_id)
        start, end = (SpecialToken(self.tokenizer.token_bytes(tag).decode()) for tag in tags)
        source = piece.filled
        if not isinstance(source, Video):
            yield start
            yield _Placeholder(self.read(source, access), config.image_token_id)
            yield end
            return
        size: tuple[int, int] | None = None
        placeholders: list[_Placeholder] = []
        for number, pair in enumerate(source.pairs):
            picture = self.read(dataclasses.replace(pair, size=size), access)
            size = picture.resized
            time = None if self.timestamps else config.frame_position(number, source.pair_seconds)
            placeholders.append(_Placeholder(picture, config.video_token_id, time))
        if not self.timestamps:
            yield start
            yield from placeholders
            yield end
            return
        for seconds, placeholder in zip(source.pair_times, placeholders):
            yield f"<{seconds:.1f} seconds>"
            yield start
            yield placeholder
            yield end

    def _reasoning_end(self, ids: Sequence[int]) -> int | None:
        """Return the token that ends the reasoning if the prompt opens it: its last special token is <think>."""
        special = self.tokenizer.special
        forms = frozenset(special.values())
        last = next((token for token in reversed(ids) if token in forms), None)
        return special.get("</think>") if last is not None and last == special.get("<think>") else None

    def _check_slots(self, ids: Sequence[int], slots: Sequence[Slot]) -> None:
        """Refuse a placeholder outside of a picture's slot: the decoder would use its embedding."""
        pads = [i for i, token in enumerate(ids) if token in (self.config.image_token_id, self.config.video_token_id)]
        covered = [i for slot in slots for i in range(slot.start, slot.end)]
        if pads != covered:
            stray = min(set(pads) ^ set(covered))
            raise QvlError(
                f"token {stray} of the prompt is a placeholder outside of a picture's slot: a slot is vision_start, as "
                "many image_pad as the picture has tokens, vision_end"
            )


def joined(parts: Sequence[Prompt]) -> Prompt:
    """Join the parts of a conversation. Each begins with a special token, so it is tokenized as in the whole."""
    ids: list[int] = []
    slots: list[Slot] = []
    for part in parts:
        slots += [slot._replace(start=len(ids) + slot.start) for slot in part.slots]
        ids += part.ids
    return Prompt(ids, slots, reasoning_end=parts[-1].reasoning_end)
