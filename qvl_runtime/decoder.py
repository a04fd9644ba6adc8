"""The Qwen-7B decoder: embeddings in, logits out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qvl_kernels.ops import Array, Norm, Weight
from qvl_runtime.kv_cache import Context
from qvl_runtime.weights import Trace, Weights, no_trace


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Attention and a SwiGLU feed-forward, each behind an RMSNorm.

    The published names are kept: the feed-forward is ``c_proj(w1(x) * silu(w2(x)))``.
    """

    ln_1: Norm
    c_attn: Weight
    attn_proj: Weight
    ln_2: Norm
    w1: Weight
    w2: Weight
    mlp_proj: Weight


@dataclasses.dataclass(frozen=True, eq=False)
class Workspace:
    """Arrays for up to `rows` tokens at a time."""

    x: Array
    qkv: Array
    attended: Array
    hidden: Array

    def rows(self, count: int) -> Workspace:
        """The same arrays, cut to `count` tokens."""
        return Workspace(*(getattr(self, f.name)[:count] for f in dataclasses.fields(self)))


class Decoder:
    """All layers, the embedding and the output head."""

    def __init__(self, weights: Weights):
        self.ops, self.config = weights.ops, weights.blob.config
        self.embedding = weights.matrix("transformer.wte")
        self.blocks = [_block(weights, f"transformer.h.{i}") for i in range(self.config.num_hidden_layers)]
        self.ln_f = weights.rms_norm("transformer.ln_f")
        self.head = weights.matrix("lm_head")

    def workspace(self, rows: int) -> Workspace:
        """Arrays for up to `rows` tokens at a time."""
        ops, config = self.ops, self.config
        return Workspace(
            x=ops.empty((rows, config.hidden_size)),
            qkv=ops.empty((rows, 3 * config.attention_width), ops.activation_dtype),
            attended=ops.empty((rows, config.attention_width), ops.activation_dtype),
            hidden=ops.empty((rows, config.ffn_width), ops.activation_dtype),
        )

    def embed(self, ids: Sequence[int], images: Sequence[tuple[int, Array]], out: Array) -> None:
        """Embed `ids` into `out` [T, hidden]; each (row, features) of `images` replaces rows from `row` on.

        Rows may begin before 0 or end beyond T: what lies outside is skipped.
        """
        self.ops.embed(self.ops.upload(np.asarray(ids, np.int32)), self.embedding, out)
        for row, features in images:
            first, last = max(row, 0), min(row + features.shape[0], len(ids))
            if first < last:
                self.ops.copy(features[first - row : last - row], out[first:last])

    def forward(self, work: Workspace, context: Context, trace: Trace = no_trace) -> None:
        """Run all layers over ``work.x`` in place, appending to `context` (whose length is not advanced)."""
        ops = self.ops
        trace("embed", work.x)
        for i, block in enumerate(self.blocks):
            ops.linear(work.x, block.c_attn, work.qkv, norm=block.ln_1)
            layer = context.layer(i)
            ops.rope_append(work.qkv, context.rope, context.logn, context.store, layer, context.start)
            ops.cached_attention(work.qkv, context.store, layer, context.start, work.attended)
            ops.linear(work.attended, block.attn_proj, work.x, residual=work.x)
            ops.gate_up(work.x, block.w2, block.w1, work.hidden, norm=block.ln_2)
            ops.linear(work.hidden, block.mlp_proj, work.x, residual=work.x)
            trace(f"block{i}", work.x)

    def logits(self, x: Array, out: Array) -> None:
        """``out [T, vocab] = head(norm(x [T, hidden]))``."""
        self.ops.linear(x, self.head, out, norm=self.ln_f)


class DecodeStep:
    """One token through the decoder, captured once for a context and replayed for every token."""

    def __init__(self, decoder: Decoder, context: Context):
        ops = decoder.ops
        self.ops, self.decoder, self.context = ops, decoder, context
        self.work = decoder.workspace(1)
        self.ids = ops.empty((1,), np.int32)
        self.logits = ops.empty((1, decoder.config.vocab_size))
        self.best = ops.empty((1,), np.int32)
        self._store, self._replay = None, None

    def _step(self) -> None:
        self.ops.embed(self.ids, self.decoder.embedding, self.work.x)
        self.decoder.forward(self.work, self.context)
        self.decoder.logits(self.work.x, self.logits)
        self.ops.argmax(self.logits, self.best)

    def __call__(self, token: int) -> None:
        """Feed `token`: afterwards `logits` and `best` speak of the one that follows it."""
        self.context.reserve(self.context.length + 1)
        self.ops.write(self.ids, np.array([token], np.int32))
        self._captured()()
        self.context.advance(1)

    def _captured(self) -> Callable[[], None]:
        if self._store is not self.context.store:
            self._replay, self._store = self.ops.capture(self._step), self.context.store
        return self._replay


def _block(weights: Weights, name: str) -> Block:
    return Block(
        ln_1=weights.rms_norm(f"{name}.ln_1"),
        c_attn=weights.matrix(f"{name}.attn.c_attn"),
        attn_proj=weights.matrix(f"{name}.attn.c_proj"),
        ln_2=weights.rms_norm(f"{name}.ln_2"),
        w1=weights.matrix(f"{name}.mlp.w1"),
        w2=weights.matrix(f"{name}.mlp.w2"),
        mlp_proj=weights.matrix(f"{name}.mlp.c_proj"),
    )
