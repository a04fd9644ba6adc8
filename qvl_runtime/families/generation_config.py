"""Prompt and sampling settings of `generation_config.json`, for all families."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.errors import QvlError
from qvl_runtime.families.reading import check, take


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Prompt and sampling settings of `generation_config.json`.

    Attributes
    ----------
    chat_format : str
        "chatml" for a chat model, else "raw".
    thinking : bool
        Whether answers begin with reasoning, up to ``</think>``.
    eos_token_id : tuple of int
        Tokens that end an answer, in addition to the tokenizer's.
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
        """Parse a published `generation_config.json`; absent keys have their defaults, and a top_k of -1 means 0.

        Raises
        ------
        QvlError
            A value of a wrong type or out of range.
        """
        kinds = {"str": str, "int": int, "bool": bool, "float": float}
        values = {
            f.name: take(data, f.name, kinds[f.type], where)
            for f in dataclasses.fields(cls)
            if f.type in kinds and data.get(f.name) is not None
        }
        if values.get("top_k") == -1:  # as other programs write "off"
            values["top_k"] = 0
        ends = data.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        config = cls(**values, eos_token_id=tuple(take({"eos_token_id": i}, "eos_token_id", int, where) for i in ends))
        check(
            config.chat_format in ("chatml", "raw"),
            where,
            f"'chat_format' is {config.chat_format!r:.60}, expected 'chatml' or 'raw'",
        )
        for name, least in (("max_new_tokens", 1), ("max_window_size", 0)):
            value = getattr(config, name)
            check(value >= least, where, f"'{name}' is {value}, expected {least} or more")
        try:
            Sampler(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
        except QvlError as error:
            raise QvlError(f"{where}: {error}") from None
        return config

    def check_tokens(self, vocab_size: int, where: str) -> None:
        """Check that the tokens that end an answer are in the vocabulary."""
        for token in self.eos_token_id:
            check(0 <= token < vocab_size, where, f"'eos_token_id' is {token}, expected 0 to {vocab_size - 1}")

    @property
    def is_chat(self) -> bool:
        """Whether the model is a chat model."""
        return self.chat_format == "chatml"

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        ends = list(self.eos_token_id)
        return dataclasses.asdict(self) | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
