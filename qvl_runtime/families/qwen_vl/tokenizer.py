"""The tokenizer of Qwen-VL: fixed special tokens after the ranks, and slots for pictures between tags."""

from __future__ import annotations

import itertools
import unicodedata

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.image_tags import IMAGE_TAGS, split_images
from qvl_runtime.inputs.tokenizer import ByteStream, Tokenizer, read_ranks

CONTROL_FORMS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


class QwenTokenizer(Tokenizer):
    """Tokenizer of Qwen-VL, Qwen-VL-Chat and Qwen-7B; create one with `QwenTokenizer.from_ranks`.

    The ids of the special tokens follow the ranks: ``<|endoftext|>``, ``<|im_start|>``, ``<|im_end|>``,
    ``<|extra_0|>`` to ``<|extra_204|>``, then the nine image tags where the model has them.

    Attributes
    ----------
    img_start_id, img_end_id, img_pad_id : int or None
        None if the model has no image tags (Qwen-7B).
    n_queries : int
        Positions of an image between ``<img>`` and ``</img>``.
    """

    def __init__(self, ranks: dict[bytes, int], *, image_tags: bool, n_queries: int, vocab_size: int | None):
        forms = CONTROL_FORMS + IMAGE_TAGS if image_tags else CONTROL_FORMS
        special = {form: len(ranks) + i for i, form in enumerate(forms)}
        super().__init__(ranks, special, vocab_size)
        self.n_queries = n_queries
        self.img_start_id = special.get("<img>")
        self.img_end_id = special.get("</img>")
        self.img_pad_id = special.get("<imgpad>")
        self._forms = frozenset(forms)

    @classmethod
    def from_ranks(
        cls, data: bytes, *, image_tags: bool, n_queries: int = 256, vocab_size: int | None = None
    ) -> QwenTokenizer:
        """Create a tokenizer from the content of a ``qwen.tiktoken`` file.

        Parameters
        ----------
        data : bytes
            One ``base64-token rank`` a line, with LF or CRLF line ends.
        image_tags : bool
            Whether the model has the nine image tags (Qwen-VL) or not (Qwen-7B).
        n_queries : int
            Positions of an image between its tags.
        vocab_size : int, optional
            Rows of the model's embedding; by default there are no padding rows.

        Raises
        ------
        QvlError
            The file is empty or truncated, a line is malformed, a token or rank is duplicate or missing, or the
            embedding has fewer rows than the tokenizer has ids.
        """
        return cls(read_ranks(data), image_tags=image_tags, n_queries=n_queries, vocab_size=vocab_size)

    @property
    def has_image_tags(self) -> bool:
        """Whether ``<img>``, ``<ref>``, ``<box>`` and the other image tags are special tokens."""
        return self.img_start_id is not None

    def encode(self, text: str) -> list[int]:
        """Encode raw text: special tokens become ids, image spans become image slots.

        Raises
        ------
        QvlError
            An ``<img>`` without ``</img>``, or with another tag inside.
        """
        if not isinstance(text, str):
            raise QvlError(f"expected a str to encode, got {type(text).__name__}")
        # Paths are cut out before the normalization: a file name need not be NFC.
        pieces = split_images(text) if self.has_image_tags else [text]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids += self.image_slot()
            else:
                ids += self.encode_special(unicodedata.normalize("NFC", piece), self._forms)
        return ids

    def image_slot(self) -> list[int]:
        """Return the ids of one image, without its path."""
        start, pad, end = (self.special[form] for form in ("<img>", "<imgpad>", "</img>"))
        return [start, *[pad] * self.n_queries, end]

    def byte_stream(self) -> ByteStream:
        """Return an incremental decoder from ids to bytes.

        An image slot decodes to ``<img></img>``, or to ``<img>path</img>`` if it holds a path's bytes, as written by
        the published code.
        """
        return _SlotStream(self)


class _SlotStream(ByteStream):
    """Incremental decoder from ids to bytes that recognizes image slots.

    A slot is ``<img>``, path bytes, at least one ``<imgpad>``, ``</img>``; a path byte is the id of the same value.
    A slot is only recognized at its end, so its bytes are held back until then.
    """

    def __init__(self, tokenizer: QwenTokenizer):
        super().__init__(tokenizer)
        self._pad, self._start, self._end = tokenizer.img_pad_id, tokenizer.img_start_id, tokenizer.img_end_id
        self._held: list[int] = []

    def push(self, token_id: int) -> bytes:
        own, held = self._tokenizer.token_bytes(token_id), self._held
        if held:
            padded = held[-1] == self._pad
            if token_id == self._pad or (0 <= token_id < 256 and not padded):
                held.append(token_id)
                return b""
            if token_id == self._end and padded:
                path = bytes(itertools.takewhile(lambda i: i != self._pad, held[1:]))
                held.clear()
                return b"<img>" + path + b"</img>"
        before = self.finish()
        if token_id == self._start:
            held.append(token_id)
            return before
        return before + own

    def finish(self) -> bytes:
        held = b"".join(map(self._tokenizer.token_bytes, self._held))
        self._held.clear()
        return held
