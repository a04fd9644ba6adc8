"""The tokenizer files of a published checkpoint: `tokenizer.json`, or `vocab.json` with `merges.txt`.

In the blob the vocabulary is text: lines ``base64-token rank`` as in a ``.tiktoken`` file, an empty line, and the
special tokens in the same notation.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.config import refuse
from qvl_runtime.families.reading import check, read_json, take
from qvl_runtime.file.opening import read_regular
from qvl_runtime.inputs.tokenizer import REMEDY, SPLIT_PATTERN, read_ranks

MAX_MERGES = 64 << 20


class Vocabulary(NamedTuple):
    """The data of a tokenizer.

    Attributes
    ----------
    ranks : dict of bytes to int
    special : dict of str to int
    """

    ranks: dict[bytes, int]
    special: dict[str, int]

    def to_bytes(self) -> bytes:
        """Return the vocabulary in the format of the blob."""
        forms = {form.encode(): token_id for form, token_id in self.special.items()}
        return _lines(self.ranks) + b"\n" + _lines(forms)

    @classmethod
    def from_bytes(cls, data: bytes) -> Vocabulary:
        """The inverse of `to_bytes`.

        Raises
        ------
        QvlError
            For a malformed line, or incomplete ranks.
        """
        ranks, _, special = data.partition(b"\n\n")
        try:
            pairs = [line.split() for line in special.splitlines()]
            forms = {base64.b64decode(form, validate=True).decode(): int(token_id) for form, token_id in pairs}
        except ValueError:
            raise QvlError(f"tokenizer: a line of a special token is malformed; {REMEDY}") from None
        return cls(read_ranks(ranks), forms)


def _lines(tokens: Mapping[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % token_id for token, token_id in tokens.items())


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the vocabulary of a published checkpoint.

    Raises
    ------
    QvlError
        If a file is missing or damaged, merges contradict the ranks, or the tokenizer is of another type.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return _from_tokenizer_json(read_json(path), str(path))
    path = folder / "vocab.json"
    return _ranks(read_json(path), _read_merges(folder / "merges.txt"), _read_added(folder), str(path))


def _from_tokenizer_json(data: Mapping[str, Any], where: str) -> Vocabulary:
    model = take(data, "model", dict, where)
    refuse(model, where, {"type": "BPE", "byte_fallback": False, "dropout": 0.0, "unk_token": ""})
    normalizer, splitter = data.get("normalizer"), data.get("pre_tokenizer")
    check(
        isinstance(normalizer, dict) and normalizer.get("type") == "NFC",
        where,
        f"'normalizer' is {normalizer!r:.80}; only NFC is known",
    )
    steps = splitter.get("pretokenizers") if isinstance(splitter, dict) else None
    steps = steps if isinstance(steps, list) else []
    patterns = [step.get("pattern") for step in steps if isinstance(step, dict) and step.get("type") == "Split"]
    check(patterns == [{"Regex": SPLIT_PATTERN}], where, "'pre_tokenizer' splits text by another pattern than Qwen's")
    added: dict[str, int] = {}
    for token in take(data, "added_tokens", list, where):
        _add(added, token, token.get("id") if isinstance(token, dict) else None, where)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in take(model, "merges", list, where)]
    return _ranks(take(model, "vocab", dict, where), merges, added, where)


def _read_merges(path: Path) -> list[list[str]]:
    content = read_regular(path, limit=MAX_MERGES, remedy="finish the download")
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise QvlError(f"{path}: is not readable ({error}); download it again") from None
    return [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]


def _read_added(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer_config.json"
    added: dict[str, int] = {}
    for key, token in take(read_json(path), "added_tokens_decoder", dict, str(path)).items():
        _add(added, token, int(key) if key.isdecimal() and len(key) < 10 else None, str(path))
    return added


def _add(added: dict[str, int], token: Any, token_id: Any, where: str) -> None:
    """Add one added token."""
    content = token.get("content") if isinstance(token, dict) else None
    form = content if isinstance(content, str) else ""
    lone = any("\ud800" <= c <= "\udfff" for c in form)  # a surrogate, which UTF-8 cannot hold
    if form == "" or lone or type(token_id) is not int or token_id < 0 or form in added:
        raise QvlError(f"{where}: an added token is {token!r:.80}, expected 'content' and an id, each once; {REMEDY}")
    known = ["single_word", "lstrip", "rstrip"]
    # Of a token that add_tokens made: it is searched in the text's NFC, which leaves ASCII as it is.
    known += [] if form.isascii() else ["normalized"]
    refuse(token, where, dict.fromkeys(known, False))
    added[form] = token_id


def _ranks(vocab: Mapping[str, Any], merges: Sequence[Any], special: dict[str, int], where: str) -> Vocabulary:
    """Convert a vocabulary of characters to one of bytes, and check that merging by rank equals `merges`."""
    values = {letter: byte for byte, letter in enumerate(letters())}
    ranks: dict[bytes, int] = {}
    for token, rank in vocab.items():
        if token in special:
            continue
        try:
            ranks[bytes(values[letter] for letter in token)] = rank
        except KeyError:
            raise QvlError(f"{where}: the token {token!r:.60} is not written in GPT-2's letters; {REMEDY}") from None
    taken = sorted(rank for rank in ranks.values() if type(rank) is int)
    check(taken == list(range(len(vocab) - sum(form in vocab for form in special))), where, "its ids have gaps")
    check(
        len(merges) + 256 == len(ranks),
        where,
        f"there are {len(merges)} merges for {len(ranks)} tokens, expected {len(ranks) - 256}",
    )
    for rank, merge in enumerate(merges, 256):
        pair = isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)
        if not pair or vocab.get("".join(merge)) != rank:
            raise QvlError(f"{where}: merge {rank - 255}, {merge!r:.60}, does not make the token {rank}; {REMEDY}")
    return Vocabulary(dict(sorted(ranks.items(), key=lambda item: item[1])), special)


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two tokens that each multi-byte token is merged from, by rank.

    They are the result of merging its bytes by rank before the last step.
    """
    pairs = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def letters() -> list[str]:
    """Return the character of each byte in a vocabulary file (GPT-2)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
