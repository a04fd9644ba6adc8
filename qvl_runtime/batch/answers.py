"""Answers rows: converts them to requests, and the answers to records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.batch.options import Options
from qvl_runtime.batch.records import Record, answered, failed, name_of, response
from qvl_runtime.batch.rows import COMPLETIONS, RESPONSES, Row
from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import below
from qvl_runtime.inputs.images import ImageSource, is_url, local_path
from qvl_runtime.inputs.pictures import Access, Picture
from qvl_runtime.model import Model
from qvl_runtime.openai.answers import Whole, call_reader, described
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.openai.formats import ChatFormat, ChoiceFormat, TextFormat
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.pictures import fetched
from qvl_runtime.openai.prompts import sources_of, with_pictures
from qvl_runtime.openai.requests import Asked, read_chat, read_completion
from qvl_runtime.openai.response_reply import ResponseReply
from qvl_runtime.openai.response_requests import ResponseAsked, read_response
from qvl_runtime.results import Result

ToBody = Callable[[Sequence[Whole]], dict[str, Any]]
"""Makes the body of a response of the answers to a row in OpenAI's format."""

LIMITS = Limits()
"""Limits for rows in OpenAI's format."""


class Question(NamedTuple):
    """The request of a row: arguments of `Model.generate`, and a function from results to the record."""

    arguments: dict[str, Any]
    record: Callable[[Sequence[Result]], Record]


class _Block(NamedTuple):
    """A block in progress: its rows, and the records by row index."""

    rows: Sequence[Row]
    records: dict[int, Record]


class Answerer:
    """Answers rows with a model.

    Parameters
    ----------
    model : Model
    root : Path
        Only pictures below this folder are opened.
    options : Options
    """

    def __init__(self, model: Model, root: Path, options: Options):
        self._model, self._root, self._options = model, root, options
        self._last: tuple[tuple[str | bytes, ...], list[Picture | ImageSource]] = (), []

    def __call__(
        self,
        blocks: Iterable[Sequence[Row]],
        on_block: Callable[[int, list[Record]], None],
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """Answer blocks of rows. The next block starts while the last rows of a block are computed.

        Parameters
        ----------
        blocks : iterable of sequence of Row
            Consumed lazily.
        on_block : callable
            Called with the index and the records of each completed block, in row order. A row that cannot be answered
            has a record with an error.
        on_record : callable, optional
            Called with each record.
        """
        open_blocks: dict[int, _Block] = {}
        asked: list[tuple[int, int, Question] | None] = []

        def finished(number: int, place: int, record: Record) -> None:
            block = open_blocks[number]
            block.records[place] = record
            on_record(record)
            if len(block.records) == len(block.rows):
                on_block(number, [record for _, record in sorted(open_blocks.pop(number).records.items())])

        def requests() -> Iterator[dict[str, Any]]:
            for number, rows in enumerate(blocks):
                open_blocks[number] = _Block(rows, {})
                # Rows with the same pictures are adjacent, so that these are encoded once.
                for place in sorted(range(len(rows)), key=lambda i: (_sorted_by(rows[i]), i)):
                    try:
                        question = self._question(rows[place])
                    except (QvlError, ApiError) as error:
                        finished(number, place, failed(rows[place], error))
                        continue
                    asked.append((number, place, question))
                    yield question.arguments

        def ended(index: int, result: Any) -> None:
            answered = asked[index]
            assert answered is not None
            number, place, question = answered
            asked[index] = None  # frees its pictures
            if isinstance(result, QvlError):
                finished(number, place, failed(open_blocks[number].rows[place], result))
            else:
                finished(number, place, question.record(result if isinstance(result, list) else [result]))

        self._model.generate_batch(requests(), max_batch=self._options.max_batch, on_result=ended)

    def _question(self, row: Row) -> Question:
        if row.error is not None or row.id is None:
            raise QvlError(row.error or "the row has no id")
        return self._plain(row, row.id) if row.body is None else self._openai(row, row.id)

    def _plain(self, row: Row, row_id: str) -> Question:
        prompt = self._options.prompt if row.prompt is None else row.prompt
        if prompt is None:
            raise QvlError("the row has no prompt; give it one, or all rows that of --prompt")
        pictures = self._pictures(row.pictures)
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        arguments = {
            "prompt": [*parts, {"type": "text", "text": prompt}],
            "seed": self._options.seed_of(row_id),
            "allow_paths": False,
            "constraint": self._options.schema,
            **self._options.generate,
        }
        last = pictures[-1] if pictures else None
        size = last.size if isinstance(last, Picture) else None
        return Question(arguments, lambda results: answered(row, results[0], size))

    def _pictures(self, sources: tuple[str | bytes, ...]) -> list[Picture | ImageSource]:
        """Return the pictures of a row, those of the last row if its sources are the same."""
        if self._last[0] != sources:
            self._last = (), []  # before the next are in memory
            self._last = sources, [self._picture(source) for source in sources]
        return self._last[1]

    def _picture(self, source: str | bytes) -> Picture | ImageSource:
        """Return a picture for a prompt. Rows with the same picture decode it once."""
        place, encoder = located(source, self._root), self._model.pictures
        return place if encoder is None else encoder.reader.read(place, Access(urls=self._options.allow_urls))

    def _openai(self, row: Row, row_id: str) -> Question:
        own, body, urls = self._model.generation_config, row.body or {}, self._options.allow_urls
        asked: Asked
        if row.url == RESPONSES:
            asked = read_response(body, LIMITS, own, urls)
            to_body = self._response(row, asked)
        elif row.url == COMPLETIONS:
            asked = read_completion(body, LIMITS, own)
            to_body = self._choices(row, TextFormat(self._model.tokenizer, asked.logprobs is not None))
        else:
            asked = read_chat(body, LIMITS, own, urls)
            reader, logprobs = call_reader(self._model, asked), asked.logprobs is not None
            to_body = self._choices(row, ChatFormat(self._model.tokenizer, logprobs, reader, f"call_{name_of(row)}"))
        contents = fetched(sources_of(asked.prompt), LIMITS)
        prompt, pictures = with_pictures(self._model, asked.prompt, contents, LIMITS)
        seed = self._options.seed_of(row_id) if asked.seed is None else asked.seed
        arguments = {"prompt": prompt, "n": asked.n, "seed": seed, "allow_paths": False, **asked.options}

        def record(results: Sequence[Result]) -> Record:
            answers = [Whole(i, result, described(result.boxes, pictures)) for i, result in enumerate(results)]
            return response(row, 200, to_body(answers))

        return Question(arguments, record)

    def _response(self, row: Row, asked: ResponseAsked) -> ToBody:
        reader, model = call_reader(self._model, asked), self._model.blob.path.stem
        reply = ResponseReply(asked, self._model.tokenizer, model, reader, name_of(row), created=0)

        def to_body(answers: Sequence[Whole]) -> dict[str, Any]:
            body = reply.body(answers)
            body["usage"]["input_tokens_details"]["cached_tokens"] = 0  # it depends on the rows before
            return body

        return to_body

    def _choices(self, row: Row, form: ChoiceFormat) -> ToBody:
        def to_body(answers: Sequence[Whole]) -> dict[str, Any]:
            prompt = answers[0].result.prompt_tokens
            new = sum(answer.result.timings.new_tokens for answer in answers)
            return {
                "id": f"{name_of(row)}-body",
                "object": "chat.completion" if isinstance(form, ChatFormat) else "text_completion",
                "created": 0,
                "model": self._model.blob.path.stem,
                "choices": [form.whole(answer) for answer in answers],
                "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
            }

        return to_body


def located(source: str | bytes, root: Path) -> ImageSource:
    """Resolve a row's picture for `load_image`.

    Raises
    ------
    QvlError
        For a path, or a ``file://`` URI, outside of `root`.
    """
    if not isinstance(source, str) or source[:5].lower() == "data:" or is_url(source):
        return source
    path = below(root, local_path(source))
    if path is None:
        raise QvlError(f"picture {source[:200]!r} is not below {root}; --images names the folder that has the pictures")
    return path


def _sorted_by(row: Row) -> str:
    return "".join(
        hashlib.blake2b(p if isinstance(p, bytes) else p.encode("utf-8", "replace")).hexdigest() for p in row.pictures
    )
