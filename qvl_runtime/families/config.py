"""What the program asks of every family's config."""

from __future__ import annotations

from typing import Any, Protocol

from qvl_runtime.engine.sequence import Shape


class Config(Shape, Protocol):
    """What every family's config says of its decoder."""

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
        """The values as JSON types, with `model_type`; `Family.read_config` reads them back."""
