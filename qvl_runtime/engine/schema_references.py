"""The references of a JSON schema: where they lead, and whether a finite document can match it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

INDEX = re.compile("0|[1-9][0-9]{0,8}")


def references(schema: Any) -> Iterator[str]:
    """Yield all references in a schema."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def target(schema: Any, reference: str) -> Any:
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


def has_end(schema: Any) -> bool:
    """Whether a finite document can match a schema, as far as its references decide.

    A schema whose required parts refer back to itself only matches infinite documents. Its grammar would still allow a
    next token at every position.

    Parameters
    ----------
    schema : dict or bool
        A valid JSON schema. References to other documents count as satisfied.
    """
    targets = {name: target(schema, name) for name in references(schema)}
    users: dict[str, set[str]] = {name: set() for name in targets}
    for name, part in targets.items():
        for other in references(part):
            users[other].add(name)
    # References that are finite by themselves, then those that need only finite ones.
    known, waiting = set[str](), list(targets)
    while waiting:
        name = waiting.pop()
        if name not in known and _ends(targets[name], known):
            known.add(name)
            waiting += users[name]
    return _ends(schema, known)


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
