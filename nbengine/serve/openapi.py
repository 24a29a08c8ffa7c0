"""Our own OpenAPI description: made from what is read, so that the two cannot differ."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

import nbengine
from nbengine.serve.protocol import UNBUILT, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
ERRORS = {
    "400": "a field is wrong, unknown or not supported; `param` names it",
    "401": "the key is missing or wrong",
    "404": "there is no such model",
    "413": "the body is too large",
    "415": "the body is not said to be JSON",
    "429": "the queue is full; Retry-After says when to try again",
    "500": "the request failed in the engine",
    "503": "the model is being loaded, is asleep, or is gone",
}


TEXT: Schema = {"type": "string", "minLength": 1}
TOKENS: Schema = {"type": "array", "minItems": 1, "items": WHOLE}
PART: Schema = {"type": "object", "required": ["text"], "properties": {"type": {"const": "text"}, "text": STRING}}
CONTENT: Schema = {"anyOf": [STRING, {"type": "array", "items": {"anyOf": [PART, STRING]}}]}
DESCRIBED: dict[str, Schema] = {  # what types alone do not say
    "prompt": {
        "description": "a text, a list of texts, token ids, or a list of lists of them",
        "anyOf": [TEXT, {"type": "array", "minItems": 1, "items": TEXT}, TOKENS, {"type": "array", "minItems": 1, "items": TOKENS}],
    },
    "messages": {
        "description": "the conversation, oldest message first; fields beside these are the template's",
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "required": ["role", "content"], "properties": {"role": STRING, "content": CONTENT}},
    },
    "logit_bias": {
        "description": "added to the logits of tokens, by their ids",
        "anyOf": [
            {
                "type": "object",
                "additionalProperties": {**NUMBER, "minimum": -100, "maximum": 100},
                "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            },
            {"type": "null"},
        ],
    },
    "stop": {"anyOf": [TEXT, {"type": "array", "items": TEXT}, {"type": "null"}]},
    "bad_words": {"anyOf": [{"type": "array", "items": TEXT}, {"type": "null"}]},
}


def _object(required: Schema, **optional: Any) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


USAGE = _object({"prompt_tokens": WHOLE, "completion_tokens": WHOLE, "total_tokens": WHOLE}, prompt_tokens_details={"type": "object"})
HEADING = {"id": STRING, "created": WHOLE, "model": STRING}
ENDING = {"finish_reason": _nullable(STRING), "stop_reason": {"type": ["string", "integer", "null"]}}
ANSWERS: dict[str, Schema] = {
    "Error": _object({"error": _object({"message": STRING, "type": STRING, "param": _nullable(STRING), "code": _nullable(STRING)})}),
    "Completion": _object(
        {
            **HEADING,
            "object": {"const": "text_completion"},
            "choices": _list(_object({"index": WHOLE, "text": STRING, "logprobs": _nullable({"type": "object"}), **ENDING})),
            "usage": USAGE,
        }
    ),
    "ChatCompletion": _object(
        {
            **HEADING,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": WHOLE,
                        "message": _object({"role": {"const": "assistant"}, "content": STRING}),
                        "logprobs": _nullable({"type": "object"}),
                        **ENDING,
                    }
                )
            ),
            "usage": USAGE,
        }
    ),
    "Model": _object({"id": STRING, "object": {"const": "model"}, "created": WHOLE, "owned_by": STRING}, max_model_len=_nullable(WHOLE)),
    "Models": _object({"object": {"const": "list"}, "data": _list({"$ref": "#/components/schemas/Model"})}),
    "Tokens": _object({"count": WHOLE, "max_model_len": WHOLE, "tokens": _list(WHOLE), "token_strs": _nullable(_list(STRING))}),
    "Text": _object({"prompt": STRING}),
    "Health": _object({"status": STRING}),
    "Version": _object({"version": STRING}),
    "Load": _object({"server_load": WHOLE}),
}
STREAMED = ("Completion", "ChatCompletion")
EVENT = {"description": "one of the events: `data` is a chunk as JSON, of the last [DONE]", **_object({"data": STRING})}
POSTS = (
    ("/v1/completions", CompletionRequest, "Completion", "Go on with a prompt"),
    ("/v1/chat/completions", ChatRequest, "ChatCompletion", "Answer a conversation"),
    ("/tokenize", TokenizeRequest, "Tokens", "The token ids of a prompt or a conversation"),
    ("/detokenize", DetokenizeRequest, "Text", "The text of token ids"),
)
GETS = (
    ("/v1/models", "Models", "The models that are served"),
    ("/health", "Health", "Whether requests would be answered"),
    ("/version", "Version", "The version of nbengine"),
    ("/load", "Load", "How many requests are being answered"),
)


@functools.cache
def description(names: tuple[str, ...] = ()) -> Schema:
    """The whole of it, for a server of models of these names."""
    bodies, components = msgspec.json.schema_components([body for _, body, _, _ in POSTS], ref_template="#/components/schemas/{name}")
    for owner, schema in components.items():
        for name, field in schema.get("properties", {}).items():
            if name in DESCRIBED:
                field.clear()
                field.update({"type": "string"} if (owner, name) == ("TokenizeRequest", "prompt") else DESCRIBED[name])
            if name == "model" and names:
                field.update({"anyOf": [{"enum": list(names)}, {"type": "null"}]})
            if name in UNBUILT:
                neutral, advice = UNBUILT[name]
                field.clear()
                field.update({"description": f"not supported: {advice}", "enum": [None, *neutral]})
    components["TokenizeRequest"]["oneOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
    paths: Schema = {path: {"get": _operation(path, about, answer)} for path, answer, about in GETS}
    paths["/v1/models/{model}"] = {
        "get": _operation("/v1/models/{model}", "One model", "Model")
        | {
            "parameters": [
                {
                    "name": "model",
                    "in": "path",
                    "required": True,
                    "schema": {"enum": list(names)} if names else {"type": "string", "minLength": 1},
                }
            ]
        }
    }
    paths["/metrics"] = {
        "get": _operation("/metrics", "For Prometheus, under vLLM's names", None)
        | {"responses": {"200": {"description": "metrics", "content": {"text/plain": {"schema": STRING}}}, **_errors("401")}}
    }
    for (path, _, answer, about), body in zip(POSTS, bodies, strict=True):
        paths[path] = {"post": _operation(path, about, answer) | {"requestBody": {"required": True, "content": _json(body)}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "nbengine", "version": nbengine.__version__, "description": "OpenAI's endpoints, with vLLM's extra fields."},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {**components, **ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "the server's key, or its secret"}},
        },
    }


def _operation(path: str, about: str, answer: str | None) -> Schema:
    content = _json({"$ref": f"#/components/schemas/{answer}"})
    if answer in STREAMED:
        content["text/event-stream"] = {"schema": EVENT}
    name = path.strip("/").replace("/", "_").translate({ord(c): "" for c in "{}"})
    return {"operationId": name, "summary": about, "responses": {"200": {"description": about, "content": content}, **_errors(*ERRORS)}}


def _errors(*statuses: str) -> Schema:
    return {status: {"description": ERRORS[status], "content": _json({"$ref": "#/components/schemas/Error"})} for status in statuses}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
