"""The options of a job and its model, which are sent to other processes."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from qvl_runtime.blob import Blob
from qvl_runtime.engine.constraints import Answer, JsonSchema
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.options import whole_number


@dataclasses.dataclass(frozen=True)
class Options:
    """The request options of a job.

    Attributes
    ----------
    prompt : str or None
        Prompt of rows without one.
    generate : dict
        Options of `Model.generate`, without the seed.
    seed : int
        The seed of a row derives from this and the row's id.
    max_batch : int
        Largest number of concurrent rows, up to 16.
    allow_urls : bool
        Allow pictures from http(s) URLs.
    schema : JsonSchema, optional
        Restricts the answers of rows that are not lines of OpenAI's format.
    images : Path, optional
        Folder of the pictures, as given; by default that of the input, with which it may be moved.
    """

    prompt: str | None
    generate: dict[str, Any]
    seed: int
    max_batch: int
    allow_urls: bool
    schema: JsonSchema | None = None
    images: Path | None = None

    def check(self, blob: Blob) -> None:
        """Check the options that all requests have, before one is made.

        Raises
        ------
        QvlError
            A value is out of range, or no answer can match the schema.
        """
        names = {field.name for field in dataclasses.fields(Sampler)}
        Sampler(**{name: value for name, value in self.generate.items() if name in names})
        most = whole_number("max_new_tokens", self.generate.get("max_new_tokens", 0))
        if self.schema is not None:
            tokenizer = blob.family.tokenizer(blob.ranks, blob.config)
            self.schema.start(Answer(tokenizer, tokenizer.stop_ids, most, "", blob.family.grounding.constraint))

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts that answers depend on, as JSON types; `max_batch` is not among them."""
        schema = {} if self.schema is None else {"schema": self.schema.schema}
        images = {} if self.images is None else {"images": str(self.images)}
        return {"prompt": self.prompt, "seed": self.seed, "urls": self.allow_urls, **schema, **images, **self.generate}

    def seed_of(self, row_id: str) -> int:
        """Return the seed of a row, which is deterministic."""
        digest = hashlib.blake2b(f"{self.seed}:{row_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model file with its load options.

    Attributes
    ----------
    path : Path
    load : dict
        Options of `qvl_runtime.load`.
    """

    path: Path
    load: dict[str, Any]
