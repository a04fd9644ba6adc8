"""Keys and values of a sequence on disk, to continue a conversation without a prefill.

Tensors ``LAYER.PART`` are the arrays of `KVCache.saved`, in the backend's layout. The metadata has the tokens and
pictures, the NTK factor, the program that made it, and the `identity` of the model and settings. The last tensor is the
SHA-256 of everything before it. The file is as large as the cache: 0.5 MB a token in Qwen-VL (0.25 MB as int8).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from qvl_kernels.atomic import remove_stale, replacing
from qvl_runtime import __version__
from qvl_runtime.engine.sequence import SequenceState
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_json
from qvl_runtime.file.opening import as_path
from qvl_runtime.file.tensorfile import CODES, TensorFile
from qvl_runtime.file.writing import unwritable
from qvl_runtime.inputs.prompt import Key

FORMAT = "qvl past 1"
PROGRAM = f"qvl {__version__}"
DIGEST = "digest"
PIECE = 64 << 20
"""Bytes that are hashed at once."""
MALFORMED = "the file is malformed: continue without it"


def identity(*facts: object) -> str:
    """Hash the facts (JSON types) that keys and values depend on besides the prompt and this program."""
    return hashlib.sha256(json.dumps([FORMAT, PROGRAM, *facts], sort_keys=True).encode()).hexdigest()


def write(path: str | os.PathLike, state: SequenceState, keys: Sequence[Key], identity: str, short_prompt: int) -> None:
    """Save the first ``len(keys)`` positions of `state`; `short_prompt` is that of `Session`.

    What a process that was killed while saving has left in the folder is removed after an hour: it may be gigabytes.

    Raises
    ------
    QvlError
        If the file cannot be written. An existing file is then unchanged.
    """
    path, store, length = as_path(path), state.store, len(keys)
    parts, entries, offset = store.saved(0, length), {}, 0
    for layer, (part, array) in itertools.product(range(store.layers), enumerate(parts)):
        entries[f"{layer}.{part}"] = _entry(array, offset)
        offset += array.nbytes
    entries[DIGEST] = _entry(np.empty(32, np.uint8), offset)
    facts = {"format": FORMAT, "made_by": PROGRAM, "identity": identity}
    facts |= {"alpha": str(state.rotary.alpha), "keys": json.dumps(_runs(keys))}
    facts |= {"short": str(short_prompt)} if short_prompt else {}
    header = json.dumps({"__metadata__": facts, **entries}).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    try:
        remove_stale(path.parent.iterdir())
        with replacing(path) as file:

            def put(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            put(len(header).to_bytes(8, "little"))
            put(header)
            for layer in range(store.layers):
                for array in store.saved(layer, length):
                    put(array.data)
            file.write(digest.digest())
    except OSError as error:
        raise unwritable(path, error, "name another file") from None


@dataclasses.dataclass(frozen=True)
class SavedKV:
    """The content of a file.

    Attributes
    ----------
    keys : list of Key
        The content of each position.
    alpha : int
        The NTK factor.
    short_prompt : int
        As in `Session`.
    """

    keys: list[Key]
    alpha: int
    short_prompt: int
    _file: TensorFile

    def restore(self, state: SequenceState) -> None:
        """Load everything into a state.

        Raises
        ------
        QvlError
            If it does not fit the cache, which is then empty.
        """
        state.truncate(0)
        state.rescale(self.alpha)
        state.reserve(len(self.keys))
        layers = state.store.layers
        parts, rest = divmod(len(self._file.entries) - 1, layers)
        try:
            if rest or len(self.keys) > state.store.capacity:
                raise ValueError
            for layer in range(layers):
                arrays = [self._file.array(f"{layer}.{part}") for part in range(parts)]
                state.store.restore(layer, len(self.keys), arrays)
        except ValueError:
            raise QvlError(
                f"{self._file.path}: its keys and values are of another shape than this model's: continue without it"
            ) from None
        state.truncate(len(self.keys))


def read(path: str | os.PathLike, identity: str, window: int) -> SavedKV:
    """Open a file of `write` and check it completely.

    Raises
    ------
    QvlError
        If it is another kind of file, damaged, of another version of this program, has another `identity`, or more
        positions than `window`.
    """
    file = TensorFile(path)
    facts = file.metadata
    if facts.get("format") != FORMAT or DIGEST not in file:
        raise QvlError(f"{path}: holds no keys and values of a conversation saved by this version: continue without it")
    if (made_by := facts.get("made_by")) != PROGRAM:
        other = "an earlier version" if made_by is None else f"{made_by!r:.40}"
        raise QvlError(
            f"{path}: its keys and values were computed by {other}, and {PROGRAM} may compute others: continue "
            "without it"
        )
    if facts.get("identity") != identity:
        raise QvlError(
            f"{path}: its keys and values are of another model, device, cache type, or `activations`: continue "
            "without it"
        )
    if _digest(file.before(DIGEST)) != bytes(file.bytes(DIGEST)):
        raise QvlError(f"{path}: is damaged, its bytes are not those that were written: continue without it")
    keys, alpha = _read_keys(file, window), _read_alpha(file)
    _check_finite(file)
    return SavedKV(keys, alpha, _read_short_prompt(file), file)


def _entry(array: np.ndarray, offset: int) -> dict[str, object]:
    where = [offset, offset + array.nbytes]
    return {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": where}


def _runs(keys: Sequence[Key]) -> list[int | list]:
    """Run-length encode keys: tokens as they are, a picture as its hash and its number of positions."""
    found: list[int | list] = []
    for key, run in itertools.groupby(keys):
        count = sum(1 for _ in run)
        found += [[key.hex(), count]] if isinstance(key, bytes) else [key] * count
    return found


def _unrolled(runs: list[int | list]) -> list[Key]:
    keys: list[Key] = []
    for run in runs:
        keys += [run] if isinstance(run, int) else [bytes.fromhex(run[0])] * run[1]
    return keys


# The digest detects damage, not forgery: every field is checked as untrusted input.


def _digest(data: memoryview) -> bytes:
    """Hash in pieces, between which Ctrl-C ends it: a sparse file is as large as it likes."""
    digest = hashlib.sha256()
    for first in range(0, len(data), PIECE):
        digest.update(data[first : first + PIECE])
    return digest.digest()


def _read_keys(file: TensorFile, window: int) -> list[Key]:
    runs = parse_json(file.metadata.get("keys", ""), f"{file.path}: its list of keys", MALFORMED)
    if not isinstance(runs, list) or not all(_is_token(run) or _is_picture(run) for run in runs):
        raise QvlError(f"{file.path}: its list of keys holds something other than tokens and pictures; {MALFORMED}")
    count = sum(1 if isinstance(run, int) else run[1] for run in runs)
    # Checked before a list is allocated. The size of the file is no limit: it may be sparse.
    if not count:
        raise QvlError(f"{file.path}: claims 0 positions; {MALFORMED}")
    if count > window:
        raise QvlError(f"{file.path}: claims {count} positions, more than the window of {window}: continue without it")
    return _unrolled(runs)


def _is_token(run: object) -> bool:
    return type(run) is int and 0 <= run < 1 << 31


def _is_picture(run: object) -> bool:
    if not isinstance(run, list) or len(run) != 2 or type(run[1]) is not int or run[1] < 1:
        return False
    return isinstance(run[0], str) and re.fullmatch("[0-9a-f]{64}", run[0]) is not None


def _read_alpha(file: TensorFile) -> int:
    text = file.metadata.get("alpha", "")
    alpha = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if alpha < 1 or alpha & (alpha + 1):  # 1, 3, 7, 15, …
        raise QvlError(f"{file.path}: has the NTK factor {text[:40]!r}, which no prompt has; {MALFORMED}")
    return alpha


def _read_short_prompt(file: TensorFile) -> int:
    text = file.metadata.get("short", "0")
    if not re.fullmatch("[0-9]{1,4}", text):
        raise QvlError(f"{file.path}: says {text[:40]!r} of its first prompt's length; {MALFORMED}")
    return int(text)


def _check_finite(file: TensorFile) -> None:
    for name in file.entries:
        values = file.array(name)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise QvlError(f"{file.path}: {name!r:.40} holds a value that is not finite; {MALFORMED}")
