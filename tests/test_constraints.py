"""Constrained answers: the output has the required form for any logits."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from qvl_runtime.engine import schema_references, schemas
from qvl_runtime.engine.constraints import Answer, Grounding, JsonSchema, Regex, mask
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.engine.schema_references import has_end
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.grounding import GROUNDING
from qvl_runtime.families.qwen_vl.tokenizer import QwenTokenizer
from qvl_runtime.families.tagged_boxes import box_can_become

RANKS = (GOLDEN / "ckpt" / "tiny-vl" / "qwen.tiktoken").read_bytes()
TOKENIZER = QwenTokenizer.from_ranks(RANKS, image_tags=True, vocab_size=640)
STOPS = frozenset({TOKENIZER.eod_id, TOKENIZER.im_end_id})
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}


def _asked(limit, opened="", tokenizer=None):
    tokenizer = TOKENIZER if tokenizer is None else tokenizer
    return Answer(tokenizer, STOPS, limit, opened, GROUNDING.constraint)


def _answer(form, seed: int, limit: int, opened: str = "") -> str:
    """The answer of a model with random logits under a constraint, at temperature 1.5."""
    random = np.random.default_rng(seed)
    sampler = Sampler(temperature=1.5, seed=seed)
    constraint = form.start(_asked(limit, opened))
    ids: list[int] = []
    while len(ids) < limit:
        logits = (2 * random.standard_normal(640)).astype(np.float32)
        token = sampler(mask(logits, constraint), ids)
        if token in STOPS:
            break
        constraint.advance(token)
        ids.append(token)
    return TOKENIZER.decode(ids)


@given(st.text("(),0123456789", max_size=20))
def test_a_box_can_become_what_its_beginning_allows(text):
    """Against plain enumeration over a coarser set: everything a valid box starts with is allowed, nothing else."""
    match = re.fullmatch(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", text)
    if match:
        x1, y1, x2, y2 = map(int, match.groups())
        canonical = text == f"({x1},{y1}),({x2},{y2})"
        assert box_can_become(text) == (canonical and x1 < x2 <= 999 and y1 < y2 <= 999)


@given(x=st.tuples(st.integers(0, 999), st.integers(0, 999)), y=st.tuples(st.integers(0, 999), st.integers(0, 999)))
def test_every_beginning_of_a_valid_box_is_allowed(x, y):
    (x1, x2), (y1, y2) = sorted(x), sorted(y)
    text = f"({x1},{y1}),({x2},{y2})"
    valid = x1 < x2 and y1 < y2
    assert all(box_can_become(text[:n]) for n in range(len(text) + 1)) == valid


def test_a_beginning_that_no_box_completes_is_refused():
    assert not box_can_become("(999,")
    assert not box_can_become("(99,5),(99,")
    assert not box_can_become("(1,2),(05")
    assert not box_can_become("(1,2) ")
    assert box_can_become("(998,0),(999,")


@pytest.mark.parametrize("limit", [25, 40, 100])
def test_grounding_is_always_well_formed(limit):
    for seed in range(60):
        text = _answer(Grounding(), seed, limit)
        whole = re.fullmatch(r"(?:<ref>[^<]+</ref><box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>)+", text, re.DOTALL)
        assert whole, text
        for box in GROUNDING.parse(text):
            assert 0 <= box.x1 < box.x2 <= 999
            assert 0 <= box.y1 < box.y2 <= 999
        assert len(GROUNDING.parse(text)) == text.count("<box>")


def test_grounding_completes_the_box_a_prompt_opened():
    for seed in range(40):
        text = _answer(Grounding(), seed, 60, opened="<ref>the dog</ref><box>(12,")
        first = GROUNDING.parse("<ref>the dog</ref><box>(12," + text)[0]
        assert (first.ref, first.x1) == ("the dog", 12)
        assert first.x2 > 12


def test_grounding_refuses_what_cannot_be_completed():
    with pytest.raises(QvlError, match="needs 24"):
        Grounding().start(_asked(23, ""))
    with pytest.raises(QvlError, match="no box completes"):
        Grounding().start(_asked(50, "<box>(7;"))
    text_only = QwenTokenizer.from_ranks(RANKS, image_tags=False)
    with pytest.raises(QvlError, match="no box tokens"):
        Grounding().start(_asked(50, "", text_only))


def test_json_always_parses_and_fits():
    for seed in range(60):
        document = json.loads(_answer(JsonSchema(SCHEMA), seed, 300))
        assert set(document) == {"name", "count", "tags"}
        assert len(document["name"]) <= 5
        assert 0 <= document["count"] <= 99
        assert set(document["tags"]) <= {"red", "green"}


def test_regex_always_matches():
    pattern = r"(yes|no), [a-z]{1,8}[.!]"
    answers = {_answer(Regex(pattern), seed, 60) for seed in range(60)}
    assert all(re.fullmatch(pattern, answer) for answer in answers)
    assert len(answers) > 20


CIRCLE: dict = {"type": "array"}
CIRCLE["items"] = CIRCLE


@pytest.mark.parametrize(
    "form",
    [
        Regex("(unclosed"),
        Regex(5),
        Regex("\ud800"),
        JsonSchema("{not json"),
        JsonSchema({"type": "nonsense"}),
        JsonSchema({"enum": {1}}),
        JsonSchema({"minLength": "é" * 60}),  # a panic
        JsonSchema('{"const":1e99999999999999999999}'),
        JsonSchema(CIRCLE),
        JsonSchema(functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(3000), {})),
    ],
)
def test_a_bad_grammar_is_one_clear_line(form):
    with pytest.raises(QvlError, match=r"cannot be used: .*; correct it$") as error:
        form.start(_asked(50, ""))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "form", [Regex(r"[^\s\S]"), Regex(r"a[^\s\S]"), JsonSchema({"$ref": "#"}), JsonSchema({"enum": []})]
)
def test_a_form_that_nothing_matches_is_refused_before_an_answer(form):
    with pytest.raises(QvlError, match=r"(no text matches it|Unsatisfiable).*; (allow|require|correct) ") as error:
        form.start(_asked(50, ""))
    assert "\n" not in str(error.value)


NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}}
TREE = {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"}


@pytest.mark.parametrize(
    ("schema", "ends"),
    [
        (NODE, True),
        (NODE | {"required": ["next"]}, False),
        ({"anyOf": [NODE | {"required": ["next"]}, {"type": "null"}]}, True),
        ({"anyOf": [{"$ref": "#/$defs/n"}, NODE | {"required": ["next"]}], "$defs": {"n": {"$ref": "#"}}}, False),
        ({"allOf": [NODE, NODE | {"required": ["next"]}]}, False),
        (TREE, True),
        ({"$defs": {"tree": TREE["$defs"]["tree"] | {"minItems": 1}}, "$ref": "#/$defs/tree"}, False),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]}, False),
        ({"type": "object", "properties": {"a/b": True, "c": {"$ref": "#/properties/a~1b"}}, "required": ["c"]}, True),
        ({"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 1}, True),
        ({"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 2}, False),
        ({"$ref": "elsewhere.json"}, True),
        ({"$ref": "#n", "$defs": {"n": {"$anchor": "n", "type": "null"}}}, True),
        ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"$ref": "#/$defs/a%20b"}}}, False),
        ({"allOf": [True, {"$ref": "#/allOf/1"}]}, False),
        ({"$ref": "#/allOf/2", "allOf": [True]}, True),
        (False, False),
    ],
)
def test_a_document_without_end_fits_nothing(schema, ends):
    assert has_end(schema) == ends


def test_a_chain_of_references_is_followed_once(monkeypatch):
    """With 64 KB of them a request computed for seconds."""
    count, asked = 200, []
    whole = schema_references._ends
    monkeypatch.setattr(schema_references, "_ends", lambda *given: asked.append(given) or whole(*given))
    for names in (range(count), reversed(range(count))):
        chain = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in names}
        assert has_end({"$defs": {**chain, str(count): {}}, "$ref": "#/$defs/0"})
    assert len(asked) < 10 * count


def test_a_schema_without_end_is_refused_before_an_answer():
    with pytest.raises(QvlError, match="no text matches it, its required parts have no end"):
        JsonSchema(NODE | {"required": ["next"]}).start(_asked(50, ""))
    assert JsonSchema(NODE).start(_asked(50, "")).allowed().any()


@pytest.mark.parametrize(
    ("form", "name", "text"),
    [
        (Regex("a{1000000}"), "regex", "aa"),
        (JsonSchema({"type": "string", "pattern": "^a{1000000}$"}), "json_schema", '"aa'),
    ],
)
def test_a_grammar_that_grows_too_large_is_one_short_line(form, name, text):
    constraint = form.start(_asked(50, ""))
    with pytest.raises(
        QvlError, match=rf"^the {name} is too large \(.*too many expressions.*\); repeat less"
    ) as caught:
        for token in TOKENIZER.encode_ordinary(text):
            constraint.allowed()
            constraint.advance(token)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_grammar_too_large_for_its_first_token_says_so():
    step = 99991
    numbers = {
        str(n): {"type": "integer", "multipleOf": step, "minimum": step * n + 1, "maximum": step * (n + 1)}
        for n in range(40)
    }
    with pytest.raises(QvlError, match=r"the json_schema is too large \(fuel exhausted"):
        JsonSchema({"type": "object", "properties": numbers}).start(_asked(50, ""))


def test_a_schema_may_be_true_or_false():
    for schema in ("true", " true\n"):
        assert _fits(schema, '{"a":[1,"b"]}') and _fits(schema, "5")
    with pytest.raises(QvlError, match=r"cannot be used: (no text matches it|Unsatisfiable)"):
        JsonSchema("false").start(_asked(50, ""))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "minimum": 10**30}, f"minimum {10**30} would be rounded"),
        ({"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 1}, f"minimum {2**53 + 1} would be rounded"),
        ({"anyOf": [{"type": "number", "maximum": -(2**53) - 1}]}, f"maximum -{2**53 + 1} would be rounded"),
        ({"enum": [1, {"a": [12345678901234567890123]}]}, "enum 12345678901234567890123 would be rounded"),
        ({"properties": {"a": {"const": -(2**63)}}}, f"const -{2**63} would be rounded"),  # a crash
        ({"default": {"a": {"const": -(2**63)}}, "$ref": "#/default/a"}, f"const -{2**63} would be rounded"),
        ({"x": {"properties": {"const": -(2**63)}}, "$ref": "#/x/properties"}, f"const -{2**63} would be rounded"),
        ({"items": {"const": 123456789.12345679}}, "const 123456789.12345679 would be rounded"),
        ('{"const": 0.10000000000000000001}', "const 0.10000000000000000001 would be rounded"),
        ({"$defs": {"a": {"exclusiveMaximum": 221.09414294659382}}, "$ref": "#/$defs/a"}, "221.09414294659382 would"),
        ('{"const": ' + "9" * 5000 + "}", "const 9999999999999999999999999999999999999999 would be rounded"),
        ('{"maximum": 1e999999999999}', "maximum 1E+999999999999 would be rounded"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1e-5}, "exclusiveMinimum 0 would be allowed"),
        ({"exclusiveMinimum": 1.0, "exclusiveMaximum": 1.77}, "use minimum with the smallest number"),
        ({"type": "number", "minimum": -0.3, "exclusiveMaximum": 0}, "use maximum with the largest number"),
        ({"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.2}]}, "exclusiveMinimum 0 would be allowed"),
        ({"maximum": 0.2, "$ref": "#/$defs/a", "$defs": {"a": {"exclusiveMinimum": 0}}}, "exclusiveMinimum 0 would be"),
    ],
)
def test_numbers_that_would_be_others_are_refused(schema, said):
    with pytest.raises(QvlError, match="the json_schema cannot be used: ") as caught:
        JsonSchema(schema).start(_asked(50, ""))
    assert said in str(caught.value) and "\n" not in str(caught.value)


MANY = {"type": "object", "properties": {f"{i}": {} for i in range(201)}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "multipleOf": 999999999989}, "its multipleOf 999999999989 takes too long"),
        ({"type": "integer", "multipleOf": -0.999983}, "its multipleOf -0.999983 takes too long"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "least common multiple must be at most 100000"),
        ({"allOf": [{"multipleOf": 1_000_000}, {"multipleOf": 65536}]}, "its multipleOf are too far apart for allOf"),
        ({"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(60)]}, "more than 16 patterns"),
        (MANY | {"minProperties": 1}, "it has minProperties or maxProperties for more than 200 properties"),
        ({"allOf": [MANY, {"maxProperties": 1}]}, "it has minProperties or maxProperties for more than 200 properties"),
        ({"patternProperties": {f"^{i}": {} for i in range(65)}}, "it has more than 64 patternProperties"),
        ({"allOf": [{"patternProperties": {f"^{i}": {}}} for i in range(65)]}, "more than 64 patternProperties"),
    ],
)
def test_schemas_that_would_take_minutes_are_refused(schema, said):
    """Nothing stops llguidance: a request of a hundred bytes took all memory."""
    with pytest.raises(QvlError, match="the json_schema cannot be used: ") as caught:
        JsonSchema(schema).start(_asked(50, ""))
    assert said in str(caught.value)


def _chain(definitions: int, levels: int, reference: str = "#/$defs/{}"):
    """Definitions of as many levels, of which each refers to the next one."""
    named = {
        str(i): functools.reduce(
            lambda inner, _: {"items": inner}, range(levels - 1), {"$ref": reference.format(i + 1)}
        )
        for i in range(definitions)
    }
    return {"$defs": {**named, str(definitions): {}}, "$ref": reference.format(0)}


@pytest.mark.parametrize("form", [(17, 100), (800, 1), (8, 100, "#/%24defs/{}")])
def test_deep_chains_of_references_are_refused(form):
    """They overflowed llguidance's stack, which ended the process."""
    with pytest.raises(QvlError, match="schemas it refers to have more than 800 levels together"):
        JsonSchema(_chain(*form)).start(_asked(50, ""))


@pytest.mark.parametrize("form", [(7, 100), (798, 1), (150, 5)])
def test_usual_chains_of_references_are_taken(form):
    assert _fits(_chain(*form), "[]")


def test_a_name_does_not_count_twice():
    schema = {"type": "object", "additionalProperties": {"type": "null"}}
    with pytest.raises(QvlError, match="its minProperties 2 could count a name twice; list names in required"):
        JsonSchema(schema | {"minProperties": 2}).start(_asked(50, ""))
    assert _fits(schema | {"minProperties": 2, "required": ["a"]}, '{"a":null,"b":null}')
    assert not _fits(schema | {"minProperties": 2, "required": ["a"]}, '{"a":null}')
    assert _fits(schema | {"minProperties": 1}, '{"a":null}') and not _fits(schema | {"minProperties": 1}, "{}")


def test_usual_multiples_are_taken():
    steps = [0.01, 0.05, 0.25, 2, 5, 12, 60, 100, 1024, 3_000_000]
    schema = {
        "type": "array",
        "prefixItems": [{"type": "number", "multipleOf": step} for step in steps],
        "items": False,
    }
    assert _fits(schema, "[0.02,0.15,0.75,4,10,36,120,300,2048,6000000]") and not _fits(schema, "[0.021]")


@pytest.mark.parametrize("kind", ["x" * 3000, "\u202ex\x1b[2J"])
def test_the_parsers_message_is_cut_and_escaped(kind):
    with pytest.raises(QvlError, match=r"the json_schema cannot be used: '?Invalid type: ") as caught:
        JsonSchema({"type": kind}).start(_asked(50, ""))
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def _fits(schema, text: str) -> bool:
    constraint = JsonSchema(schema).start(_asked(100, ""))
    for token in TOKENIZER.encode_ordinary(text):
        if not constraint.allowed()[token]:
            return False
        constraint.advance(token)
    return bool(constraint.allowed()[list(STOPS)].any())


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"properties": {"a": {"type": "integer"}}}, '{"b":"x"}', r'{"\u0061":"x"}'),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, '{"a":1,"b":2}', r'{"a":1,"\u0061":2}'),
        ({"properties": {"\b": {"type": "integer"}}}, r'{"\b":5}', r'{"\u0008":"x"}'),
        ({"patternProperties": {"^a": {"type": "integer"}}}, '{"ab":5}', r'{"\u0061b":"x"}'),
        ({"type": "array", "x-guidance": {"item_separator": "; "}}, "[1,2]", "[1; 2]"),
        ({"type": "object", "x-guidance": {"key_separator": "="}}, '{"a":2}', '{"a"=2}'),
        ({"type": "array", "x-guidance": {"whitespace_pattern": "x"}}, "[1]", "[x1]"),
    ],
)
def test_json_is_written_in_one_way(schema, inside, outside):
    assert _fits(schema, inside) and not _fits(schema, outside)


@pytest.mark.parametrize("text", ["\x01", "a\x7f"])
def test_a_value_that_answers_never_have_is_refused(text):
    schema = {"type": "object", "properties": {"a": {"const": [text]}}, "required": ["a"]}
    with pytest.raises(QvlError, match=r"its const 'a?\\x(01|7f)' has a control character") as caught:
        JsonSchema(schema).start(_asked(50, ""))
    assert str(caught.value).isprintable()
    assert _fits({"const": "\b\t\n\f\r\xa0"}, '"\\b\\t\\n\\f\\r\xa0"')
    assert _fits({"properties": {"a\n\0": {}}}, r'{"a\n\u0000":1}')


def test_a_value_within_many_others_is_read_once(monkeypatch):
    """Read again for each of them, a schema of 64 KB took seconds."""
    read = []
    monkeypatch.setattr(schemas, "_is_exact", lambda number: bool(read.append(number)) or True)
    schema = functools.reduce(lambda inner, _: {"const": [inner, 5]}, range(20), {"minimum": 7})
    schemas.check_schema(json.dumps(schema))
    assert sorted(read)[:20] == [5] * 20 and len(read) < 25


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"type": "integer", "minimum": 2**53 - 1, "maximum": 2**53}, f"{2**53}", f"{2**53 + 1}"),
        ({"enum": [2**53, 1e-7, 0.3333333333333333]}, "0.3333333333333333", "0.3333333333333334"),
        ({"enum": [2**53, 1e-7, 0.25]}, "0.0000001", "0.0000002"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "0.01", "0"),
        ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.55}, "0.51", "0.5"),
        ({"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": -0.3}, "-0.9", "-1"),
        ({"properties": {"minimum": {"type": "integer", "default": 10**30}}}, '{"minimum":7}', '{"minimum":"a"}'),
    ],
)
def test_numbers_that_are_exact_are_taken(schema, inside, outside):
    assert _fits(schema, inside) and not _fits(schema, outside)


def test_a_form_that_only_the_empty_text_matches_is_a_form():
    assert list(np.flatnonzero(Regex("").start(_asked(50, "")).allowed())) == sorted(STOPS)


def test_another_ref_begins_only_where_its_box_has_room():
    """A model that begins another ref whenever allowed, and writes the longest possible box."""
    needed = 4 + len("(998,998),(999,999)") + 1  # ref, one token, its end, box; corners; end of the box
    for limit in range(needed, 4 * needed + 2):
        constraint = Grounding().start(_asked(limit, ""))
        ids: list[int] = []
        while not (allowed := constraint.allowed())[list(STOPS)].any() or allowed[TOKENIZER.special["<ref>"]]:
            wanted = [TOKENIZER.special[tag] for tag in ("<ref>", "</ref>", "<box>", "</box>")]
            wanted += [TOKENIZER.encode(character)[0] for character in "98(),x"]
            token = next(token for token in wanted if allowed[token])
            constraint.advance(token)
            ids.append(token)
        text = TOKENIZER.decode(ids)
        assert len(ids) <= limit
        assert len(GROUNDING.parse(text)) == text.count("<ref>") == limit // needed, (limit, text)
