"""Check that a JSON schema allows a finite document, and that llguidance computes its numbers exactly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from qvl_runtime.errors import QvlError

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that JSON would have to write with a numeric escape; see `constraints.NOTATION`."""
INDEX = re.compile("0|[1-9][0-9]{0,8}")
LARGEST = 1 << 53
"""llguidance computes with float64. Larger numbers are rounded, and some of about 1 << 63 crash the process."""
MULTIPLES = 100_000
"""Largest common multiple of all multipleOf of a schema, as whole numbers without zeros at the end. llguidance takes up
to 20 microseconds and a kilobyte for each number below it, and cannot be stopped."""
PATTERNS = 64
"""Largest number of patternProperties of a schema, of which llguidance compares each with all others."""
POWERS = 22
"""float64 has these powers of ten exactly. A product of one with a factor up to `LARGEST` is rounded once only."""


def check_schema(schema: str) -> None:
    """Refuse a schema that llguidance would take for another one, or on which it would compute for minutes.

    Parameters
    ----------
    schema : str
        JSON. What is none is not checked here.

    Raises
    ------
    QvlError
        Names the key and the value.
    """
    multiple, patterns = 1, 0
    try:
        parsed = json.loads(schema, parse_int=Decimal, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError):  # ArithmeticError: 1e99999999999999999999
        return
    for node in _nodes(parsed):
        for key, value in _values(node):
            if isinstance(value, str) and CONTROL.search(value):
                raise QvlError(
                    f"the json_schema cannot be used: its {key} {value!a:.40} has a control character that no "
                    "answer has; leave it out"
                )
            if isinstance(value, Decimal) and not _is_exact(value):
                raise QvlError(
                    f"the json_schema cannot be used: its {key} {value!s:.40} would be rounded; use numbers of at most "
                    "15 digits"
                )
        for key, bound in _included(node):
            remedy = "minimum with the smallest" if key == "exclusiveMinimum" else "maximum with the largest"
            raise QvlError(
                f"the json_schema cannot be used: its {key} {bound} would be allowed, because the other bound has the "
                f"same whole part; use {remedy} number that you want"
            )
        if isinstance(step := node.get("multipleOf"), Decimal) and step:
            multiple = math.lcm(multiple, int(_factor(step).rstrip("0")))
            if multiple > MULTIPLES:
                raise QvlError(
                    f"the json_schema cannot be used: its multipleOf {step!s:.40} takes too long, alone or with the "
                    f"others; their least common multiple must be at most {MULTIPLES}"
                )
        patterns += len(named) if isinstance(named := node.get("patternProperties"), dict) else 0
        if patterns > PATTERNS:
            raise QvlError(f"the json_schema cannot be used: it has more than {PATTERNS} patternProperties; use fewer")


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all objects in a schema: a reference can make a schema of each, also of a default or of a const's value."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            yield node
            waiting += node.values()


def _values(node: Mapping[str, Any]) -> Iterator[tuple[str, Decimal | str]]:
    """Yield the bounds of a schema, and the numbers and texts in its allowed values."""
    yield from ((key, node[key]) for key in BOUNDS if isinstance(node.get(key), Decimal))
    waiting = [(key, node[key]) for key in ("const", "enum") if key in node]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Decimal | str):
            yield key, value
        elif isinstance(value, list | dict):
            waiting += [(key, item) for item in (value.values() if isinstance(value, dict) else value)]


def _factor(number: Decimal) -> str:
    """Return the digits of a number, without its point and the zeros before them."""
    return "".join(map(str, number.as_tuple().digits)).lstrip("0")


def _is_exact(number: Decimal) -> bool:
    factor = _factor(number)
    short = factor.rstrip("0")
    power = int(number.as_tuple().exponent) + len(factor) - len(short)
    return not short or (len(short) <= 16 and int(short) <= LARGEST and abs(power) <= POWERS and abs(number) <= LARGEST)


def _included(node: Mapping[str, Any]) -> Iterator[tuple[str, Decimal]]:
    """Yield the bounds to exclude that llguidance allows: the 0 of ``0 < x <= 0.2``, the 1 of ``1 < x < 1.5``."""
    for low, high, sign in (("Minimum", "Maximum", 1), ("Maximum", "Minimum", -1)):
        bound = node.get(f"exclusive{low}")
        for other in (node.get(f"exclusive{high}"), node.get(high.lower())):
            if not isinstance(bound, Decimal) or not isinstance(other, Decimal):
                continue
            if sign * (other - bound) > 0 and math.trunc(other) == bound:
                yield f"exclusive{low}", bound


def has_end(schema: Any) -> bool:
    """Whether a finite document can match a schema, as far as its references decide.

    A schema whose required parts refer back to itself only matches infinite documents. Its grammar would still allow a
    next token at every position.

    Parameters
    ----------
    schema : dict or bool
        A valid JSON schema. References to other documents count as satisfied.
    """
    targets = {name: _target(schema, name) for name in _references(schema)}
    users: dict[str, set[str]] = {name: set() for name in targets}
    for name, target in targets.items():
        for other in _references(target):
            users[other].add(name)
    # References that are finite by themselves, then those that need only finite ones.
    known, waiting = set[str](), list(targets)
    while waiting:
        name = waiting.pop()
        if name not in known and _ends(targets[name], known):
            known.add(name)
            waiting += users[name]
    return _ends(schema, known)


def _references(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _target(schema: Any, reference: str) -> Any:
    """Resolve a reference; True (the schema that everything matches) if it is none by place in this document."""
    if reference != "#" and not reference.startswith("#/"):
        return True
    for step in unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict) and step in schema:
            schema = schema[step]
        elif isinstance(schema, list) and INDEX.fullmatch(step) and int(step) < len(schema):
            schema = schema[int(step)]
        else:
            return True
    return schema


def _ends(schema: Any, known: set[str]) -> bool:
    """Whether a schema is finite, given the references that are."""
    if not isinstance(schema, dict):
        return schema is not False
    if "$ref" in schema and schema["$ref"] not in known:
        return False
    if not all(_ends(part, known) for part in schema.get("allOf", ())):
        return False
    if any(not any(_ends(part, known) for part in schema[key]) for key in ("anyOf", "oneOf") if key in schema):
        return False
    parts: list[Any] = []
    if schema.get("type") == "object":
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        parts = [properties.get(name, rest) for name in schema.get("required", ())]
    elif schema.get("type") == "array":
        listed, least = schema.get("prefixItems", []), schema.get("minItems", 0)
        parts = [*listed[:least], *([schema.get("items", True)] if least > len(listed) else [])]
    return all(_ends(part, known) for part in parts)
