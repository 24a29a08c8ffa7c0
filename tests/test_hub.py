"""Names become folders; what goes wrong on the way to the hub is retried or explained. The hub is a server in this file."""

import errno
import hashlib
import json
import os
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from nbengine import download
from nbengine.download import wanted_files
from nbengine.errors import ModelNotFoundError
from nbengine.hub import resolve_model

SHA = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 4000  # a megabyte
LARGE = WEIGHTS * 24  # huggingface_hub reads, resumes and reports in pieces of 10 MB


class Hub:
    """The few routes of the hub that huggingface_hub asks for, and the ways in which they fail."""

    def __init__(self):
        self.files = {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "model.safetensors": WEIGHTS,
            "consolidated.safetensors": b"again",
            "pytorch_model.bin": b"pickle",
            "model.gguf": b"gguf",
            "onnx/config.json": b"{}",
        }
        self.requests: list[tuple[str, str, dict]] = []
        self.private = self.gated = False
        self.token = "hf_right"
        self.drops = self.resets = self.busy = 0  # how many more times
        self.pace = 0.0  # seconds between two pieces of a file
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815 - the name is the method's

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path, dict(request.headers)))
        if self.busy:
            self.busy -= 1
            return self.send(request, 503, {"error": "busy"})
        authorized = request.headers.get("Authorization") == f"Bearer {self.token}"
        known = path.startswith(("/api/models/org/model", "/org/model/"))
        if not known or (self.private and not authorized):
            return self.send(request, 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            return self.api(request, path)
        if self.gated and not authorized:
            return self.send(request, 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        name = path.split("/resolve/", 1)[1].split("/", 1)[1]
        if name not in self.files:
            return self.send(request, 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        return self.file(request, name)

    def api(self, request, path):
        if "/tree/" in path:
            return self.send(
                request, 200, [{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in self.files.items()]
            )
        if "/revision/" in path and path.rsplit("/", 1)[1] not in {"main", SHA}:
            return self.send(request, 404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name, "size": len(data), "blobId": etag(data)} for name, data in self.files.items()]
        return self.send(request, 200, {"id": "org/model", "sha": SHA, "siblings": siblings, "tags": [], "private": False})

    def send(self, request, status, content, headers=()):
        body = json.dumps(content).encode()
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            request.send_header(name, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def file(self, request, name):
        data, begin = self.files[name], 0
        if (wanted := request.headers.get("Range", "")).startswith("bytes="):
            begin = int(wanted[6:].split("-")[0])
        request.send_response(206 if begin else 200)
        for key, value in {
            "ETag": f'"{etag(data)}"',
            "X-Repo-Commit": SHA,
            "Accept-Ranges": "bytes",
            "Content-Length": len(data) - begin,
        }.items():
            request.send_header(key, str(value))
        if begin:
            request.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if request.command == "HEAD":
            return
        rest = data[begin:]
        if len(rest) > 1000 and (self.drops or self.resets):
            request.wfile.write(rest[: len(rest) * 5 // 6])
            request.wfile.flush()
            if self.resets:  # the line is cut: RST instead of FIN
                self.resets -= 1
                request.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))
            else:
                self.drops -= 1
            request.close_connection = True
            request.connection.close()
            return
        try:
            for start in range(0, len(rest), 1_000_000):
                request.wfile.write(rest[start : start + 1_000_000])
                time.sleep(self.pace)
        except OSError:  # the client went away
            request.close_connection = True

    def gets(self, name):
        return [headers for command, path, headers in self.requests if command == "GET" and path.endswith(name)]


def etag(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))]:
        monkeypatch.delenv(name)
    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(download, "DELAYS", (0.01, 0.01, 0.01, 0.01))
    yield served
    served.close()


def offline_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens


# Local names


def model_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_folder_is_its_own_answer(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (folder, str(folder), "./org/model", "org/model", "org/model/", "~/org/model"):
        assert resolve_model(name).samefile(folder)


def test_tales_is_the_bundled_model_and_a_path_to_tales_is_not(tmp_path, monkeypatch):
    package = tmp_path / "package"
    bundled = model_folder(package / "tales")
    monkeypatch.setattr("nbengine.hub.__file__", str(package / "hub.py"))
    local = model_folder(tmp_path / "here" / "tales")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_model("tales") == bundled
    assert resolve_model("./tales").samefile(local)
    assert resolve_model(Path("tales")).samefile(local)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "../missing", "~/missing", "missing/", Path("org/model")])
def test_a_path_that_leads_nowhere_does_not_ask_the_hub(hub, name):
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        resolve_model(name)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "my model", "org/model?x", "", "https://huggingface.co/org/model"])
def test_a_name_that_can_be_neither_says_so(hub, name):
    with pytest.raises(ModelNotFoundError, match="neither a folder here nor a hub id"):
        resolve_model(name)
    assert hub.requests == []


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_model(tmp_path, weights=False) == tmp_path
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model(tmp_path / "model.safetensors")


def test_pickles_and_copies_of_the_weights_are_not_wanted():
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "original/x.json",
    ]
    names += ["tokenizer.model", "merges.txt", "pytorch_model.bin", "model.gguf", "model.pt", "training_args.bin", "README.md"]
    names += ["additional_chat_templates/rag.jinja", "chat_template.jinja", "modeling_x.py", "flax_model.msgpack"]
    wanted = {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model", "merges.txt"}
    wanted |= {"additional_chat_templates/rag.jinja", "chat_template.jinja", "modeling_x.py"}
    assert set(wanted_files(names, weights=True)) == wanted
    assert set(wanted_files(names, weights=False)) == wanted - {"model-00001-of-00002.safetensors"}
    assert wanted_files(["part-1.safetensors", "part-2.safetensors"], weights=True) == ["part-1.safetensors", "part-2.safetensors"]


# The hub


def test_a_model_is_downloaded_once_and_without_what_is_not_wanted(hub, tmp_path):
    calls = []
    folder = resolve_model("org/model", progress=lambda *call: calls.append(call))
    assert {file.name for file in folder.rglob("*") if file.is_file()} == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    before = len(hub.gets("model.safetensors"))
    assert resolve_model("org/model") == folder
    assert len(hub.gets("model.safetensors")) == before == 1
    assert hub.gets(".bin") == hub.gets(".gguf") == hub.gets("consolidated.safetensors") == []


def test_configuration_alone_is_downloaded_without_weights(hub):
    folder = resolve_model("org/model", weights=False)
    assert (folder / "tokenizer.json").is_file()
    assert hub.gets("model.safetensors") == []
    assert (resolve_model("org/model") / "model.safetensors").is_file()


def test_progress_rises_to_the_total(hub):
    hub.files["model.safetensors"], hub.pace = LARGE, 0.03
    calls = []
    resolve_model("org/model", progress=lambda *call: calls.append(call))
    total = sum(len(hub.files[name]) for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"))
    assert {(phase, of) for phase, _, of in calls} == {("downloading", total)}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert any(0 < done < total for _, done, _ in calls)


def test_an_interrupt_ends_the_download_at_once(hub):
    hub.files["model.safetensors"], hub.pace = LARGE * 10, 0.05

    def progress(_phase, _done, _total):
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        resolve_model("org/model", progress=progress)
    assert time.perf_counter() - start < 3  # of the 12 that the download would take
    deadline = start + 5
    while any(thread.name == "nbengine-download" for thread in threading.enumerate()):
        assert time.perf_counter() < deadline, "the download goes on behind the user's back"
        time.sleep(0.05)


def test_a_dropped_connection_resumes_where_it_stopped(hub):
    hub.files["model.safetensors"], hub.drops = LARGE, 1
    folder = resolve_model("org/model")
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert [headers.get("Range") for headers in hub.gets("model.safetensors")] == [None, f"bytes={10 << 20}-"]


def test_a_reset_connection_is_tried_again(hub):
    hub.resets = 2
    assert (resolve_model("org/model") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_busy_hub_is_tried_again(hub):
    hub.busy = 2
    assert resolve_model("org/model").is_dir()


def test_a_hub_that_stays_away_is_reported(hub, monkeypatch, tmp_path):
    offline_hub(monkeypatch)
    with pytest.raises(ModelNotFoundError, match=r"could not be downloaded from .*check the connection"):
        resolve_model("org/model")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_downloaded_model_needs_no_hub(hub, monkeypatch):
    folder = resolve_model("org/model")
    offline_hub(monkeypatch)
    assert resolve_model("org/model") == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("org/model") == folder
    assert resolve_model("org/model", weights=False) == folder


def test_offline_asks_nobody(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE forbids"):
        resolve_model("org/model")
    assert hub.requests == []


def test_offline_does_not_take_a_model_without_its_weights(hub, monkeypatch):
    resolve_model("org/model", weights=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="is not complete"):
        resolve_model("org/model")


def test_a_missing_model_says_so(hub):
    with pytest.raises(ModelNotFoundError, match=r"org/modle is not on the hub .*check the spelling"):
        resolve_model("org/modle".replace("model", "x"))
    with pytest.raises(ModelNotFoundError, match="is not on the hub"):
        resolve_model("nothing")


@pytest.mark.parametrize("name", ["tale", "Tales", "TALE"])
def test_a_name_close_to_the_bundled_models_suggests_that(hub, name):
    hub.files = {}
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'tales'\? That is the bundled model"):
        resolve_model(name)
    with pytest.raises(ModelNotFoundError) as far:
        resolve_model("org/gone")
    assert "tales" not in str(far.value)


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(tmp_path, revision):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=f"revision='{revision}' means a version of a model on the hub, and the folder .* leave revision out"
    ):
        resolve_model(tmp_path, revision=revision)
    with pytest.raises(ValueError, match="and the bundled model has only the one"):
        resolve_model("tales", revision=revision)
    assert resolve_model(tmp_path) == tmp_path


def test_a_missing_revision_says_so(hub):
    with pytest.raises(ModelNotFoundError, match="has no revision 'v9'"):
        resolve_model("org/model", revision="v9")
    assert resolve_model("org/model", revision=SHA).is_dir()


def test_a_gated_model_says_where_to_accept_its_terms(hub):
    hub.gated = True
    with pytest.raises(ModelNotFoundError, match=rf"is gated: accept its terms at {hub.url}/org/model, then set HF_TOKEN"):
        resolve_model("org/model")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_token_opens_gated_and_private_models(hub, monkeypatch, how):
    hub.gated = hub.private = True
    if how == "environment":
        monkeypatch.setenv("HF_TOKEN", hub.token)
    assert resolve_model("org/model", token=hub.token if how == "argument" else None).is_dir()


def test_a_private_model_without_a_token_says_so(hub):
    hub.private = True
    with pytest.raises(ModelNotFoundError, match=r"or it is private: .*HF_TOKEN"):
        resolve_model("org/model", token="hf_wrong")


def test_a_model_without_safetensors_says_what_it_has(hub):
    del hub.files["model.safetensors"], hub.files["consolidated.safetensors"]
    with pytest.raises(ModelNotFoundError, match=r"no safetensors weights \(it has \.bin, \.gguf\)"):
        resolve_model("org/model")
    assert hub.gets(".json") == []


def test_an_adapter_is_not_a_model(hub):
    del hub.files["config.json"]
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model("org/model")


def test_a_full_disk_is_found_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ModelNotFoundError, match=r"does not fit on the disk of .*download_dir="):
        resolve_model("org/model")
    assert hub.gets("model.safetensors") == []


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "may write to"), (errno.EROFS, "may write to")]
)
def test_what_the_disk_refuses_is_explained(hub, monkeypatch, number, advice):
    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelNotFoundError, match=advice):
        resolve_model("org/model")


def test_the_download_goes_where_it_is_told(hub, tmp_path, monkeypatch):
    assert resolve_model("org/model", download_dir=tmp_path / "there").is_relative_to(tmp_path / "there")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert resolve_model("org/model").is_relative_to(tmp_path / "cache")


def test_without_a_callback_a_bar_is_shown(hub, capsys):
    hub.files["model.safetensors"], hub.pace = LARGE, 0.03
    resolve_model("org/model")
    assert "downloading org/model" in capsys.readouterr().err
