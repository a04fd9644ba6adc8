"""The output records of a job: making them of answers and errors, and reading them."""

from __future__ import annotations

import hashlib
from typing import Any

from qvl_runtime.batch.rows import RESPONSES, Row
from qvl_runtime.errors import QvlError
from qvl_runtime.openai.answers import box_fields
from qvl_runtime.openai.errors import ApiError, of_exception
from qvl_runtime.openai.requests import Asked
from qvl_runtime.openai.response_requests import ResponseAsked
from qvl_runtime.results import Result

Record = dict[str, Any]
"""An output record, as JSON types."""

Corners = tuple[int, int, int, int]
"""Left, top, right and bottom of a box in pixels of its picture."""
FARTHEST = 1 << 31
"""Pixels from a picture's corner that no box reaches."""


def answered(row: Row, result: Result, size: tuple[int, int] | None) -> Record:
    """Create the record of an answered row; `size` is that of its last picture in pixels."""
    return {
        "id": row.id,
        "row": row.number,
        "text": result.text,
        "reasoning": result.reasoning or None,
        "boxes": [box_fields(box, size) for box in result.boxes],
        "finish_reason": result.finish_reason,
        "usage": {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.timings.new_tokens},
        "error": None,
    }


def failed(row: Row, error: QvlError | ApiError) -> Record:
    """Create the record of a failed row."""
    if row.body is not None:
        kind = ResponseAsked if row.url == RESPONSES else Asked
        api = of_exception(error, kind.limit_field)
        return response(row, api.status, api.body())
    empty = dict.fromkeys(("text", "reasoning", "boxes", "finish_reason", "usage"))
    return {"id": row.id, "row": row.number, **empty, "error": str(error)}


def response(row: Row, status: int, body: dict[str, Any]) -> Record:
    """Create a record in OpenAI's format. Ids and dates are deterministic: the same job gives the same bytes."""
    name = name_of(row)
    return {
        "id": name,
        "custom_id": row.id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": None,
    }


def name_of(row: Row) -> str:
    """Return the id of a row's request in OpenAI's format."""
    digest = hashlib.blake2b((row.id or "").encode("utf-8", "surrogatepass"), digest_size=12)
    return f"batch_req_{digest.hexdigest()}"


def is_record(record: Record) -> bool:
    """Whether JSON values from a file are a record, as far as they are read again."""
    try:
        is_failed(record)
        boxes_of(record)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return False
    return True


def is_failed(record: Record) -> bool:
    """Whether a record is that of a failed row."""
    if record.get("response") is not None:
        return bool(record["response"]["status_code"] != 200)
    return record["error"] is not None


def boxes_of(record: Record) -> list[tuple[str | None, Corners]]:
    """Return the labels and the corners of the boxes that lie on a picture; those of the first of several answers.

    Raises
    ------
    AttributeError, KeyError, OverflowError, TypeError, ValueError
        If it is no record; see `is_record`.
    """
    if record.get("response") is None:
        boxes = record["boxes"] or []
    else:
        body = record["response"]["body"]
        boxes = [box for choice in body.get("choices", ())[:1] for box in choice.get("message", {}).get("boxes") or ()]
        parts = [part for item in body.get("output", ()) for part in item.get("content", ())]
        boxes += [box for part in parts for box in part.get("boxes") or ()]
    found: list[tuple[str | None, Corners]] = []
    for box in boxes:
        if box["pixels"] is not None:
            left, top, right, bottom = map(int, box["pixels"])
            if not isinstance(box["ref"], str | None) or max(map(abs, (left, top, right, bottom))) >= FARTHEST:
                raise ValueError("no box of a picture")
            found.append((box["ref"], (left, top, right, bottom)))
    return found


def why(record: Record) -> str:
    """Return the error of a failed row's record."""
    if record.get("response") is not None:
        return str(record["response"]["body"]["error"]["message"])
    return str(record["error"])


def tokens(record: Record) -> int:
    """Return the number of generated tokens of a record."""
    usage = (record["response"]["body"] if record.get("response") is not None else record).get("usage")
    return usage.get("completion_tokens", usage.get("output_tokens")) if usage else 0
