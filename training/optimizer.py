"""Muon for the matrices of the network's body, AdamW for everything else.

Muon (Jordan 2024): the momentum of a matrix is replaced by the nearest semi-orthogonal matrix, found by five
Newton-Schulz steps.
"""

from __future__ import annotations

import torch
from torch import nn


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """Five quintic Newton-Schulz steps in bfloat16 towards U V^T of g = U S V^T, a matrix or a stack of filters."""
    x = g.flatten(1).bfloat16()
    wide = g.shape[0] <= g[0].numel()
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x if wide else x.T).float().view_as(g)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum 0.95, orthogonalized, scaled by sqrt(max(1, rows / columns))."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["velocity"] = torch.zeros_like(p)
                velocity = state["velocity"]
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(velocity, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


SEEING = ("visual", "inner", "outer", "probe")
BODY = (".h.", "resblocks", "attn_pool.attn", "kv_proj", "conv1")


def build(modules: dict[str, nn.Module], rate: float = 1.0, vision: float = 1.0) -> list[torch.optim.Optimizer]:
    """The two optimizers over all trainable parameters of `modules`.

    `rate` scales all learning rates; `vision` also scales those outside the decoder.
    """
    named = [(f"{k}.{n}", p) for k, m in modules.items() for n, p in m.named_parameters() if p.requires_grad]

    def group(body: bool, seeing: bool, peak: float) -> dict:
        chosen = [
            p
            for n, p in named
            if (p.ndim > 1 and any(x in n for x in BODY)) == body and any(x in n for x in SEEING) == seeing
        ]
        return {"params": chosen, "lr": peak * rate * (vision if seeing else 1)}

    muon = [group(True, False, 0.02), group(True, True, 0.02)]
    adam = [group(False, False, 3e-3), group(False, True, 3e-3)]
    return [
        Muon([g for g in muon if g["params"]], weight_decay=0.03),
        torch.optim.AdamW([g for g in adam if g["params"]], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's first learning rate by `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * factor
