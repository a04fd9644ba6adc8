"""Check that a JSON schema allows a finite document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def has_end(schema: Any) -> bool:
    """Whether a finite document can match a schema, as far as its references decide.

    A schema whose required parts refer back to itself only matches infinite documents. Its grammar would still allow a
    next token at every position.

    Parameters
    ----------
    schema : dict or bool
        A valid JSON schema. References to other documents count as satisfied.
    """
    references, known = set(_references(schema)), set[str]()
    # Fixed point: references that are finite by themselves, then those that need only finite ones.
    while True:
        ended = {name for name in references - known if _ends(_target(schema, name), known)}
        if not ended:
            return _ends(schema, known)
        known |= ended


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
    """Resolve a reference; True (the schema that everything matches) if it is not in this document."""
    if not reference.startswith("#"):
        return True
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(schema, dict) or step not in schema:
            return True
        schema = schema[step]
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
