"""What a job asks of every row, and how its model is loaded: what other processes are sent."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What a job asks.

    Attributes
    ----------
    prompt : str or None
        For rows without one.
    generate : dict
        Options of `Model.generate`, without the seed.
    seed : int
        With a row's id it gives the seed of that row.
    max_batch : int
        Rows that are computed at once.
    allow_urls : bool
        Whether http(s) pictures may be fetched.
    """

    prompt: str | None
    generate: dict[str, Any]
    seed: int
    max_batch: int
    allow_urls: bool

    def fingerprint(self) -> dict[str, Any]:
        """What the answers depend on, as JSON types: not how many are computed at once."""
        return {"prompt": self.prompt, "seed": self.seed, "urls": self.allow_urls, **self.generate}

    def seed_of(self, row_id: str) -> int:
        """The seed of a row: the same wherever and whenever it is computed."""
        digest = hashlib.blake2b(f"{self.seed}:{row_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model, and how to load it.

    Attributes
    ----------
    path : Path
    load : dict
        Options of `qvl_runtime.load`.
    """

    path: Path
    load: dict[str, Any]
