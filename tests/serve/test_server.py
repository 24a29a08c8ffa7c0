"""A server comes, is announced, and goes: with close(), with its engine, with its process; and its keys are seen nowhere."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import openai
import psutil
import pytest

import nbengine.serve
from nbengine import Engine, SamplingParams
from nbengine.serve import announce
from nbengine.serve.server import names_of

KEY = "a-key-of-our-own-0123456789"


@pytest.fixture
def make_engine():
    made = []

    def make(**config):
        engine = Engine("tales", **{"num_gpu_blocks_override": 128, "progress": lambda *_: None, **config})
        made.append(weakref.ref(engine))
        return engine

    yield make
    for engine in made:
        if engine() is not None:
            engine().close()


def models(server, key=None):
    return httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key or server.api_key}"}, timeout=30)


def test_it_is_announced_while_it_is_open_and_says_when_it_sleeps(engine):
    with engine.serve() as server:
        assert stat.S_IMODE(server.announcement.stat().st_mode) == 0o600
        [told] = announce.list_live()
        assert told["url"] == server.url
        assert told["secret"] == server.api_key
        assert told["models"] == ["tales"]
        assert told["state"] == "ready"
        engine.sleep()
        assert announce.list_live()[0]["state"] == "asleep"
        assert models(server).json()["data"][0]["state"] == "asleep"
        engine.wake_up()
        assert announce.list_live()[0]["state"] == "ready"
        client = openai.OpenAI(**nbengine.serve.client())
        assert client.completions.create(model="tales", prompt="Once", max_tokens=2).usage.completion_tokens == 2
        client.close()
    assert server.closed
    assert announce.list_live() == []
    assert engine.http_stats()["servers"] == []
    with pytest.raises(httpx.ConnectError):
        models(server)
    server.close()
    with pytest.raises(LookupError, match="no server"):
        nbengine.serve.client()


def test_closing_tells_those_who_wait(engine, until):
    server = engine.serve()
    headers = {"Authorization": f"Bearer {server.api_key}"}
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True}
    answers = []
    whole = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", headers=headers, json=body, timeout=60))
    )
    whole.start()
    with httpx.stream("POST", f"{server.url}/v1/completions", headers=headers, json={**body, "stream": True}, timeout=60) as stream:
        parts = stream.iter_text()
        next(parts)
        until(lambda: engine.stats()["num_running"] == 2)
        server.close()
        rest = "".join(parts)
    whole.join(30)
    assert '"server_closed"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert answers[0].status_code == 503
    until(lambda: engine.stats()["num_running"] == 0)


def test_an_engine_that_is_closed_or_dropped_takes_its_servers_along(make_engine):
    engine = make_engine()
    server = engine.serve()
    engine.close()
    assert server.closed
    assert announce.list_live() == []
    engine = make_engine()
    engine.serve()
    held = weakref.ref(engine)
    assert announce.list_live()
    del engine
    gc.collect()
    assert held() is None
    assert announce.list_live() == []


def test_a_stream_that_outlives_its_engine_ends_with_an_error(make_engine):
    engine = make_engine()
    server = engine.serve()
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {server.api_key}"}, json=body, timeout=60
    ) as stream:
        parts = stream.iter_text()
        next(parts)
        engine.close()
        rest = "".join(parts)
    assert '"error"' in rest
    assert "[DONE]" in rest


def test_a_server_keeps_its_engine_but_what_it_answers_does_not(make_engine):
    engine = make_engine()
    server = engine.serve()
    held = weakref.ref(engine)
    del engine
    gc.collect()
    assert models(server).status_code == 200
    assert held() is not None
    del server
    gc.collect()
    assert held() is None


def test_two_engines_of_one_process_have_a_server_each(make_engine):
    one, two = make_engine().serve(served_model_name="fairy"), make_engine().serve(served_model_name=["folk", "tales"])
    assert [told["models"] for told in announce.list_live()] == [["fairy"], ["folk", "tales"]]
    assert models(one, two.api_key).status_code == 401
    assert nbengine.serve.client("folk")["base_url"] == two.base_url
    with pytest.raises(LookupError, match="fairy"):
        nbengine.serve.client()
    headers = {"Authorization": f"Bearer {two.api_key}"}
    for name in ("folk", "tales", None):
        body = {"prompt": "x", "max_tokens": 1, **({} if name is None else {"model": name})}
        assert httpx.post(f"{two.url}/v1/completions", headers=headers, json=body).json()["model"] == (name or "folk")
    assert httpx.post(f"{two.url}/v1/completions", headers=headers, json={"model": "fairy", "prompt": "x"}).status_code == 404
    for server in (one, two):
        server.engine.close()


def test_a_key_of_ones_own_is_taken_beside_the_secret_and_needed_beyond_this_machine(engine):
    with pytest.raises(ValueError, match="api_key"):
        engine.serve(host="0.0.0.0")
    with pytest.raises(ValueError, match="api_key"):
        engine.serve(host="::")
    with engine.serve(host="0.0.0.0", api_key=KEY) as server:
        assert server.api_key == KEY
        assert models(server, KEY).status_code == 200
        assert models(server, announce.list_live()[0]["secret"]).status_code == 200
        assert models(server, KEY[:-1]).status_code == 401
    with engine.serve(host="localhost") as server:
        assert models(server).status_code == 200


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prot": 1}, "did you mean 'port'"),
        ({"port": 70000}, "port"),
        ({"port": "8000"}, "port"),
        ({"host": "no.such.host.invalid"}, "host"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "with space"}, "api_key"),
        ({"api_key": "a\nb"}, "api_key"),
        ({"max_queue": -1}, "max_queue"),
        ({"body_timeout": 0}, "body_timeout"),
        ({"served_model_name": [""]}, "served_model_name"),
    ],
)
def test_options_that_cannot_be_are_refused_and_leave_nothing_open(engine, options, told):
    with pytest.raises((ValueError, TypeError), match=told):
        engine.serve(**options)
    assert announce.list_live() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tornado drops the socket that it could not bind
def test_a_port_that_is_taken_is_told_of(engine):
    with engine.serve() as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(OSError, match="cannot listen"):
            engine.serve(port=port)
        assert len(announce.list_live()) == 1
    with engine.serve(port=port) as again:
        assert again.url == server.url


def test_a_unix_socket_is_its_users_alone(engine, tmp_path):
    path = tmp_path / "nb.sock"
    with engine.serve(uds=path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        told = announce.list_live()[0]
        assert told["socket"] == str(path)
        assert "url" not in told
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), headers={"Authorization": f"Bearer {server.api_key}"}) as http:
            assert http.get(f"{server.base_url}/models").status_code == 200
            assert http.post(f"{server.base_url}/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "server"])
def test_a_unix_socket_takes_nobodys_place(engine, tmp_path, kind):
    path = tmp_path / "taken"
    with contextlib.ExitStack() as stack:
        if kind == "file":
            path.write_text("precious")
        elif kind == "folder":
            path.mkdir()
        else:
            other = stack.enter_context(engine.serve(uds=path))
        before = path.lstat().st_ino
        with pytest.raises(OSError, match=f"cannot listen at {path}.*choose another path"):
            engine.serve(uds=path)
        assert path.lstat().st_ino == before
        if kind == "server":
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), headers={"Authorization": f"Bearer {other.api_key}"}) as http:
                assert http.get(f"{other.base_url}/models").status_code == 200


def test_a_unix_socket_that_was_left_behind_is_replaced_and_another_in_its_place_stays(engine, tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "nb.sock"))
    monkeypatch.chdir(tmp_path)
    with engine.serve(uds="nb.sock") as server:
        assert server.socket == str(tmp_path / "nb.sock")
        monkeypatch.chdir("/")
        Path(server.socket).unlink()
        Path(server.socket).write_text("another's")
    assert (tmp_path / "nb.sock").read_text() == "another's"


def test_whoever_closes_it_too_waits_until_it_is_closed(make_engine, monkeypatch):
    """An engine ends its front when its servers are closed: one that is only being closed would never be."""
    remove = announce.remove
    monkeypatch.setattr(announce, "remove", lambda file: (time.sleep(0.05), remove(file)))
    for _ in range(3):
        engine = make_engine()
        server = engine.serve()
        port = int(server.url.rpartition(":")[2])
        closers = [threading.Thread(target=close) for close in (server.close, server.close, engine.close)]
        for closer in closers:
            closer.start()
            time.sleep(0.01)
        for closer in closers:
            closer.join()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)


def test_an_engine_without_a_tokenizer_cannot_be_served(make_engine):
    with pytest.raises(ValueError, match="tokenizer"):
        make_engine(skip_tokenizer_init=True).serve()
    assert announce.list_live() == []


@pytest.mark.parametrize(
    ("model", "names"),
    [("tales", ("tales",)), ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", "Qwen3-0.6B")), (str(Path(__file__).parent), ("serve",))],
)
def test_a_folders_path_is_no_name(model, names):
    assert names_of(model) == names


def test_the_key_is_shown_nowhere(engine, caplog):
    caplog.set_level(logging.DEBUG)
    with engine.serve(api_key=KEY) as server:
        secret = announce.list_live()[0]["secret"]
        for key in (KEY, secret, "wrong-key-0123"):
            httpx.post(f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {key}"}, json={"prompt": 7})
            httpx.post(f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {key}"}, json={"prompt": "x", "user": "somebody"})
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:  # as from a file with CRLF
                raw.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\r\n\r\n".encode())
                raw.recv(1000)
        shown = repr(server) + server._repr_html_() + repr(server._listener.options) + caplog.text + json.dumps(engine.http_stats())
    assert "/v1/completions" in caplog.text
    assert "somebody" in caplog.text
    assert "Malformed HTTP message" in caplog.text
    for key in (KEY, secret, "wrong-key-0123"):
        assert key not in shown
    assert "api_key=server.api_key" in shown
    line = " ".join(psutil.Process().cmdline()) + json.dumps(dict(os.environ))
    assert KEY not in line
    assert secret not in line


def test_what_it_shows_names_the_way_through_the_jupyter_server(engine, runtime, monkeypatch):
    file = Path(runtime) / "jpserver-4242.json"
    file.write_text(json.dumps({"url": "http://localhost:8888/user/me/", "token": "t0ken"}))
    monkeypatch.setenv("JPY_PARENT_PID", "4242")
    with engine.serve() as server:
        assert 'base_url="http://localhost:8888/user/me/nbengine/v1"' in repr(server)
        assert "t0ken" not in repr(server) + server._repr_html_()
    file.unlink()


def test_http_traffic_is_counted(engine):
    before = engine.http_stats()
    with engine.serve() as server:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        body = {"prompt": "Once upon a time", "max_tokens": 7, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", headers=headers, json={**body, "stream": True}) as stream:
            size = len(stream.read())
        size += len(httpx.post(f"{server.url}/v1/completions", headers=headers, json=body).content)
        size += len(httpx.get(f"{server.url}/nothing", headers=headers).content)
    after = engine.http_stats()
    assert after["bytes_sent"] - before["bytes_sent"] == size
    assert after["tokens_sent"] - before["tokens_sent"] == 14
    assert after["requests"]["200"] - before["requests"].get("200", 0) == 2
    assert after["requests"]["404"] - before["requests"].get("404", 0) == 1
    time.sleep(1.1)
    assert engine.http_stats()["tokens_per_second"] >= 1.4


# ── as a process of its own ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(tmp_path):
    started = []

    def run(*args, **env):
        process = subprocess.Popen(
            [sys.executable, "-m", "nbengine.serve", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(nbengine.__file__).parents[1]), **env},
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_names_the_nearest_option(command):
    process = command("tales", "--prt", "5")
    assert "unrecognized arguments: --prt 5; did you mean '--port'?" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


def test_the_command_says_loading_then_ready_and_goes_without_a_trace(command, tmp_path, until):
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    process = command("tales", "--num-gpu-blocks-override", "64", "--api-key-file", str(key), "--served-model-name", "fairy")
    first = process.stdout.readline()
    assert "listening at http://127.0.0.1:" in first
    url = first.split()[2].rstrip(";")
    early = httpx.post(f"{url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, json={"prompt": "x"}, timeout=60)
    if early.status_code != 200:  # it may be ready by now
        assert early.status_code == 503
        assert early.json()["error"]["code"] == "loading"
        assert "Retry-After" in early.headers
    second = process.stdout.readline()
    assert "ready: fairy" in second
    [told] = [one for one in announce.list_live() if one["pid"] == process.pid]
    assert told["state"] == "ready"
    answer = httpx.post(
        f"{url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, json={"prompt": "x", "max_tokens": 2}, timeout=60
    )
    assert answer.json()["model"] == "fairy"
    assert KEY not in " ".join(psutil.Process(process.pid).cmdline())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert KEY not in first + second + out + err
    assert told["secret"] not in first + second + out + err
    assert not list(Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob(f"nbengine-{process.pid}-*"))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["tales", "--api-key", KEY], "NBENGINE_API_KEY"),
        (["tales", "--host", "0.0.0.0"], "api_key"),
        (["tales", "--max-model-len", "0"], "max_model_len"),
        (["no-such-model"], "no-such-model"),
        (["tales", "--api-key-file", "/no/such/file"], "--api-key-file"),
    ],
)
def test_the_command_refuses_what_cannot_be_in_a_line(command, args, told):
    process = command(*args)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert told in err
    assert "Traceback" not in err
    assert KEY not in out + err


def test_a_process_that_is_killed_leaves_a_file_that_is_known_to_be_stale(command, until):
    process = command("tales", "--num-gpu-blocks-override", "64")
    process.stdout.readline()
    until(lambda: [one for one in announce.list_live() if one["pid"] == process.pid])
    process.kill()
    process.wait()
    assert list(Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob(f"nbengine-{process.pid}-*"))
    assert not [one for one in announce.list_live() if one["pid"] == process.pid]


def test_a_script_that_ends_removes_the_file(tmp_path):
    code = (
        "from nbengine import Engine; e = Engine('tales', num_gpu_blocks_override=64, progress=lambda *_: None); s = e.serve();"
        "print(s.announcement, s.announcement.exists())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    file, existed = done.stdout.split()
    assert existed == "True"
    assert not Path(file).exists()


def test_serving_does_not_change_what_the_engine_says_itself(engine):
    plain = engine.generate("Once upon a time", SamplingParams(max_tokens=8, temperature=0))[0].outputs[0].text
    with engine.serve():
        assert engine.generate("Once upon a time", SamplingParams(max_tokens=8, temperature=0))[0].outputs[0].text == plain
