"""Bodies that are huge, deep, of wrong types or no text at all, and clients that are slow: refused or outlasted, the engine untouched."""

from __future__ import annotations

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbengine.serve import listener
from nbengine.serve.protocol import ChatRequest, CompletionRequest

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
JSON = {"Content-Type": "application/json"}
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture
def small(engine):
    """A server that bears little."""
    with engine.serve(max_body_size=8000, body_timeout=0.5, stall_timeout=1.0, max_queue=0) as server:
        yield server


def head(server, path, **headers):
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {server.api_key}", "Content-Type: application/json"]
    return "\r\n".join([*lines, *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""]).encode()


@pytest.fixture
def connect():
    opened = []

    def open_(server, **options):
        where = urlsplit(server.url)
        one = socket.socket()
        for name, value in options.items():
            one.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        one.settimeout(30)
        one.connect((where.hostname, where.port))
        opened.append(one)
        return one

    yield open_
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"7", b'"x"', b"{", b'{"prompt": ', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}', b'{"messages": [{"role": "user", "content": "\\udfff"}]}', b"\xef\xbb\xbf{}", b'{"temperature": NaN}',
        b'{"temperature": 1e999}', b'{"n": 99999999999999999999999999}', b'{"prompt": [99999999999999999999999999]}',
        b'{"seed": 1e400}', b"{" * 100_000, b"[" * 100_000, b'{"messages": ' + b"[" * 100_000, b'{"messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"messages": [' + b'{"role": "user", "content": ' + b"[" * 500 + b"]" * 500 + b"}]}",
        b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": ' + b'{"a": ' * 400 + b"1" + b"}" * 400 + b"}}",
        b'{"unknown": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"logit_bias": {"-1": 1}, "prompt": "x"}', b'{"stop": ["' + b"a" * 5000 + b'"], "prompt": "x"}', b"\x00" * 100,
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_bodies_that_are_wrong_are_refused(http, body):
    for path in PATHS:
        answer = http.post(path, content=body, headers=JSON)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("path", "struct", "base"),
    [
        ("/v1/completions", CompletionRequest, {"prompt": "The fox"}),
        ("/v1/chat/completions", ChatRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_no_value_of_any_field_makes_an_error_of_ours(http, path, struct, base):
    fields = [name for name in struct.__struct_fields__ if name not in {"stream", "max_tokens", "max_completion_tokens", "n"}]

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(fields) | st.text(max_size=6), VALUES, max_size=3))
    def check(values):
        try:
            body = json.dumps({"max_tokens": 2, **base, **values}).encode()
        except UnicodeEncodeError:
            return
        answer = http.post(path, content=body, headers=JSON)
        assert answer.status_code in {200, 400, 404}, answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["param"] is None or isinstance(error["param"], str)

    check()


@given(st.binary(max_size=200))
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_no_bytes_make_an_error_of_ours(http, data):
    assert http.post("/v1/chat/completions", content=data, headers=JSON).status_code == 400


@given(st.binary(max_size=300))
@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
def test_no_bytes_in_place_of_http_make_it_hang(server, data):
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=10) as one:
        one.sendall(data + b"\r\n\r\n")
        one.shutdown(socket.SHUT_WR)
        answer = one.recv(1 << 16)
    assert b" 500 " not in answer.split(b"\r\n")[0]


def test_a_body_that_is_too_large_is_413_however_it_comes(small):
    with httpx.Client(base_url=small.url, headers={"Authorization": f"Bearer {small.api_key}", **JSON}) as http:
        for content in (b'{"prompt": "' + b"x" * 9000, iter([b'{"prompt": "', b"x" * 5000, b"x" * 5000]), b"x" * 1_000_000):
            answer = http.post("/v1/completions", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_body_of_another_kind_is_415(http):
    answer = http.post("/v1/completions", content=b"prompt=x", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 415


def test_a_client_that_never_sends_its_body_is_let_go(small, connect):
    one = connect(small)
    one.sendall(head(small, "/v1/completions", Content_Length=100) + b'{"prom')
    began = time.monotonic()
    assert one.recv(100) == b""
    assert time.monotonic() - began < 10


def test_a_client_that_takes_nothing_costs_nothing_and_is_let_go(small, connect, engine, until):
    """Echo makes the answer larger than what the kernel keeps: the server waits for the client with one write, then lets go."""
    one = connect(small, SO_RCVBUF=2048)
    body = {"prompt": list(range(10, 310)) * 5, "echo": True, "logprobs": 5, "n": 32, "max_tokens": 500, "ignore_eos": True, "stream": True}
    body = json.dumps(body).replace(" ", "").encode()
    one.sendall(head(small, "/v1/completions", Content_Length=len(body)) + body)
    until(lambda: engine.stats()["num_running"] == 32)
    until(lambda: any(stream.waits for stream in small._listener.watched))
    sent = engine.http_stats()["bytes_sent"]
    until(lambda: engine.stats()["num_running"] == 0, timeout=30)
    assert engine.http_stats()["bytes_sent"] - sent < 100_000
    assert not small._listener.watched


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "fox " * 2_000_000}), ("/detokenize", {"tokens": [100] * 2_000_000})])
def test_a_whole_answer_that_nobody_takes_is_let_go(engine, connect, until, path, body):
    """One that is larger than what a system takes from its sender on its own account (4 MiB, on Linux)."""
    body = json.dumps(body).encode()
    with engine.serve(stall_timeout=1.0, max_body_size=32 << 20) as server:
        one = connect(server, SO_RCVBUF=2048)
        one.sendall(head(server, path, Content_Length=len(body)) + body)
        until(lambda: server._listener.watched, timeout=60)
        until(lambda: not server._listener.watched, timeout=30)
        assert httpx.get(f"{server.url}/version", headers={"Authorization": f"Bearer {server.api_key}"}).status_code == 200


def test_a_large_answer_comes_whole(server, http):
    text = "Once upon a time there was a fox. " * 40_000
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_a_slow_client_gets_everything_in_the_end(server, connect):
    one = connect(server, SO_RCVBUF=2048)
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 120, "ignore_eos": True, "n": 4, "stream": True, "logprobs": 5}).encode()
    one.sendall(head(server, "/v1/completions", Content_Length=len(body), Connection="close") + body)
    time.sleep(1.0)
    data = b""
    while chunk := one.recv(4096):
        data += chunk
        time.sleep(0.001)
    assert data.count(b'"finish_reason":"length"') == 4
    assert data.count(b'"token_logprobs"') > 4
    assert b"data: [DONE]" in data


def test_a_full_queue_is_429_with_a_time_to_come_back(small, engine, until):
    headers = {"Authorization": f"Bearer {small.api_key}"}
    most = engine.info.max_num_seqs
    with httpx.Client(base_url=small.url, headers=headers, timeout=60) as http:
        assert http.post("/v1/completions", json={"prompt": "x", "n": most + 1}).status_code == 400  # it never has a place
        with http.stream(
            "POST", "/v1/completions", json={"prompt": "x", "n": most, "max_tokens": 1900, "stream": True, "ignore_eos": True}
        ) as full:
            assert full.status_code == 200, full.read()
            parts = full.iter_bytes()
            next(parts)
            answer = http.post("/v1/completions", json={"prompt": "x"})
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        until(lambda: http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200)


@pytest.mark.parametrize("given_key", [None, "", "Bearer", "Bearer wrong", "Basic eDp5", "Bearer \xff", "token x"])
def test_without_the_key_there_is_nothing(server, given_key):
    headers = {} if given_key is None else {"Authorization": given_key.encode("latin-1")}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for path in (*PATHS, "/health", "/metrics", "/v1/models", "/v1/models/tales", "/version", "/load", "/openapi.json", "/nothing"):
            for method in ("GET", "POST", "DELETE"):
                answer = http.request(method, path, content=b"{}" if method == "POST" else None)
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"


def test_other_methods_are_refused(http):
    for method, path in (
        ("GET", "/v1/completions"),
        ("POST", "/health"),
        ("DELETE", "/v1/models/tales"),
        ("PUT", "/tokenize"),
        ("OPTIONS", "/v1/models"),
    ):
        answer = http.request(method, path)
        assert answer.status_code == 405, (method, path)
        assert answer.json()["error"]["code"] == "method_not_allowed"
    assert "access-control-allow-origin" not in http.get("/v1/models").headers


def test_a_silent_stream_gets_comments_that_clients_pass_over(server, engine, monkeypatch):
    monkeypatch.setattr(listener, "SILENCE", 0.05)
    monkeypatch.setattr(listener, "LOOK", 0.05)
    engine.pause()
    body = {"prompt": "Once", "max_tokens": 3, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {server.api_key}"}, json=body, timeout=30
    ) as stream:
        parts = stream.iter_text()
        assert next(parts).startswith(": ping\n\n")
        engine.resume()
        assert "".join(parts).endswith("data: [DONE]\n\n")
