"""Qwen-VL in PyTorch, for training only: the published arithmetic with the published tensor names.

`QwenVL.state_dict()` is, key for key and shape for shape, a Qwen-VL checkpoint. Dynamic NTK and logn are left out:
training sequences are shorter than `seq_length`, where both are the identity.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention of [B, heads, T, d] with an additive mask; twice as fast on a CPU as the fused kernel."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=scores.dtype) @ v


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class VisionAttention(nn.Module):
    """Self-attention whose in_proj rows are, head by head, [q | k | v]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.in_proj(x).view(batch, tokens, self.heads, 3, width // self.heads).permute(3, 0, 2, 1, 4)
        y = attend(qkv[0], qkv[1], qkv[2])
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, width))


class VisionBlock(nn.Module):
    """A pre-norm transformer block with an erf GELU."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(width, mlp_width)
        self.mlp.c_proj = nn.Linear(mlp_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


def resample_grid(table: torch.Tensor, cells: int) -> torch.Tensor:
    """Bicubic interpolation of a square grid of vectors [n, width] to `cells` vectors."""
    old, new = math.isqrt(table.shape[0]), math.isqrt(cells)
    if old == new:
        return table
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(cells, -1)


def sincos_grid(side: int, width: int) -> torch.Tensor:
    """The fixed two-dimensional sine-cosine table [side * side, width]; the column's code comes first."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], 1)
    column = code[None].expand(side, side, -1)
    row = code[:, None].expand(side, side, -1)
    return torch.cat([column, row], 2).reshape(side * side, width).float()


class Resampler(nn.Module):
    """One cross-attention from learned queries to the patches: patches [B, P, kv] -> [B, n_queries, width]."""

    def __init__(self, n_queries: int, width: int, kv_width: int):
        super().__init__()
        self.heads = width // 128
        self.query = nn.Parameter(torch.randn(n_queries, width) * 0.02)
        self.pos_embed = nn.Parameter(sincos_grid(math.isqrt(n_queries), width), requires_grad=False)
        self.kv_proj = nn.Linear(kv_width, width, bias=False)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.Module()
        self.attn.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        kv = self.ln_kv(self.kv_proj(patches))
        query = self.ln_q(self.query) + self.pos_embed
        key = kv + resample_grid(self.pos_embed, kv.shape[1])
        wq, wk, wv = self.attn.in_proj_weight.chunk(3)
        bq, bk, bv = self.attn.in_proj_bias.chunk(3)

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

        q = split(F.linear(query, wq, bq)).expand(kv.shape[0], -1, -1, -1)
        y = attend(q, split(F.linear(key, wk, bk)), split(F.linear(kv, wv, bv)))
        return self.attn.out_proj(y.transpose(1, 2).flatten(2))


class VisionTower(nn.Module):
    """Normalized pixels float32 [B, 3, S, S] -> features [B, n_queries, output_dim]."""

    def __init__(self, image_size, patch_size, width, layers, heads, mlp_ratio, output_dim, n_queries=256, **_):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(256, width) * 0.02)
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            VisionBlock(width, heads, int(width * mlp_ratio)) for _ in range(layers)
        )
        self.attn_pool = Resampler(n_queries, output_dim, width)
        self.ln_post = nn.LayerNorm(output_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.randn(output_dim, output_dim) * output_dim**-0.5)

    def both(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches after the last block [B, P, width], and the features."""
        patch = self.conv1.kernel_size[0]
        x = F.unfold(pixels, patch, stride=patch).transpose(1, 2)
        x = F.linear(x, self.conv1.weight.flatten(1))
        x = self.ln_pre(x + resample_grid(self.positional_embedding, x.shape[1]))
        for block in self.transformer.resblocks:
            x = block(x)
        return x, self.ln_post(self.attn_pool(x)) @ self.proj

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.both(pixels)[1]


class DecoderBlock(nn.Module):
    """RMSNorm, attention with rope, RMSNorm, c_proj(w1(x) * silu(w2(x)))."""

    def __init__(self, config: dict):
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_epsilon"]
        inner, ffn = config["kv_channels"] * config["num_attention_heads"], config["intermediate_size"] // 2
        self.heads = config["num_attention_heads"]
        self.ln_1 = RMSNorm(hidden, eps)
        self.attn = nn.Module()
        self.attn.c_attn = nn.Linear(hidden, 3 * inner)
        self.attn.c_proj = nn.Linear(inner, hidden, bias=False)
        self.ln_2 = RMSNorm(hidden, eps)
        self.mlp = nn.Module()
        self.mlp.w1 = nn.Linear(hidden, ffn, bias=False)
        self.mlp.w2 = nn.Linear(hidden, ffn, bias=False)
        self.mlp.c_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x, cos, sin, mask, chosen=None):
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Training also looks at where attention goes.
        q, k = self.attn.seen = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin)
        y = attend(q, k, qkv[2], mask).transpose(1, 2).flatten(2)
        if chosen is not None:
            x, y = x[chosen], y[chosen]
        x = x + self.attn.c_proj(y)
        h = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(h) * F.silu(self.mlp.w2(h)))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding of x [B, heads, T, d] by tables [B, 1, T, d/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class QwenVL(nn.Module):
    """The whole model, built from a config.json dictionary."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        hidden = config["hidden_size"]
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(config["vocab_size"], hidden)
        self.transformer.h = nn.ModuleList(DecoderBlock(config) for _ in range(config["num_hidden_layers"]))
        self.transformer.ln_f = RMSNorm(hidden, config["layer_norm_epsilon"])
        self.transformer.visual = VisionTower(**config["visual"])
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def hidden(self, ids, features=None, positions=None, mask=None, chosen=None):
        """Normalized hidden states [B, T, hidden].

        Parameters
        ----------
        ids : int64 [B, T]
            Tokens; the places after each `<img>` are taken by `features`.
        features : [N, n_queries, hidden], optional
            Picture features in the order of the `<img>` tags, row by row.
        positions : int64 [B, T], optional
            Rotary positions, 0..T-1 when left out.
        mask : [B, 1, T, T], optional
            Added to the attention scores; causal when left out.
        chosen : (rows, columns), optional
            The only places whose states are wanted: the result is [len(rows), hidden].
        """
        x = self.transformer.wte(ids)
        if features is not None:
            rows, starts = (ids == self.config["visual"]["image_start_id"]).nonzero(as_tuple=True)
            columns = starts[:, None] + 1 + torch.arange(features.shape[1], device=ids.device)
            x = x.index_put((rows[:, None].expand_as(columns), columns), features.to(x.dtype))
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if mask is None:
            mask = torch.full((ids.shape[1],) * 2, float("-inf"), device=ids.device).triu(1)
        dim = self.config["kv_channels"]
        inv = self.config["rotary_emb_base"] ** (-torch.arange(0, dim, 2, device=ids.device).float() / dim)
        angle = positions[:, None, :, None].float() * inv
        cos, sin = angle.cos(), angle.sin()
        if torch.is_autocast_enabled(ids.device.type):
            cos, sin = cos.bfloat16(), sin.bfloat16()
        *body, last = self.transformer.h
        for block in body:
            x = block(x, cos, sin, mask)
        return self.transformer.ln_f(last(x, cos, sin, mask, chosen))

    def forward(self, ids, pixels=None, positions=None, mask=None):
        """Logits [B, T, vocab]."""
        features = None if pixels is None else self.transformer.visual(pixels)
        return self.lm_head(self.hidden(ids, features, positions, mask))
