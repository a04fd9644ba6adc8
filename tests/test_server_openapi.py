"""The schema at ``/openapi.json``, and the server tested against it with generated requests."""

from __future__ import annotations

import pytest
from serving import QUESTION, image_part, picture, png

EXAMPLES = 4
"""Random requests to each route."""

KNOWN = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [image_part(png(picture())), {"type": "text", "text": QUESTION}]}],
        "max_tokens": 60,
        "logprobs": True,
        "grounding": True,
        "n": 2,
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "one two"}]}],
        "max_output_tokens": 5,
        "include": ["message.output_text.logprobs"],
    },
    "/v1/messages": {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "one two"}]}],
        "max_tokens": 60,
        "stop_sequences": ["end"],
        "grounding": True,
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "one two"}]},
    "/v1/completions": {"prompt": "one two", "max_tokens": 3, "logprobs": 2},
    "/v1/tokenize": {"prompt": "one two"},
}
"""Valid requests."""


@pytest.fixture(scope="module")
def described(served):
    schemathesis = pytest.importorskip("schemathesis", reason="it makes requests from a description")
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_every_route_of_the_api_is_described(served):
    described = served.http.get("/openapi.json").json()
    page = {"/", "/openapi.json"}
    own = {
        (route.path_format, method.lower())
        for route in served.app.routes
        for method in route.methods - {"HEAD"}
        if route.path not in page and "." not in route.path
    }
    assert {(path, method) for path, item in described["paths"].items() for method in item} == own
    assert described["openapi"].startswith("3.1")


def test_the_numbers_of_a_box_may_be_fractions(served):
    schemas = served.http.get("/openapi.json").json()["components"]["schemas"]
    message = schemas["Chat"]["properties"]["choices"]["items"]["properties"]["message"]
    assert message["properties"]["boxes"]["items"]["properties"]["numbers"]["items"] == {"type": "number"}


def test_answers_are_as_described(served, described):
    for path, body in KNOWN.items():
        for stream in [False] if "token" in path else [False, True]:
            response = served.http.post(path, json={**body, "stream": stream})
            assert response.status_code == 200
            described[path]["POST"].validate_response(response)
    for path in ("/v1/models", "/v1/models/{name}", "/health", "/metrics"):
        response = served.http.get(path.format(name="demo"))
        assert response.status_code == 200
        described[path]["GET"].validate_response(response)


def test_random_requests_get_what_the_description_says(described):
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi import checks

    # Not among them: that all it allows is answered. A picture must be one, and a box lie on it.
    conforms = [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    reached: dict[str, list[int]] = {}
    for made in described.get_all_operations():
        operation = made.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def ask(case) -> None:
            if isinstance(case.body, dict):
                case.body |= {"max_tokens": 2, "max_output_tokens": 2}
            response = case.call()
            reached.setdefault(case.path, []).append(response.status_code)
            assert response.status_code < 500
            case.validate_response(response, checks=conforms)

        ask()
    assert len(reached) == 10
