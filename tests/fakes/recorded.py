"""A backend that keeps what its products multiply."""

import numpy as np


class Recorded:
    """Another backend, whose products' inputs, after the norm, are in `inputs`, by the id of the weight."""

    def __init__(self, ops):
        self.ops, self.inputs = ops, {}

    def __getattr__(self, name):
        return getattr(self.ops, name)

    def linear(self, x, w, *, norm=None, **rest):
        self.keep(x, norm, w)
        self.ops.linear(x, w, norm=norm, **rest)

    def gate_up(self, x, gate, up, *, norm, **rest):
        self.keep(x, norm, gate, up)
        self.ops.gate_up(x, gate, up, norm=norm, **rest)

    def keep(self, x, norm, *weights):
        seen = np.array(x)
        if norm is not None:
            self.ops.normalize(x, norm, out=seen)
        for w in weights:
            self.inputs.setdefault(id(w), []).append(seen)
