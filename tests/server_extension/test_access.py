"""Who may ask, and what a stranger is told."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from jupyter_server.auth import AllowAllAuthorizer, Authorizer
from stand_in import told
from tornado.httpclient import HTTPClientError

BODY = {"model": "tales", "prompt": "The fox"}
COMPLETIONS = "/v1/completions"


@pytest.fixture
def ask_plainly(http_server_client, jp_base_url):
    """A request with no other headers than these."""

    async def fetch(path, body=None, headers=None, **more):
        method = more.pop("method", "GET" if body is None else "POST")
        data = None if body is None else json.dumps(body)
        try:
            return await http_server_client.fetch(
                f"{jp_base_url}nbengine{path}", method=method, body=data, headers=headers or {}, follow_redirects=False, **more
            )
        except HTTPClientError as error:
            if error.response is None:
                raise
            return error.response

    return fetch


@pytest.fixture
def token(jp_serverapp):
    return jp_serverapp.identity_provider.token


@pytest.fixture
def engine(serve, jp_asyncio_loop):
    engine = jp_asyncio_loop.run_until_complete(serve())
    engine.answers[COMPLETIONS] = {"id": "1"}
    return engine


@pytest.fixture
def browser(ask_plainly, token, http_server_client, jp_serverapp):
    """The headers of a browser that has logged in, and its XSRF token."""

    async def log_in():
        response = await ask_plainly(f"/?token={token}")
        assert response.code == 200
        cookies = [cookie.partition(";")[0] for cookie in response.headers.get_list("Set-Cookie")]
        page = await http_server_client.fetch(f"{jp_serverapp.base_url}login", follow_redirects=False)
        cookies += [cookie.partition(";")[0] for cookie in page.headers.get_list("Set-Cookie") if cookie.startswith("_xsrf=")]
        xsrf = next((cookie.partition("=")[2] for cookie in cookies if cookie.startswith("_xsrf=")), "")
        return {"Cookie": "; ".join(cookies)}, xsrf

    return log_in


@pytest.mark.parametrize("way", ["Bearer {}", "bearer {}", "token {}"])
async def test_a_jupyter_token_is_the_api_key(ask_plainly, engine, token, way):
    assert (await ask_plainly(COMPLETIONS, BODY, {"Authorization": way.format(token)})).code == 200
    assert (await ask_plainly("/v1/models", None, {"Authorization": way.format(token)})).code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Basic eDp5"}])
@pytest.mark.parametrize(
    "path", [COMPLETIONS, "/tokenize", "/v1/models", "/health", "/metrics", "/kernels/1a2b3c4d/v1/completions", "/", "/x"]
)
async def test_a_missing_or_wrong_token_is_401_and_nothing_reaches_an_engine(ask_plainly, engine, headers, path):
    for body in (None, BODY):
        response = await ask_plainly(path, body, headers)
        assert response.code == 401
        assert told(response)["code"] == "invalid_api_key"
        assert "jupyter server list" in told(response)["message"]
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert engine.asked == []


async def test_where_jupyter_refuses_strangers_before_the_handlers_they_are_told_the_same(ask_plainly, engine, jp_serverapp):
    jp_serverapp.web_app.settings["allow_unauthenticated_access"] = False
    for path in (COMPLETIONS, "/v1/models", "/metrics"):
        for body in (None, BODY):
            assert told(await ask_plainly(path, body))["code"] == "invalid_api_key"
    assert (await ask_plainly("/", None, {"Accept": "text/html"})).code == 302
    assert (await ask_plainly(COMPLETIONS, method="OPTIONS")).code == 200


async def test_another_servers_token_and_the_kernels_secret_are_wrong(ask_plainly, engine, token):
    for wrong in (engine.secret, token[:-1], token + "0", token.upper()):
        assert (await ask_plainly(COMPLETIONS, BODY, {"Authorization": f"Bearer {wrong}"})).code == 401


@pytest.mark.parametrize("size", [50_000, 700_000])
async def test_a_strangers_body_is_dropped_and_the_connection_goes_on(http_server, http_server_port, jp_base_url, engine, token, size):
    body = json.dumps({"model": "tales", "prompt": "x" * size}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", http_server_port[1])
    for key, status in (("wrong", b"401"), ("wrong", b"401"), (token, b"200" if size < 100_000 else b"413")):
        head = f"POST {jp_base_url}nbengine{COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.split()[1] == status
        [length] = [line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length")]
        await reader.readexactly(int(length.split()[1]))
    writer.close()


async def test_a_browsers_request_needs_the_xsrf_token(ask_plainly, engine, browser):
    headers, xsrf = await browser()
    response = await ask_plainly(COMPLETIONS, BODY, headers)
    assert response.code == 403
    assert "_xsrf" in told(response)["message"]
    assert engine.asked == []
    assert xsrf
    assert (await ask_plainly(COMPLETIONS, BODY, {**headers, "X-XSRFToken": "wrong"})).code == 403
    assert (await ask_plainly(COMPLETIONS, BODY, {**headers, "X-XSRFToken": xsrf})).code == 200
    assert (await ask_plainly("/v1/models", None, {**headers, "Referer": "http://127.0.0.1"})).code == 200


async def test_another_sites_page_gets_nothing_with_a_browsers_cookie(ask_plainly, engine, browser):
    headers, xsrf = await browser()
    response = await ask_plainly(COMPLETIONS, BODY, {**headers, "X-XSRFToken": xsrf, "Origin": "http://example.org"})
    assert response.code == 404
    assert engine.asked == []
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_person_without_a_login_is_sent_to_log_in(ask_plainly, engine, jp_base_url):
    response = await ask_plainly("/", None, {"Accept": "text/html"})
    assert response.code == 302
    assert response.headers["Location"].startswith(f"{jp_base_url}login?next=")


async def test_the_extension_is_no_landing_page(jp_serverapp, extension):
    assert extension.default_url == "/"  # JupyterHub opens what another is


async def test_a_host_that_is_not_ours_is_refused_for_that(ask_plainly, engine, token):
    response = await ask_plainly(COMPLETIONS, BODY, {"Host": "example.org", "Authorization": f"Bearer {token}"})
    assert response.code == 403


async def test_an_authorizer_may_allow_to_look_and_not_to_generate(ask_plainly, engine, token, jp_serverapp):
    asked = []

    class Looking(Authorizer):
        def is_authorized(self, handler, user, action, resource):
            asked.append((action, resource))
            return action == "read"

    jp_serverapp.web_app.settings["authorizer"] = Looking()
    headers = {"Authorization": f"Bearer {token}"}
    assert (await ask_plainly("/v1/models", None, headers)).code == 200
    for path in (COMPLETIONS, "/kernels/1a2b3c4d/v1/completions"):
        response = await ask_plainly(path, BODY, headers)
        assert response.code == 403
        assert "execute" in told(response)["message"]
    assert set(asked) == {("read", "nbengine"), ("execute", "nbengine")}
    assert [request.path for request in engine.asked] == ["/v1/models"]


class Nobody(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return False


async def test_no_log_carries_a_token_or_the_secret(ask_plainly, engine, token, caplog, jp_serverapp):
    caplog.set_level(logging.DEBUG)
    wrong = "0123456789-a-wrong-token"
    engine.answers["/v1/broken"] = 500
    for path in (COMPLETIONS, "/v1/broken", "/v1/models", "/nothing"):
        for one in (token, wrong):
            body = None if path == "/v1/models" else BODY
            await ask_plainly(path, body, {"Authorization": f"Bearer {one}"})
            await ask_plainly(f"{path}?token={one}", body, {"Referer": f"http://x/?token={one}"})
    jp_serverapp.web_app.settings["authorizer"] = Nobody()
    assert (await ask_plainly(f"{COMPLETIONS}?token={token}", BODY)).code == 403
    jp_serverapp.web_app.settings["authorizer"] = AllowAllAuthorizer()
    engine.server.stop()
    await ask_plainly(COMPLETIONS, BODY, {"Authorization": f"Bearer {token}"})
    assert "/nbengine/v1/completions" in caplog.text
    for private in (token, wrong, engine.secret):
        assert private not in caplog.text
