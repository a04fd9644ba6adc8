"""Text to token ids and back, for the vocabulary that Qwen-VL, Qwen-VL-Chat and Qwen-7B share."""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from collections.abc import Iterable, Set

import tiktoken

from qvl_runtime.errors import QvlError

# cl100k's pattern, but with digits one by one and contractions in either case.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_RANKS = 16 << 20
"""Bytes of a rank file: six times Qwen's."""
CONTROL_FORMS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
IMAGE_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")

_IMAGE_SPAN = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_ANY_TAG = re.compile("|".join(map(re.escape, IMAGE_TAGS)))


def split_images(text: str) -> list[str]:
    """Split a text at its image spans.

    Parameters
    ----------
    text : str

    Returns
    -------
    list of str
        Alternately text and what stood between ``<img>`` and ``</img>``: text, path, text, path, ..., text.

    Raises
    ------
    QvlError
        An ``<img>`` that is never closed, or another tag inside an image span.

    Examples
    --------
    >>> split_images("Picture 1: <img>a.png</img> and more")
    ['Picture 1: ', 'a.png', ' and more']
    """
    pieces = _IMAGE_SPAN.split(text)
    for path in pieces[1::2]:
        if tag := _ANY_TAG.search(path):
            raise QvlError(f"tags do not nest: {tag[0]} stands inside <img>{_shorten(path)}</img>")
    for piece in pieces[0::2]:
        _, found, rest = piece.partition("<img>")
        if found:
            raise QvlError(f"unclosed image tag: <img>{_shorten(rest)} has no </img>")
    return pieces


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _read_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise QvlError(
                f"tokenizer ranks, line {number}: expected a base64 token and a rank, found {line[:60]!r}"
            ) from None
        if token in ranks:
            raise QvlError(f"tokenizer ranks, line {number}: the token {token!r} appears twice")
        ranks[token] = value
    if not ranks:
        raise QvlError("tokenizer ranks: the file is empty; take qwen.tiktoken from the model's own repository")
    for expected, rank in enumerate(sorted(ranks.values())):
        if rank != expected:
            raise QvlError(
                f"tokenizer ranks: expected every rank from 0 to {len(ranks) - 1} once, "
                f"but {expected} is missing or doubled"
            )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise QvlError(f"tokenizer ranks: no token for the single byte 0x{missing[0]:02x}: the file is cut short")
    return ranks


class Tokenizer:
    """Byte-pair tokenizer of the Qwen family; make one with `Tokenizer.from_ranks`.

    The ids of the special forms follow the ranks: ``<|endoftext|>``, ``<|im_start|>``, ``<|im_end|>``,
    ``<|extra_0|>`` to ``<|extra_204|>``, then the nine image tags where the model has them.

    Attributes
    ----------
    eod_id, im_start_id, im_end_id : int
    ref_start_id, ref_end_id, box_start_id, box_end_id, quad_start_id, quad_end_id : int or None
    img_start_id, img_end_id, img_pad_id : int or None
        None where the model has no image tags (Qwen-7B).
    n_vocab : int
        Number of ids that have a text.
    vocab_size : int
        Number of rows of the embedding; ids from `n_vocab` up to it are padding and decode to "".
    n_queries : int
        Positions an image takes between ``<img>`` and ``</img>``.
    """

    def __init__(self, ranks: dict[bytes, int], *, image_tags: bool, n_queries: int, vocab_size: int | None):
        forms = CONTROL_FORMS + IMAGE_TAGS if image_tags else CONTROL_FORMS
        special = {form: len(ranks) + i for i, form in enumerate(forms)}
        self.n_vocab = len(ranks) + len(forms)
        self.vocab_size = self.n_vocab if vocab_size is None else vocab_size
        if self.vocab_size < self.n_vocab:
            raise QvlError(
                f"the tokenizer has {self.n_vocab} ids, but the config's vocab_size is {self.vocab_size}: "
                "qwen.tiktoken and config.json are from different models"
            )
        self.n_queries = n_queries
        self.eod_id = special["<|endoftext|>"]
        self.im_start_id = special["<|im_start|>"]
        self.im_end_id = special["<|im_end|>"]
        self.ref_start_id = special.get("<ref>")
        self.ref_end_id = special.get("</ref>")
        self.box_start_id = special.get("<box>")
        self.box_end_id = special.get("</box>")
        self.quad_start_id = special.get("<quad>")
        self.quad_end_id = special.get("</quad>")
        self.img_start_id = special.get("<img>")
        self.img_end_id = special.get("</img>")
        self.img_pad_id = special.get("<imgpad>")
        self._raw_forms = frozenset(forms)
        self._chat_forms = frozenset(IMAGE_TAGS) if image_tags else frozenset()
        self._bpe = tiktoken.Encoding("qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self._bytes = [b""] * self.vocab_size
        for token, rank in ranks.items():
            self._bytes[rank] = token
        for form, token_id in special.items():
            self._bytes[token_id] = form.encode()

    @classmethod
    def from_ranks(
        cls, data: bytes, *, image_tags: bool, n_queries: int = 256, vocab_size: int | None = None
    ) -> Tokenizer:
        """Make a tokenizer from the content of a ``qwen.tiktoken`` file.

        Parameters
        ----------
        data : bytes
            One ``base64-token rank`` a line, with either kind of line end.
        image_tags : bool
            Whether the model has the nine image tags (Qwen-VL) or not (Qwen-7B).
        n_queries : int
            Positions an image takes between its tags.
        vocab_size : int, optional
            Rows of the model's embedding; by default there are no padding rows.

        Raises
        ------
        QvlError
            The file is empty or cut short, a line is malformed, a token or rank comes twice or is missing, or
            the embedding has fewer rows than the tokenizer has ids.
        """
        return cls(_read_ranks(data), image_tags=image_tags, n_queries=n_queries, vocab_size=vocab_size)

    @property
    def has_image_tags(self) -> bool:
        """Whether ``<img>``, ``<ref>``, ``<box>`` and the others are special here."""
        return self.img_start_id is not None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Special forms that end an answer."""
        return frozenset((self.eod_id, self.im_start_id, self.im_end_id))

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding behind it, for libraries that take one."""
        return self._bpe

    def encode(self, text: str) -> list[int]:
        """Encode a raw prompt: every special form becomes its id, every image span an image slot.

        Raises
        ------
        QvlError
            An ``<img>`` without its ``</img>``, or with another tag inside.
        """
        return self._encode(text, self._raw_forms)

    def encode_chat(self, text: str) -> list[int]:
        """Encode what someone says in a chat: only the nine image tags are special.

        So ``<|im_end|>`` typed by a user is plain text and cannot end the turn. Raises as `encode` does.
        """
        return self._encode(text, self._chat_forms)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode a text in which nothing is special."""
        return self._bpe.encode_ordinary(unicodedata.normalize("NFC", text))

    def _encode(self, text: str, special: Set[str]) -> list[int]:
        if not isinstance(text, str):
            raise QvlError(f"expected a str to encode, got {type(text).__name__}")
        # Paths are cut out before the normalisation: a file may well have a name that is not NFC.
        pieces = split_images(text) if self.has_image_tags else [text]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids += [self.img_start_id, *[self.img_pad_id] * self.n_queries, self.img_end_id]
            else:
                normal = unicodedata.normalize("NFC", piece)
                ids += self._bpe.encode(normal, allowed_special=special, disallowed_special=())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        Special forms keep their text and padding ids have none. An image slot decodes to ``<img></img>``, or to
        ``<img>path</img>`` where it carries a path's bytes, as the published model code writes it.

        Raises
        ------
        QvlError
            An id that is no row of the embedding.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes; see `decode`."""
        stream = _ByteStream(self)
        return b"".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id.

        Raises
        ------
        QvlError
            An id that is no row of the embedding.
        """
        if not 0 <= token_id < self.vocab_size:
            raise QvlError(f"token id {token_id} is not in 0..{self.vocab_size - 1}")
        return self._bytes[token_id]


class _ByteStream:
    """Ids to bytes, one by one, with image slots recognised.

    A slot is ``<img>``, path bytes, at least one ``<imgpad>``, ``</img>``; a path byte is the id of the same value.
    Whether a run is one shows only at its end, so such a run is held back until then.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def push(self, token_id: int) -> bytes:
        tokenizer, held = self._tokenizer, self._held
        if held:
            padded = held[-1] == tokenizer.img_pad_id
            if token_id == tokenizer.img_pad_id or (0 <= token_id < 256 and not padded):
                held.append(token_id)
                return b""
            if token_id == tokenizer.img_end_id and padded:
                path = bytes(held[1 : held.index(tokenizer.img_pad_id)])
                held.clear()
                return b"<img>" + path + b"</img>"
        before = self.finish()
        if token_id == tokenizer.img_start_id:
            held.append(token_id)
            return before
        return before + tokenizer.token_bytes(token_id)

    def finish(self) -> bytes:
        held = b"".join(map(self._tokenizer.token_bytes, self._held))
        self._held.clear()
        return held


class StreamDecoder:
    """Turns ids into text one by one, never showing half a character.

    What it returns, joined together, equals `Tokenizer.decode` of all the ids.

    Parameters
    ----------
    tokenizer : Tokenizer
    """

    def __init__(self, tokenizer: Tokenizer):
        self._bytes = _ByteStream(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, which may be "". Raises QvlError as `Tokenizer.decode` does."""
        return self._utf8.decode(self._bytes.push(token_id))

    def finish(self) -> str:
        """What is left at the end: "" or U+FFFD for a character that never was completed."""
        return self._utf8.decode(self._bytes.finish(), final=True)
