"""Which instructions the kernels are written for, settled before anything is compiled.

A wrong choice kills the process, so it is taken from what LLVM reports of this processor. ``QVL_CPU`` overrides it
(for tests, or to get around a broken report) with one of `LEVELS`; the code is then compiled for that level's own
processor model, so that nothing newer slips in.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import platform

import llvmlite.binding as llvm


@dataclasses.dataclass(frozen=True)
class Level:
    """One way to multiply bytes.

    Attributes
    ----------
    name : str
        The value of ``QVL_CPU`` that selects it.
    product : str
        How four bytes are multiplied and summed: "vnni", "maddubs", "sdot", or "shifts" and plain multiplications.
    lanes : int
        32-bit lanes of a register.
    needs : tuple of str
        LLVM features that must all be present.
    cpu, features : str
        LLVM's processor model and features to compile for when the level is forced.
    """

    name: str
    product: str
    lanes: int
    needs: tuple[str, ...]
    cpu: str
    features: str

    @property
    def byte_bias(self) -> int:
        """Arbitrary bytes are multiplied less this: `sdot` knows only signed ones."""
        return 128 if self.product == "sdot" else 0


VNNI = ("avx512vnni", "avx512vl")
LEVELS = {
    level.name: level
    for level in (
        Level("avx512", "vnni", 16, (*VNNI, "avx512bw", "avx512dq", "f16c"), "cascadelake", ""),
        Level("avxvnni", "vnni", 8, ("avxvnni", "avx2", "fma", "f16c"), "alderlake", ""),
        # The blocking and the byte products of `avxvnni`, in the encoding of AVX-512.
        Level("vnni256", "vnni", 8, (*VNNI, "avx2", "fma", "f16c"), "haswell", "+" + ",+".join(VNNI)),
        Level("avx2", "maddubs", 8, ("avx2", "fma", "f16c"), "haswell", ""),
        Level("neon", "sdot", 4, ("neon", "dotprod"), "generic", "+neon,+dotprod"),
        Level("plain", "shifts", 4, (), "generic", ""),
    )
}
"""Best first."""


AT_HWCAP, HWCAP_ASIMDDP = 16, 1 << 20
"""Of Linux on AArch64: which word of the auxiliary vector holds the features, and the dot product's bit in it."""


def _has_arm_dot_product() -> bool:
    """Every Mac has it; LLVM's own list leaves it out there and, in older releases, on Linux."""
    if platform.system() == "Linux":
        return bool(ctypes.CDLL(None).getauxval(ctypes.c_ulong(AT_HWCAP)) & HWCAP_ASIMDDP)
    return platform.system() == "Darwin"


@functools.cache
def host_features() -> frozenset[str]:
    """LLVM's names of the instruction sets of this processor."""
    try:
        found = {name for name, present in llvm.get_host_cpu_features().items() if present}
    except RuntimeError:
        found = set()
    if platform.machine() in ("aarch64", "arm64") and _has_arm_dot_product():
        found |= {"neon", "dotprod"}
    return frozenset(found)


@functools.cache
def selected() -> Level:
    """The best level this processor has, or the one ``QVL_CPU`` names."""
    name = os.environ.get("QVL_CPU", "")
    if not name:
        return next(level for level in LEVELS.values() if host_features().issuperset(level.needs))
    if name not in LEVELS:
        raise ValueError(f"QVL_CPU={name}: expected one of {', '.join(LEVELS)}")
    missing = set(LEVELS[name].needs) - host_features()
    if missing:
        raise ValueError(f"QVL_CPU={name}: this processor lacks {', '.join(sorted(missing))}; unset QVL_CPU")
    return LEVELS[name]


@functools.cache
def target() -> tuple[str, str]:
    """LLVM's processor model and feature string to compile for."""
    level = selected()
    if os.environ.get("QVL_CPU"):
        return level.cpu, level.features
    # LLVM may know the model and still not switch on what a hypervisor hides, so each feature is stated.
    return llvm.get_host_cpu_name(), ",".join("+" + name for name in sorted(host_features()))
