"""Our own OpenAPI description: schemathesis sends what it allows and what it forbids, and every answer must be as described."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
import pytest
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

from nbengine.serve.openapi import description
from nbengine.serve.protocol import UNBUILT, ChatRequest, CompletionRequest, TokenizeRequest

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, ignored_auth, unsupported_method,
    negative_data_rejection,
]  # fmt: skip
OPERATIONS = [(path, method) for path, methods in description()["paths"].items() for method in methods]
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_described(server, path, method, mode):
    schema = schemathesis.openapi.from_dict(description())
    schema.config.update(base_url=server.url)
    operation = schema[path][method.upper()]
    headers = {"Authorization": f"Bearer {server.api_key}"}
    checks = [check for check in CHECKS if mode is GenerationMode.NEGATIVE or check is not negative_data_rejection]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(st.data())
    def check(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            for name in ("max_tokens", "max_completion_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 2)  # described as unbounded, and this machine is slow
            if "completions" in path:
                case.body.setdefault("max_tokens", 2)
            if isinstance(case.body.get("n"), int):
                case.body["n"] = min(case.body["n"], 3)
        case.call_and_validate(headers=headers, checks=checks)

    check()


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
    assert http.get("/openapi.json").json() == description()
