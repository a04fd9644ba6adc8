"""Selection of the instruction set, before compilation.

An unsupported instruction kills the process, so the selection follows LLVM's report of this processor. ``QVL_CPU``
overrides it with one of `LEVELS` (for tests, or if the report is wrong); the code is then compiled for that level's
processor model, so that it contains no newer instructions.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import platform

import llvmlite.binding as llvm

from qvl_kernels.ops import DeviceError


@dataclasses.dataclass(frozen=True)
class Level:
    """A method of multiplying bytes.

    Attributes
    ----------
    name : str
        The value of ``QVL_CPU`` that selects it.
    product : str
        Instruction for the dot product of four bytes: "vnni", "maddubs", "sdot", or "shifts" with multiplications.
    lanes : int
        Number of 32-bit lanes of a register.
    needs : tuple of str
        Required LLVM features.
    cpu, features : str
        LLVM's processor model and features to compile for when the level is forced, and for machine code that ships
        (`bundle`). They switch on nothing that `needs` does not name.
    machines : tuple of str
        Kinds of machine that pick the level by themselves, as `bundle` names them.
    """

    name: str
    product: str
    lanes: int
    needs: tuple[str, ...]
    cpu: str
    features: str
    machines: tuple[str, ...]

    @property
    def byte_bias(self) -> int:
        """Subtracted from arbitrary bytes before multiplication: `sdot` only supports signed bytes."""
        return 128 if self.product == "sdot" else 0

    @property
    def words(self) -> bool:
        """Whether activations are words of 16 bits in products of int8 weights, and of others by several vectors.

        It is twice as fast where a product of 32 arbitrary bytes takes four multiplications, two for each half of their
        range. Inner loops are in assembler then (`simd.assembly`, `simd.assembly_few`).
        """
        return self.product == "maddubs"

    @property
    def matrix(self) -> bool:
        """Whether one instruction multiplies eight columns of two rows of bytes by those of two vectors (`smmla`).

        It has twice the products of `sdot`. Products of many rows use it.
        """
        return "i8mm" in self.needs

    @property
    def unpacks(self) -> bool:
        """Whether products of many rows unpack weights before they multiply them (`unpacking`).

        It pays where unpacking and spreading activations take the pipes of the multiplications.
        """
        return self.words or self.product == "sdot"


V3 = ("sse4.2", "popcnt", "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
"""What LLVM may use for x86-64-v3 and -v4, the levels of the System V ABI for x86-64."""
VNNI = ("avx512vnni", "avx512vl")
LEVELS = {
    level.name: level
    for level in (
        # Registers of 512 bits are preferred, as LLVM does by itself on the processor the tiles were chosen on (Zen 4).
        Level("avx512", "vnni", 16, (*V4, *VNNI), "x86-64-v4", "+avx512vnni,-prefer-256-bit", ("x86_64",)),
        Level("avxvnni", "vnni", 8, (*V3, "avxvnni"), "x86-64-v3", "+avxvnni", ("x86_64",)),
        # The blocking and byte products of `avxvnni` in AVX-512 encoding.
        Level("vnni256", "vnni", 8, (*V4, *VNNI), "x86-64-v3", "+" + ",+".join(VNNI), ()),
        Level("avx2", "maddubs", 8, V3, "x86-64-v3", "", ("x86_64",)),
        Level("i8mm", "sdot", 4, ("neon", "dotprod", "i8mm"), "generic", "+neon,+dotprod,+i8mm", ("aarch64",)),
        Level("neon", "sdot", 4, ("neon", "dotprod"), "generic", "+neon,+dotprod", ("aarch64",)),
        Level("plain", "shifts", 4, (), "generic", "", ("x86_64", "aarch64")),
    )
}
"""Levels in order of preference."""


ARM_BITS = {"dotprod": (16, 1 << 20), "i8mm": (26, 1 << 13)}
"""Linux on AArch64: index of a word in the auxiliary vector (AT_HWCAP, AT_HWCAP2), and a feature's bit in it."""


def _arm_features() -> set[str]:
    """Return the features of `ARM_BITS`. LLVM's list omits them on macOS and, in older releases, on Linux."""
    if platform.system() == "Linux":
        library = ctypes.CDLL(None)
        library.getauxval.restype = ctypes.c_ulong
        words = {name: library.getauxval(ctypes.c_ulong(index)) & bit for name, (index, bit) in ARM_BITS.items()}
        return {name for name, word in words.items() if word}
    if platform.system() == "Darwin":
        found, size = ctypes.c_int(0), ctypes.c_size_t(4)
        ask = ctypes.CDLL(None).sysctlbyname
        ask(b"hw.optional.arm.FEAT_I8MM", ctypes.byref(found), ctypes.byref(size), None, ctypes.c_size_t(0))
        return {"dotprod", "i8mm"} if found.value else {"dotprod"}
    return set()


@functools.cache
def host_features() -> frozenset[str]:
    """Return LLVM's names of this processor's instruction sets."""
    try:
        found = {name for name, present in llvm.get_host_cpu_features().items() if present}
    except RuntimeError:
        found = set()
    if platform.machine() in ("aarch64", "arm64"):
        found |= {"neon"} | _arm_features()
    return frozenset(found)


_compiled_for: list[Level] = []


def compile_for(name: str) -> None:
    """Compile for a level in this process, whatever this processor has, and run none of it."""
    _compiled_for[:] = [LEVELS[name]]
    selected.cache_clear()
    target.cache_clear()


@functools.cache
def selected() -> Level:
    """Return the level of ``QVL_CPU``, else the best one of this processor.

    Raises
    ------
    DeviceError
        There is no such level, or this processor does not have it.
    """
    if _compiled_for:
        return _compiled_for[0]
    name = os.environ.get("QVL_CPU", "")
    if not name:
        return next(level for level in LEVELS.values() if host_features().issuperset(level.needs))
    if name not in LEVELS:
        raise DeviceError(f"QVL_CPU={name}: expected one of {', '.join(LEVELS)}")
    missing = set(LEVELS[name].needs) - host_features()
    if missing:
        raise DeviceError(f"QVL_CPU={name}: this processor lacks {', '.join(sorted(missing))}; unset QVL_CPU")
    return LEVELS[name]


@functools.cache
def target() -> tuple[str, str]:
    """Return LLVM's processor model and feature string."""
    level = selected()
    if _compiled_for or os.environ.get("QVL_CPU"):
        return level.cpu, level.features
    # A hypervisor may hide features of the model, so each feature is listed.
    return llvm.get_host_cpu_name(), ",".join("+" + name for name in sorted(host_features()))
