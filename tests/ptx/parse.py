"""PTX text to instructions (PTX ISA 8.7, "Syntax" and "State spaces")."""

from __future__ import annotations

import dataclasses
import re

from ptx.errors import PtxError


@dataclasses.dataclass(frozen=True)
class Register:
    """A virtual register: its index in the register file and its width in bits (1: a predicate)."""

    slot: int
    width: int


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A number in the text; `bits` is set for floats, which are written as their bits."""

    value: int
    bits: int | None = None


@dataclasses.dataclass(frozen=True)
class Special:
    """A register the hardware fills: ``%tid.x`` and the like."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``; of a parameter, its name."""

    base: Register | Immediate | str
    offset: int


Scalar = Register | Immediate | Special
Operand = Scalar | Address | tuple[Scalar | None, ...] | str
"""A tuple is a vector ``{a, b}``; None stands for ``_``; a string is a label."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes
    ----------
    guard : Register or None
        Threads where it is false (or true, if `negated`) skip the instruction.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int

    @property
    def location(self) -> str:
        return f"line {self.line}: {self.opcode}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes
    ----------
    parameters : dict of str to int
        Name -> width in bits, in order.
    threads : int
        Of a block.
    labels : dict of str to int
        Name -> index of the instruction that follows.
    widths : tuple of int
        Of a thread's registers, by slot.
    """

    name: str
    parameters: dict[str, int]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    widths: tuple[int, ...]


_STATEMENT = re.compile(
    r"\s*(?:(?P<label>[$\w]+):(?!:)|(?P<open>\{)(?=\s*\.reg)|(?P<close>\})|"
    r"(?P<text>(?:[^;:{}]|::|\{[^{};]*\})*);)"
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_SHARED_BASE = "global_smem"
_SCALAR_BITS = {"pred": 1}


def parse(text: str) -> Program:
    """The one kernel of a module.

    Raises
    ------
    PtxError
        For what the interpreter does not know.
    """
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\(", text)
    if entry is None or text.count(".entry") != 1:
        raise PtxError("a module has one kernel here")
    if re.search(r"\.shared(?! \.align \d+ \.b8 global_smem\[\])", text[: entry.start()]):
        raise PtxError("shared memory is expected as global_smem alone")
    header_end = text.index(")", entry.end())
    parameters = {
        name: int(kind[1:])
        for kind, name in re.findall(r"\.param \.(\w+)[^,\n]*?(\w+)\s*(?:,|$)", text[entry.end() : header_end], re.M)
    }
    body = text.index("{", header_end)
    threads = re.search(r"\.reqntid (\d+)\s*\n", text[header_end:body])
    if threads is None:
        raise PtxError("a kernel states its threads (.reqntid)")
    reader = _Reader(text, body + 1)
    widths = tuple(register.width for register in reader.slots.values())
    return Program(entry[1], parameters, int(threads[1]), tuple(reader.instructions), reader.labels, widths)


class _Reader:
    """Walks through a kernel's body."""

    def __init__(self, text: str, begin: int):
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.slots: dict[str, Register] = {}
        self._ranges: dict[str, int] = {}  # prefix of registers declared as %r<100> -> width
        self._scopes: list[dict[str, int]] = []  # widths of the registers declared in each open brace
        self._line = 1 + text.count("\n", 0, begin)
        self._opened = 0
        at = begin
        while True:
            match = _STATEMENT.match(text, at)
            if match is None:
                raise PtxError(f"line {self._line}: cannot be read: {text[at : at + 60].strip()!r}")
            begin = match.end() - len(match[0].lstrip())
            self._line += text.count("\n", at, begin)
            if match["close"] and not self._scopes:
                return
            self._statement(match)
            self._line += text.count("\n", begin, match.end())
            at = match.end()

    def _statement(self, match: re.Match) -> None:
        if match["label"]:
            self.labels[match["label"]] = len(self.instructions)
        elif match["open"]:
            self._scopes.append({})
            self._opened += 1
        elif match["close"]:
            self._scopes.pop()
        else:
            text = " ".join(match["text"].split())
            if text.startswith(".reg"):
                self._declare(text)
            elif text and not text.startswith((".loc", ".pragma")):
                self.instructions.append(self._instruction(text))

    def _declare(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
        width = _SCALAR_BITS.get(kind) or int(kind[1:])
        for name in re.split(r"\s*,\s*", names):
            many = re.fullmatch(r"(%\w+)<\d+>", name)
            if many:
                self._ranges[many[1]] = width
            else:
                self._scopes[-1][name] = width

    def _instruction(self, text: str) -> Instruction:
        guard, negated = None, False
        guarded = re.match(r"@(!?)(%\w+) (.*)", text)
        if guarded:
            guard, negated, text = self._register(guarded[2]), bool(guarded[1]), guarded[3]
        opcode, _, rest = text.partition(" ")
        operands = tuple(self._operand(part.strip(), opcode) for part in _OPERAND.findall(rest))
        return Instruction(opcode, operands, guard, negated, self._line)

    def _operand(self, text: str, opcode: str) -> Operand:
        if text[0] == "{":
            parts = (part.strip() for part in text[1:-1].split(","))
            return tuple(None if part == "_" else self._scalar(part) for part in parts)
        if text[0] == "[":
            base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text).groups()
            named = base if opcode.startswith("ld.param") else self._scalar(base)
            return Address(named, int(offset or "0", 0))
        if opcode.startswith("bra"):
            return text
        if opcode.startswith("shfl") and "|" in text:
            raise PtxError(f"line {self._line}: shfl with a predicate is not known")
        return self._scalar(text)

    def _scalar(self, text: str) -> Scalar:
        if text == _SHARED_BASE:
            return Immediate(0)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Immediate(int(text[2:], 16), 32)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if "." in text:
            return Special(text)
        return self._register(text)

    def _register(self, text: str) -> Register:
        for depth in range(len(self._scopes), 0, -1):
            if text in self._scopes[depth - 1]:
                # each brace has registers of its own
                return self._slot(f"{text}@{self._opened}", self._scopes[depth - 1][text])
        prefix = re.match(r"%[a-z]+", text)
        if prefix is None or prefix[0] not in self._ranges:
            raise PtxError(f"line {self._line}: {text!r} is not known")
        return self._slot(text, self._ranges[prefix[0]])

    def _slot(self, name: str, width: int) -> Register:
        return self.slots.setdefault(name, Register(len(self.slots), width))
