"""Byte-pair tokenization. Ranks and special tokens are data, provided by a family."""

from __future__ import annotations

import binascii
import codecs
import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Set

import numpy as np
import tiktoken

from qvl_runtime.errors import QvlError, excerpt

# cl100k's pattern, but with digits one by one and contractions in either case.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_BLANKS = 100_000
REMEDY = "take the tokenizer from the model's own repository"
MAX_RANKS = 16 << 20
"""Largest rank file in bytes: six times that of Qwen."""


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Parse a ``.tiktoken`` file: one ``base64-token rank`` a line, with LF or CRLF line ends.

    Raises
    ------
    QvlError
        The data is empty or truncated, a line is malformed, or a token or rank is duplicate or missing.
    """
    lines = [line for line in data.splitlines() if line]
    try:
        ranks = {_unquote(encoded): int(rank) for encoded, rank in map(bytes.split, lines)}
        sound = len(ranks) == len(lines)
    except ValueError:  # of which binascii.Error is one
        sound = False
    if not sound:
        raise _fault(data)
    if not ranks:
        raise QvlError(f"tokenizer ranks: the file is empty; {REMEDY}")
    for expected, found in enumerate(sorted(ranks.values())):
        if found != expected:
            raise QvlError(
                f"tokenizer ranks: expected every rank from 0 to {len(ranks) - 1} once, "
                f"but {expected} is missing or doubled; {REMEDY}"
            )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise QvlError(
            f"tokenizer ranks: no token for the single byte 0x{missing[0]:02x}, the file is cut short; {REMEDY}"
        )
    return ranks


_unquote = functools.partial(binascii.a2b_base64, strict_mode=True)


def _fault(data: bytes) -> QvlError:
    """What is wrong with the first bad line of a rank file."""
    seen: set[bytes] = set()
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token, _ = _unquote(encoded), int(rank)
        except ValueError:
            return QvlError(
                f"tokenizer ranks, line {number}: expected a base64 token and a rank, found {line[:60]!r}; {REMEDY}"
            )
        if token in seen:
            return QvlError(f"tokenizer ranks, line {number}: the token {token!r} appears twice; {REMEDY}")
        seen.add(token)
    raise AssertionError("a rank file was refused for nothing")


def splittable(text: str) -> str:
    """Check that a text has no very long run of blanks: tiktoken fails or panics at a million of them.

    Raises
    ------
    QvlError
        More than `MAX_BLANKS` blanks in a row.
    """
    if len(text) > MAX_BLANKS and any(run.end() - run.start() > MAX_BLANKS for run in re.finditer(r"\s+", text)):
        raise QvlError(f"the text has more than {MAX_BLANKS} blanks in a row; shorten them")
    return text


class Tokenizer:
    """Byte-pair tokenizer of the Qwen families.

    Parameters
    ----------
    ranks : mapping of bytes to int
        The rank of every ordinary token, which is its id.
    special : mapping of str to int
        The id of every special token.
    vocab_size : int, optional
        Rows of the embedding. By default there are no padding rows.

    Attributes
    ----------
    special : dict of str to int
    eod_id, im_start_id, im_end_id : int
        Ids of ``<|endoftext|>``, ``<|im_start|>`` and ``<|im_end|>``.
    n_vocab : int
        Largest id that has a text, plus one.
    vocab_size : int
        Rows of the embedding. Ids without a text are padding and decode to "".

    Raises
    ------
    QvlError
        Two tokens share an id, the special tokens are too long, or the embedding has fewer rows than the tokenizer has
        ids.
    """

    def __init__(self, ranks: Mapping[bytes, int], special: Mapping[str, int], vocab_size: int | None = None):
        owners: dict[int, bytes | str] = {rank: token for token, rank in ranks.items()}
        for form, token_id in special.items():
            if token_id < 0 or owners.setdefault(token_id, form) != form:
                raise QvlError(
                    f"the tokenizer gives the id {token_id} to {form!r} and to {owners[token_id]!r}; {REMEDY}"
                )
        if missing := [form for form in ("<|endoftext|>", "<|im_start|>", "<|im_end|>") if form not in special]:
            raise QvlError(f"the tokenizer has no {missing[0]!r}; {REMEDY}")
        self.n_vocab = max(owners) + 1
        self.vocab_size = self.n_vocab if vocab_size is None else vocab_size
        if self.vocab_size < self.n_vocab:
            raise QvlError(
                f"the tokenizer has {self.n_vocab} ids, but the config's vocab_size is {self.vocab_size}: "
                "tokenizer and config.json are from different models"
            )
        self.special = dict(special)
        self.eod_id = special["<|endoftext|>"]
        self.im_start_id = special["<|im_start|>"]
        self.im_end_id = special["<|im_end|>"]
        try:
            self._bpe = tiktoken.Encoding(
                "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks), special_tokens=self.special
            )
        except ValueError:  # it makes one regular expression of the special tokens
            raise QvlError(f"the special tokens are too long; {REMEDY}") from None
        self._bytes = [b""] * self.vocab_size
        for token_id, token in owners.items():
            self._bytes[token_id] = token.encode() if isinstance(token, str) else token

    @property
    def stop_ids(self) -> frozenset[int]:
        """Special tokens that end an answer."""
        return frozenset((self.eod_id, self.im_start_id, self.im_end_id))

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The underlying tiktoken encoding, for other libraries."""
        return self._bpe

    def encode(self, text: str) -> list[int]:
        """Encode raw text: every special token becomes its id."""
        return self.encode_special(text, self.special.keys())

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode text without special tokens."""
        return self._bpe.encode_ordinary(splittable(unicodedata.normalize("NFC", text)))

    def encode_special(self, text: str, special: Set[str]) -> list[int]:
        """Encode text in which only the special tokens of `special` become ids; others are plain text."""
        ids: list[int] = []
        # Split before normalizing: a combining character after a special token would change it.
        for i, piece in enumerate(self.split_special(text, special)):
            ids += [self.special[piece]] if i % 2 else self.encode_ordinary(piece)
        return ids

    def split_special(self, text: str, special: Set[str]) -> list[str]:
        """Split text at special tokens: alternately text and special token, beginning and ending with text."""
        if not isinstance(text, str):
            raise QvlError(f"expected a str to encode, got {type(text).__name__}")
        return _splitter(frozenset(special)).split(text) if special else [text]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        Special tokens decode to their text, padding ids to "".

        Raises
        ------
        QvlError
            What is no sequence of ids, or an id outside the embedding.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes; see `decode`."""
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0:
            raise QvlError(f"expected token ids to decode, got {type(ids).__name__}; pass a list of them")
        stream = self.byte_stream()
        return b"".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    def byte_stream(self) -> ByteStream:
        """Return an incremental decoder from ids to bytes."""
        return ByteStream(self)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id.

        Raises
        ------
        QvlError
            An id outside the embedding.
        """
        if not isinstance(token_id, int | np.integer) or not 0 <= token_id < self.vocab_size:
            raise QvlError(f"token id {excerpt(token_id):.40} is not in 0..{self.vocab_size - 1}")
        return self._bytes[token_id]


@functools.lru_cache(maxsize=16)
def _splitter(special: frozenset[str]) -> re.Pattern[str]:
    """Match special tokens; if one is a prefix of another, the longer wins."""
    forms = sorted(special, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, forms)) + ")")


class ByteStream:
    """Incremental decoder from ids to bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def push(self, token_id: int) -> bytes:
        """Return the bytes that this id completes."""
        return self._tokenizer.token_bytes(token_id)

    def finish(self) -> bytes:
        """Return the bytes held back."""
        return b""


class StreamDecoder:
    """Incremental decoder from ids to text; each piece holds whole characters.

    The concatenated pieces equal `Tokenizer.decode` of all ids.

    Parameters
    ----------
    tokenizer : Tokenizer
    """

    def __init__(self, tokenizer: Tokenizer):
        self._bytes = tokenizer.byte_stream()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, possibly "". Raises QvlError as `Tokenizer.decode` does."""
        return self._utf8.decode(self._bytes.push(token_id))

    def finish(self) -> str:
        """Return the rest: "", or U+FFFD for an incomplete character."""
        return self._utf8.decode(self._bytes.finish(), final=True)
