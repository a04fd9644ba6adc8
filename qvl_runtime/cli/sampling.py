"""The sampling options of several commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.engine.constraints import Answer, Constraint, JsonSchema
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import MAX_JSON, parse_object
from qvl_runtime.file.opening import read_regular

Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="1 is off.")]
TopK = Annotated[int, typer.Option(help="0 is off.")]
MinP = Annotated[float, typer.Option(help="0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="1 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="From -2 to 2; 0 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="From -2 to 2; 0 is off.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text that ends an answer; repeat for several.")]
SchemaFile = Annotated[
    Path | None, typer.Option("--json-schema", help="File of a JSON schema; answers are JSON that matches it.")
]


@dataclasses.dataclass(frozen=True)
class FileSchema(JsonSchema):
    """The JSON schema of a file, which its errors name."""

    path: Path

    def start(self, answer: Answer) -> Constraint:
        try:
            return super().start(answer)
        except QvlError as error:
            raise QvlError(f"{self.path}: {error}") from None


def read_schema(path: Path | None) -> FileSchema | None:
    """Read the file of `--json-schema`.

    Raises
    ------
    QvlError
        If it is missing or not a JSON object.
    """
    if path is None:
        return None
    schema = parse_object(read_regular(path, limit=MAX_JSON), str(path), "correct it")
    return FileSchema(json.dumps(schema), path)
