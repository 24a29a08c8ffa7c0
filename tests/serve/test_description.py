"""Our own OpenAPI description: schemathesis sends what it allows and what it forbids, and every answer must be as described."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from nbengine import Engine
from nbengine.serve.openapi import description
from nbengine.serve.protocol import UNBUILT, ChatRequest, CompletionRequest, TokenizeRequest

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, ignored_auth, unsupported_method,
    negative_data_rejection,
]  # fmt: skip
OPERATIONS = [(path, method) for path, methods in description()["paths"].items() for method in methods]
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture(scope="module")
def engine():
    """Its answers are short, whatever is asked."""
    with Engine("tales", num_gpu_blocks_override=256, max_model_len=160, progress=lambda *_: None) as engine:
        engine.front.call(int).result()
        yield engine


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_described(server, path, method, mode):
    conform(server, path, method, mode)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_stream_is_as_described(server, path):
    conform(server, path, "post", GenerationMode.POSITIVE, streamed=True)


def conform(server, path, method, mode, *, streamed=False):
    schema = schemathesis.openapi.from_dict(description(("tales",)))
    schema.config.update(base_url=server.url)
    operation = schema[path][method.upper()]
    headers = {"Authorization": f"Bearer {server.api_key}"}
    checks = [check for check in CHECKS if mode is GenerationMode.NEGATIVE or check is not negative_data_rejection]

    answered: Counter[int] = Counter()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(st.data())
    def check(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = whole(case.body)
            if "completions" in path:
                shorten(case.body)
                case.body.update({"stream": True} if streamed else {})
        answer = case.call(headers=headers)
        answered[answer.status_code] += 1
        case.validate_response(answer, checks=checks, headers=headers)

    check()
    if mode is GenerationMode.POSITIVE:
        assert answered[200] >= answered.total() / 10, answered
    elif method == "post":
        assert answered[400] >= answered.total() / 5, answered


def whole(value):
    """JSON Schema calls 1.0 an integer, and we do not."""
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shorten(body):
    """Nothing bounds how much may be asked for, and this machine is slow."""
    body.update(max_tokens=2, n=min(body.get("n") or 1, 3))
    for name in ("max_completion_tokens", "min_tokens"):
        body.pop(name, None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    for message in body.get("messages") or []:
        for name in message.keys() - {"role", "content"}:
            del message[name]  # which no template reads
    if isinstance(body.get("prompt"), list):
        body["prompt"] = "Once upon a time"  # ids of any size, of which a small vocabulary has few


def test_every_field_that_is_read_is_described_and_no_other():
    schemas = description()["components"]["schemas"]
    for struct in (CompletionRequest, ChatRequest, TokenizeRequest):
        schema = schemas[struct.__name__]
        assert set(schema["properties"]) == set(struct.__struct_fields__)
        assert schema["additionalProperties"] is False


def test_every_field_that_is_not_built_has_advice_and_is_a_field():
    fields = {*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__, *TokenizeRequest.__struct_fields__}
    assert set(UNBUILT) <= fields
    assert all(advice for _, advice in UNBUILT.values())


def test_the_description_is_served(http):
    assert http.get("/openapi.json").json() == description(("tales",))
