"""Tensor cores on sm_75, for which Triton's compiler (from 3.3 on) emits none.

The optimiser runs as for sm_80, which leaves mma.m16n8k16 in the PTX; the code generator runs for sm_75; and each such
instruction is then written as two of the m16n8k8 that Turing has. The halves of k of the operands lie in separate
registers (PTX ISA, "Matrix fragments for mma.m16n8k16"), so that only registers are regrouped. There is no asynchronous
copy on sm_75: `num_stages` must be 1.
"""

from __future__ import annotations

import re
from typing import Any

_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32\s+"
    r"(\{[^}]*\}),\s*\{([^}]*)\},\s*\{([^}]*)\},\s*(\{[^}]*\});"
)
_HALF_MMA = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"


def split_mma(ptx: str) -> str:
    """PTX with every m16n8k16 product written as two of m16n8k8."""

    def halves(match: re.Match) -> str:
        out, a, b, acc = match[1], *(re.split(r"\s*,\s*", match[i].strip()) for i in (2, 3)), match[4]
        return (
            f"{_HALF_MMA} {out}, {{ {a[0]}, {a[1]} }}, {{ {b[0]} }}, {acc};\n\t"
            f"{_HALF_MMA} {out}, {{ {a[2]}, {a[3]} }}, {{ {b[1]} }}, {out};"
        )

    return _MMA.sub(halves, ptx)


def stages(
    backend: Any, stages: dict | None = None, options: Any = None, language: Any = None, capability: int | None = None
) -> tuple[str, str] | None:
    """Triton's hook on the stages of a compilation; without `stages`, the key and hash for its cache."""
    if stages is None:
        return "turing-mma", "turing-mma-1"
    stages["ttgir"] = lambda source, metadata: backend.make_ttgir(source, metadata, options, 80)
    stages["ptx"] = lambda source, metadata: split_mma(backend.make_ptx(source, metadata, options, 75))
    return None
