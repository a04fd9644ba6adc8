"""What `generation_config.json` says about prompts and sampling, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvl_runtime.families.reading import check, take


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What `generation_config.json` says about prompts and sampling.

    Attributes
    ----------
    chat_format : str
        "chatml" for a model that knows chat turns, else "raw".
    thinking : bool
        An answer begins with reasoning, up to ``</think>``.
    eos_token_id : tuple of int
        Tokens that end an answer, besides the tokenizer's own.
    """

    chat_format: str = "raw"
    eos_token_id: tuple[int, ...] = ()
    max_window_size: int = 6144
    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    thinking: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "generation_config.json") -> GenerationConfig:
        """Read a published `generation_config.json`; absent keys keep their defaults."""
        kinds = {"str": str, "int": int, "bool": bool, "float": float}
        values = {
            f.name: take(data, f.name, kinds[f.type], where)
            for f in dataclasses.fields(cls)
            if f.type in kinds and data.get(f.name) is not None
        }
        ends = data.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        config = cls(**values, eos_token_id=tuple(take({"eos_token_id": i}, "eos_token_id", int, where) for i in ends))
        check(
            config.chat_format in ("chatml", "raw"),
            where,
            f"'chat_format' is {config.chat_format!r}, expected 'chatml' or 'raw'",
        )
        return config

    @property
    def is_chat(self) -> bool:
        """Whether the model was trained for turns of a conversation."""
        return self.chat_format == "chatml"

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        ends = list(self.eos_token_id)
        return dataclasses.asdict(self) | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
