"""The interface of every family's config."""

from __future__ import annotations

from typing import Any, Protocol

from qvl_runtime.engine.sequence import Shape


class Config(Shape, Protocol):
    """The decoder settings that every family's config has."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def ffn_width(self) -> int: ...

    @property
    def norm_eps(self) -> float:
        """Epsilon of the decoder's norms."""

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types, with `model_type`. `Family.read_config` is the inverse."""
