"""Many requests at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import QvlError

if TYPE_CHECKING:
    from qvl_runtime.asking import Asking


def answer_all(
    model: Asking,
    requests: Iterable[Mapping[str, Any]],
    max_batch: int,
    on_result: Callable[[int, Any], None] | None,
) -> list[Any]:
    """See `Asking.generate_batch`."""
    results: list[Any] = []
    for index, request in enumerate(requests):
        try:
            if not isinstance(request, Mapping):
                raise QvlError(f"request {index} is {request!r:.60}; expected a dict of options")
            result: Any = model.chat(**request) if "query" in request else model.generate(**request)
        except QvlError as error:
            result = error
        results.append(result)
        if on_result is not None:
            on_result(index, result)
    return results
