"""The Qwen-7B decoder: embeddings in, logits out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from qvl_kernels.ops import Array, Norm, Ops, Weight
from qvl_runtime.engine.sequence import Context
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.weights import Trace, Weights, no_trace


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

    @classmethod
    def load(cls, weights: Weights, index: int) -> Block:
        """The `index`-th block of a model."""
        name = f"transformer.h.{index}"
        return cls(
            ln_1=weights.rms_norm(f"{name}.ln_1"),
            c_attn=weights.matrix(f"{name}.attn.c_attn"),
            attn_proj=weights.matrix(f"{name}.attn.c_proj"),
            ln_2=weights.rms_norm(f"{name}.ln_2"),
            w1=weights.matrix(f"{name}.mlp.w1"),
            w2=weights.matrix(f"{name}.mlp.w2"),
            mlp_proj=weights.matrix(f"{name}.mlp.c_proj"),
        )

    def __call__(self, ops: Ops, work: Workspace, context: Context, index: int) -> None:
        """Run over ``work.x`` in place, appending to `context`."""
        layer = context.layer(index)
        ops.linear(work.x, self.c_attn, out=work.qkv, norm=self.ln_1)
        ops.rope_append(
            work.qkv, rope=context.rope, logn=context.logn, cache=context.store, layer=layer, start=context.start
        )
        ops.cached_attention(work.qkv, context.store, layer, context.start, out=work.attended)
        ops.linear(work.attended, self.attn_proj, out=work.x, residual=work.x)
        ops.gate_up(work.x, self.w2, self.w1, out=work.hidden, norm=self.ln_2)
        ops.linear(work.hidden, self.mlp_proj, out=work.x, residual=work.x)


@dataclasses.dataclass(frozen=True, eq=False)
class Workspace:
    """Arrays for up to `rows` tokens at a time."""

    x: Array
    qkv: Array
    attended: Array
    hidden: Array

    @classmethod
    def empty(cls, ops: Ops, config: ModelConfig, rows: int) -> Workspace:
        """Uninitialised arrays for a model."""
        return cls(
            x=ops.empty((rows, config.hidden_size)),
            qkv=ops.empty((rows, 3 * config.attention_width), ops.activation_dtype),
            attended=ops.empty((rows, config.attention_width), ops.activation_dtype),
            hidden=ops.empty((rows, config.ffn_width), ops.activation_dtype),
        )

    def rows(self, count: int) -> Workspace:
        """The same arrays, cut to `count` tokens."""
        return Workspace(*(getattr(self, f.name)[:count] for f in dataclasses.fields(self)))


class Decoder:
    """All layers, the embedding and the output head."""

    def __init__(self, weights: Weights):
        self.ops, self.config = weights.ops, weights.blob.config
        self.embedding = weights.matrix("transformer.wte")
        self.blocks = [Block.load(weights, i) for i in range(self.config.num_hidden_layers)]
        self.ln_f = weights.rms_norm("transformer.ln_f")
        self.head = weights.matrix("lm_head")

    def workspace(self, rows: int) -> Workspace:
        """Arrays for up to `rows` tokens at a time."""
        return Workspace.empty(self.ops, self.config, rows)

    def embed(self, ids: Sequence[int], images: Sequence[tuple[int, Array]], out: Array) -> None:
        """Embed `ids` into `out` [T, hidden]; each (row, features) of `images` replaces rows from `row` on.

        Rows may begin before 0 or end beyond T: what lies outside is skipped.
        """
        self.ops.embed(self.ops.upload(np.asarray(ids, np.int32)), self.embedding, out=out)
        for row, features in images:
            first, last = max(row, 0), min(row + features.shape[0], len(ids))
            if first < last:
                self.ops.copy(features[first - row : last - row], out[first:last])

    def forward(self, work: Workspace, context: Context, trace: Trace = no_trace) -> None:
        """Run all layers over ``work.x`` in place, appending to `context` (whose length is not advanced)."""
        trace("embed", work.x)
        for i, block in enumerate(self.blocks):
            block(self.ops, work, context, i)
            trace(f"block{i}", work.x)

    def logits(self, x: Array, out: Array) -> None:
        """``out [T, vocab] = head(norm(x [T, hidden]))``."""
        self.ops.linear(x, self.head, out=out, norm=self.ln_f)


class DecodeStep:
    """A few tokens through the decoder, captured once for a context and replayed for all that follow.

    Attributes
    ----------
    logits : Array
        float32 ``[rows, vocab]``: row i speaks of what follows the i-th token fed.
    best : Array
        int32 ``[rows]``: the highest of each row of `logits`.
    """

    def __init__(self, decoder: Decoder, context: Context, rows: int = 1):
        ops = decoder.ops
        self.ops, self.decoder, self.context = ops, decoder, context
        self.work = decoder.workspace(rows)
        self.ids = ops.empty((rows,), np.int32)
        self.logits = ops.empty((rows, decoder.config.vocab_size))
        self.best = ops.empty((rows,), np.int32)
        self._store, self._replays = None, {}

    def __call__(self, *tokens: int) -> None:
        """Feed up to `rows` tokens."""
        self.context.reserve(self.context.length + len(tokens))
        self.ops.write(self.ids[: len(tokens)], np.array(tokens, np.int32))
        self._captured(len(tokens))()
        self.context.advance(len(tokens))

    def _captured(self, rows: int) -> Callable[[], None]:
        if self._store is not self.context.store:
            self._replays, self._store = {}, self.context.store
        if rows not in self._replays:
            self._replays[rows] = self.ops.capture(partial(self._step, rows))
        return self._replays[rows]

    def _step(self, rows: int) -> None:
        work, logits = self.work.rows(rows), self.logits[:rows]
        self.ops.embed(self.ids[:rows], self.decoder.embedding, out=work.x)
        self.decoder.forward(work, self.context)
        self.decoder.logits(work.x, logits)
        self.ops.argmax(logits, out=self.best[:rows])
