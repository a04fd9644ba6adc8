"""A decoder-only transformer with SwiGLU and RMSNorm, shared by families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qvl_kernels.ops import Array, Attended, Norm, Ops, Weight
from qvl_runtime.engine.decoder import Features, Span
from qvl_runtime.engine.sequence import Rotary, SequenceState
from qvl_runtime.families.weights import Weights
from qvl_runtime.trace import Trace, no_trace

if TYPE_CHECKING:
    from qvl_runtime.families.config import Config


@dataclasses.dataclass(frozen=True)
class DecoderNames:
    """Base names of a decoder's tensors in the blob.

    Names of a layer are prefixed with ``{layer}.{index}.``. `q_norm` and `k_norm` are None for a family without
    normalization of queries and keys. A tied head has the embedding's name.
    """

    embedding: str
    layer: str
    attention_norm: str
    qkv: str
    attention_out: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    norm: str
    head: str
    q_norm: str | None = None
    k_norm: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Attention and a SwiGLU feed-forward, each after an RMSNorm."""

    attention_norm: Norm
    qkv: Weight
    q_norm: Norm | None
    k_norm: Norm | None
    attention_out: Weight
    mlp_norm: Norm
    gate: Weight
    up: Weight
    down: Weight

    @classmethod
    def load(cls, weights: Weights, names: DecoderNames, index: int) -> Block:
        """Load the `index`-th block of a model."""

        def name(part: str) -> str:
            return f"{names.layer}.{index}.{part}"

        return cls(
            attention_norm=weights.rms_norm(name(names.attention_norm)),
            qkv=weights.matrix(name(names.qkv)),
            q_norm=None if names.q_norm is None else weights.rms_norm(name(names.q_norm)),
            k_norm=None if names.k_norm is None else weights.rms_norm(name(names.k_norm)),
            attention_out=weights.matrix(name(names.attention_out)),
            mlp_norm=weights.rms_norm(name(names.mlp_norm)),
            gate=weights.matrix(name(names.gate)),
            up=weights.matrix(name(names.up)),
            down=weights.matrix(name(names.down)),
        )

    def __call__(self, ops: Ops, work: Workspace, spans: Sequence[Span], index: int) -> None:
        """Run on ``work.x`` in place and append keys and values to the sequences."""
        ops.linear(work.x, self.qkv, out=work.qkv, norm=self.attention_norm)
        sequences = [
            Attended(count, s.rotary.rope, s.rotary.logn, s.store, s.layer(index), s.start) for s, count in spans
        ]
        ops.attend(work.qkv, sequences, out=work.attended, q_norm=self.q_norm, k_norm=self.k_norm)
        ops.linear(work.attended, self.attention_out, out=work.x, residual=work.x)
        ops.gate_up(work.x, self.gate, self.up, out=work.hidden, norm=self.mlp_norm)
        ops.linear(work.hidden, self.down, out=work.x, residual=work.x)


@dataclasses.dataclass(frozen=True, eq=False)
class Workspace:
    """Arrays for up to `rows` tokens."""

    x: Array
    qkv: Array
    attended: Array
    hidden: Array

    @classmethod
    def empty(cls, ops: Ops, config: Config, rows: int) -> Workspace:
        """Allocate uninitialized arrays for a model."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return cls(
            x=ops.empty((rows, config.hidden_size)),
            qkv=ops.empty((rows, (heads + 2 * kv_heads) * config.head_dim), ops.activation_dtype),
            attended=ops.empty((rows, heads * config.head_dim), ops.activation_dtype),
            hidden=ops.empty((rows, config.ffn_width), ops.activation_dtype),
        )

    def rows(self, count: int) -> Workspace:
        """Return views of the first `count` tokens."""
        return Workspace(*(getattr(self, f.name)[:count] for f in dataclasses.fields(self)))


class Decoder:
    """All layers, the embedding and the output head: `qvl_runtime.engine.decoder.Decoder`.

    Parameters
    ----------
    weights : Weights
    names : DecoderNames
    rotary : callable
        Creates a sequence's `Rotary` from the backend, the config and a capacity.
    context : int, optional
        Expected length of a sequence, if less than the model's window.
    """

    def __init__(
        self,
        weights: Weights,
        names: DecoderNames,
        rotary: Callable[[Ops, Any, int], Rotary],
        context: int | None = None,
    ):
        self._context = context
        self.ops, self.config, self._rotary = weights.ops, weights.config, rotary
        self.vocab_size = self.config.vocab_size
        self.embedding = weights.matrix(names.embedding)
        self.blocks = [Block.load(weights, names, i) for i in range(self.config.num_hidden_layers)]
        self.norm = weights.rms_norm(names.norm)
        self.head = self.embedding if names.head == names.embedding else weights.matrix(names.head)
        products = [w for b in self.blocks for w in (b.qkv, b.attention_out, b.gate, b.up, b.down)]
        width = self.config.num_attention_heads * self.config.head_dim
        self.coarse = self.ops.coarse_attention(width) or any(self.ops.coarse(w) for w in products)

    def sequence(self, dtype: str, capacity: int, layers: int | None = None) -> SequenceState:
        def rotary(capacity: int) -> Rotary:
            return self._rotary(self.ops, self.config, capacity)

        return SequenceState(self.ops, self.config, rotary, dtype, capacity, layers, self._context)

    def workspace(self, rows: int) -> Workspace:
        return Workspace.empty(self.ops, self.config, rows)

    def embed(self, ids: Array, out: Array) -> None:
        self.ops.embed(ids, self.embedding, out=out)

    def forward(
        self, work: Workspace, spans: Sequence[Span], pictures: Sequence[Features] = (), trace: Trace = no_trace
    ) -> None:
        place_features(self.ops, pictures, 0, work.x)
        trace("embed", work.x)
        for i, block in enumerate(self.blocks):
            block(self.ops, work, spans, i)
            place_features(self.ops, pictures, i + 1, work.x)
            trace(f"block{i}", work.x)

    def logits(self, x: Array, out: Array) -> None:
        self.ops.linear(x, self.head, out=out, norm=self.norm)


def place_features(ops: Ops, pictures: Sequence[Features], level: int, x: Array) -> None:
    """Write a level of pictures' features to their rows of `x`, float32 ``[T, hidden]``.

    Level 0 replaces rows; level j + 1, if any, is added after layer j.
    """
    for picture in pictures:
        end = x.shape[0] if picture.last is None else picture.last
        first, last = max(picture.row, picture.first), min(picture.row + picture.count, end)
        if first >= last or (level + 1) * picture.count > picture.values.shape[0]:
            continue
        offset = level * picture.count - picture.row
        values, rows = picture.values[offset + first : offset + last], x[first:last]
        if level:
            ops.add(rows, values, out=rows)
        else:
            ops.copy(values, rows)
