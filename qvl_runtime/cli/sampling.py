"""The sampling options of several commands."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="1 is off.")]
TopK = Annotated[int, typer.Option(help="0 is off.")]
MinP = Annotated[float, typer.Option(help="0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="1 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="From -2 to 2; 0 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="From -2 to 2; 0 is off.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text that ends an answer; repeat for several.")]
