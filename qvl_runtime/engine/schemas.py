"""Check that llguidance takes a JSON schema as it is, and in time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from qvl_runtime.engine.schema_references import references, target
from qvl_runtime.errors import QvlError

ALLOWED = ("const", "enum")
"""Keys of allowed values."""
APPLICATORS = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
COMBINED = 16
"""Largest number of patterns of a schema that combines some: the time grows as a power of it."""
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that JSON would have to write with a numeric escape; see `constraints.NOTATION`."""
LARGEST = 1 << 53
"""llguidance computes with float64. Larger numbers are rounded, and some of about 1 << 63 crash the process."""
LEVELS = 800
"""Largest number of levels that the targets of all references have together: llguidance follows them by recursion, and
about 1600 overflow the stack, which ends the process."""
MULTIPLES = 100_000
"""Largest common multiple of all multipleOf of a schema, as whole numbers without zeros at the end. llguidance takes up
to 20 microseconds and a kilobyte for each number below it, and cannot be stopped."""
NOTES = frozenset(("$defs", "definitions", "$schema", "$id", "$comment", "title", "description", "default", "examples"))
OPTIONAL = 200
"""Largest number of properties with a minProperties or maxProperties. llguidance takes time with its square."""
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
    parsed = _parsed(schema)
    nodes = list(_nodes(parsed))
    _check_values(parsed)
    if combined := any(map(_combines, nodes)):
        _check_bounds(nodes)
    else:
        for node in nodes:
            _check_bounds([node])
    _check_multiples(_multiples(nodes), combined)
    _check_objects(nodes, combined)
    _check_sizes(parsed, nodes, combined)


def check_together(schemas: Sequence[str]) -> None:
    """Refuse schemas of one grammar on which llguidance would compute for minutes, though not on each alone.

    Parameters
    ----------
    schemas : sequence of str
        JSON. What is none is not checked here.

    Raises
    ------
    QvlError
        Names the key and the value.
    """
    nodes = list(_nodes([_parsed(schema) for schema in schemas]))
    _check_multiples(_multiples(nodes), combined=False)
    _check_patterns(nodes)


def _parsed(schema: str) -> Any:
    """Return a schema with exact numbers; None if it is no JSON."""
    try:
        return json.loads(schema, parse_int=Decimal, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError):  # ArithmeticError: 1e99999999999999999999
        return None


def _multiples(nodes: Iterable[Mapping[str, Any]]) -> list[Decimal]:
    return [step for node in nodes if isinstance(step := node.get("multipleOf"), Decimal) and step]


def _combines(node: Mapping[str, Any]) -> bool:
    """Whether a schema may apply several of its parts to one value."""
    several = node.get("allOf")
    if isinstance(several, list) and len(several) > 1:
        return True
    return not node.keys().isdisjoint(APPLICATORS) and len(node.keys() - NOTES) > 1


def _check_values(schema: Any) -> None:
    for key, value in _values(schema):
        if isinstance(value, str) and CONTROL.search(value):
            raise _refused(f"its {key} {value!a:.40} has a control character that no answer has; leave it out")
        if isinstance(value, Decimal) and not _is_exact(value):
            raise _refused(f"its {key} {value!s:.40} would be rounded; use numbers of at most 15 digits")


def _check_bounds(nodes: list[Mapping[str, Any]]) -> None:
    """Refuse bounds to exclude that llguidance allows: the 0 of ``0 < x <= 0.2``, the 1 of ``1 < x < 1.5``."""
    for low, high, sign in (("Minimum", "Maximum", 1), ("Maximum", "Minimum", -1)):
        bounds = [n for node in nodes if isinstance(n := node.get(f"exclusive{low}"), Decimal)]
        others = [node.get(key) for node in nodes for key in (f"exclusive{high}", high.lower())] if bounds else []
        # of those with the same whole part, the one that allows the most
        ordered = sorted((n for n in others if isinstance(n, Decimal)), key=lambda n: sign * n)
        wholes = {Decimal(math.trunc(n)): n for n in ordered}
        for bound in bounds:
            if bound in wholes and sign * (wholes[bound] - bound) > 0:
                remedy = "minimum with the smallest" if sign > 0 else "maximum with the largest"
                raise _refused(
                    f"its exclusive{low} {bound} would be allowed, because the other bound has the same whole part; "
                    f"use {remedy} number that you want"
                )


def _check_multiples(steps: list[Decimal], combined: bool) -> None:
    multiple = 1
    for step in steps:
        multiple = math.lcm(multiple, int(_factor(step).rstrip("0")))
        if multiple > MULTIPLES:
            raise _refused(
                f"its multipleOf {step!s:.40} takes too long, alone or with the others; their least common multiple "
                f"must be at most {MULTIPLES}"
            )
    if combined and steps:
        exponent = min(int(step.as_tuple().exponent) for step in steps)
        wholes = {abs(int(step.scaleb(-exponent))) for step in steps}
        if len(wholes) > 1 and math.lcm(*wholes) * max(wholes) >= 1 << 32:
            raise _refused(
                "its multipleOf are too far apart for allOf and the like; use one, or numbers of a similar size"
            )


def _check_objects(nodes: list[Mapping[str, Any]], combined: bool) -> None:
    counts = [len(named) if isinstance(named := node.get("properties"), dict) else 0 for node in nodes]
    for node, count in zip(nodes, counts):
        least, named = node.get("minProperties"), node.get("required")
        if isinstance(least, Decimal) and least > (len(named) if isinstance(named, list) else 0) + 1:
            raise _refused(f"its minProperties {least!s:.40} could count a name twice; list names in required")
        if not node.keys().isdisjoint(("minProperties", "maxProperties")) and (
            (sum(counts) if combined else count) > OPTIONAL
        ):
            raise _refused(f"it has minProperties or maxProperties for more than {OPTIONAL} properties; use fewer")


def _check_patterns(nodes: list[Mapping[str, Any]]) -> None:
    counts = [len(named) for node in nodes if isinstance(named := node.get("patternProperties"), dict)]
    if sum(counts) > PATTERNS:
        raise _refused(f"it has more than {PATTERNS} patternProperties; use fewer")


def _check_sizes(schema: Any, nodes: list[Mapping[str, Any]], combined: bool) -> None:
    _check_patterns(nodes)
    if combined and sum("pattern" in node for node in nodes) > COMBINED:
        raise _refused(f"it has more than {COMBINED} patterns and combines schemas by allOf or the like; use fewer")
    levels = _levels(schema)
    depths = (levels.get(id(target(schema, name)), levels.get(id(schema), 0)) for name in set(references(schema)))
    if sum(depths) > LEVELS:
        raise _refused(f"the schemas it refers to have more than {LEVELS} levels together; use fewer, or flatter ones")


def _levels(schema: Any) -> dict[int, int]:
    """Return how many objects each object or list of a schema has within each other, at most, by its identity."""
    order, waiting = [], [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list | dict):
            order.append(node)
            waiting += node if isinstance(node, list) else node.values()
    levels: dict[int, int] = {}
    for node in reversed(order):
        parts = node if isinstance(node, list) else node.values()
        levels[id(node)] = isinstance(node, dict) + max((levels.get(id(part), 0) for part in parts), default=0)
    return levels


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


def _values(schema: Any) -> Iterator[tuple[str, Decimal | str]]:
    """Yield all bounds, and the numbers and texts in allowed values, each once, with the key that they belong to."""
    waiting = [("", schema)]  # with the key of the allowed values that it lies in
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            yield from ((name, item) for name, item in value.items() if name in BOUNDS and isinstance(item, Decimal))
            waiting += [(key or (name if name in ALLOWED else ""), item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        elif key and isinstance(value, Decimal | str):
            yield key, value


def _factor(number: Decimal) -> str:
    """Return the digits of a number, without its point and the zeros before them."""
    return "".join(map(str, number.as_tuple().digits)).lstrip("0")


def _is_exact(number: Decimal) -> bool:
    factor = _factor(number)
    short = factor.rstrip("0")
    power = int(number.as_tuple().exponent) + len(factor) - len(short)
    return not short or (len(short) <= 16 and int(short) <= LARGEST and abs(power) <= POWERS and abs(number) <= LARGEST)


def _refused(reason: str) -> QvlError:
    return QvlError(f"the json_schema cannot be used: {reason}")
