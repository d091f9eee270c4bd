"""Hub names, against a small server that speaks the Hugging Face hub's protocol: what is downloaded
and what is not, the cache, resumption, and errors that say what to do."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from huggingface_hub import errors as hub_errors

import checkpoint as checkpoint_module
from checkpoint import local_directory

SHA = "0123456789abcdef0123456789abcdef01234567"  # of the one commit
LARGE = "model-00001-of-00001.safetensors"


class Handler(BaseHTTPRequestHandler):
    """Answers for `server.repositories`: name -> directory, or None if gated."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+|/tree/\w+)?", path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/([\w.-]+)", path)
        if not (api or file):
            return self.reply(404)
        name = (api or file)[1]
        if name not in self.server.repositories:
            return self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="no such one")
        directory = self.server.repositories[name]
        if directory is None:
            return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        if file:
            return self.send(directory / file[2])
        files = sorted(path for path in directory.iterdir())
        if "/tree/" in path:
            answer = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)}
                for f in files
            ]
        else:
            siblings = [{"rfilename": f.name} for f in files]
            answer = {"id": name, "modelId": name, "sha": SHA, "siblings": siblings}
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def send(self, path):
        if not path.is_file():
            return self.reply(404, X_Error_Code="EntryNotFound")
        data, start = path.read_bytes(), 0
        headers = {"X_Repo_Commit": SHA, "ETag": f'"{etag(path)}"', "Accept_Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and path.name in self.server.broken:
            self.server.broken.remove(path.name)  # once: half of it, then the line is cut
            headers["Content_Length"] = len(data)
            self.reply(200, data[: len(data) // 2], **headers)
            self.close_connection = True
            return None
        return self.reply(206 if wanted else 200, data[start:], **headers)


def etag(path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(checkpoint, tmp_path):
    """A server with the repository org/tiny: a checkpoint, and what must never be fetched."""
    directory = tmp_path / "served"
    shutil.copytree(checkpoint, directory)
    (directory / "modeling_deepseek.py").write_text("raise SystemExit")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "tiktoken.model").write_bytes(b"IQ== 0")  # not read beside a tokenizer.json
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories = {"org/tiny": directory, "org/gated": None}
    server.requests, server.broken = [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, tmp_path, *command, timeout=120, **environment):
    """The command in a process of its own: the library reads the environment when imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    clean |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "*",
    }
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=timeout
    )


def bodies(hub) -> list[str]:
    """The files whose content was asked for."""
    return [
        path.split("/")[-1] for verb, path, _ in hub.requests if verb == "GET" and "resolve" in path
    ]


def local(name: str) -> list[str]:
    return ["-c", f"import checkpoint; print(checkpoint.local_directory({name!r}))"]


def select(name: str, chat_file) -> list:
    command = ["select_experts.py", "--model", name, "--data", chat_file]
    return [*command, "--n_sample_tokens", 200, "--seq_length", 64, "--output"]


def test_a_command_by_hub_name_then_from_the_cache_then_offline(hub, chat_file, tmp_path):
    command = select("org/tiny", chat_file)
    first = run(hub, tmp_path, *command, tmp_path / "first.json")
    assert first.returncode == 0, first.stderr
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {"tiktoken.model"}
    never = {"modeling_deepseek.py", "pytorch_model.bin"}
    assert wanted <= set(bodies(hub)) and not never & set(bodies(hub))
    cached = {path.name for path in (tmp_path / "home").rglob("*")}
    assert wanted <= cached and not never & cached
    hub.requests.clear()
    again = run(hub, tmp_path, *command, tmp_path / "second.json")
    assert again.returncode == 0 and hub.requests and not bodies(hub), again.stderr
    hub.requests.clear()
    offline = run(hub, tmp_path, *command, tmp_path / "third.json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and not hub.requests, offline.stderr
    assert (tmp_path / "first.json").read_text() == (tmp_path / "third.json").read_text()
    hub.repositories.clear()  # taken off the hub: what was downloaded still serves
    assert run(hub, tmp_path, *local("org/tiny")).returncode == 0


@pytest.mark.parametrize(
    "name, environment, message",
    [
        ("org/unknown", {}, "; no such repository on the Hugging Face hub, or a private one"),
        ("org/gated", {}, "consent: give it at https://huggingface.co/org/gated, .*hf auth login"),
        (
            "org/tiny",
            {"HF_HUB_OFFLINE": "1"},
            "offline mode is .*fetch it elsewhere with `hf download org/tiny",
        ),
        ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "fetch it elsewhere with `hf download"),
        ("org/tiny/more", {}, "no such checkpoint directory"),
    ],
)
def test_what_cannot_be_had_is_said_with_what_to_do(
    hub, chat_file, tmp_path, name, environment, message
):
    command = [*select(name, chat_file), tmp_path / "cfg.json"]
    done = run(hub, tmp_path, *command, timeout=30, **environment)
    assert done.returncode == 1 and not (tmp_path / "cfg.json").exists()
    (line,) = done.stderr.splitlines()
    begin = f"error: {name}: no such checkpoint directory in the working directory, {ROOT}"
    assert line.startswith(begin) and len(line) < len(begin) + 290
    assert re.search(message, line), line


def test_a_download_that_broke_off_goes_on_where_it_stopped(hub, tmp_path):
    served = hub.repositories["org/tiny"] / LARGE
    served.write_bytes(os.urandom(30_000_000))
    hub.broken.add(LARGE)
    done = run(hub, tmp_path, *local("org/tiny"))
    if done.returncode:  # some versions of the library leave the second attempt to the next call
        done = run(hub, tmp_path, *local("org/tiny"))
    assert done.returncode == 0, done.stderr
    asked = [r for verb, path, r in hub.requests if verb == "GET" and path.endswith(LARGE)]
    assert len(asked) == 2 and asked[0] is None, asked  # and nothing from the beginning again
    start = int(re.fullmatch(r"bytes=(\d+)-", asked[1])[1])
    assert 10_000_000 < start <= 15_000_000  # the library writes pieces of 10 MiB
    snapshot = done.stdout.strip().splitlines()[-1]
    with open(os.path.join(snapshot, LARGE), "rb") as file:
        assert file.read() == served.read_bytes()


@pytest.mark.parametrize(
    "error, said",
    [
        (hub_errors.HFValidationError("Repo id\nis bad"), "did not give it (Repo id is bad); the"),
        (OSError(28, "No space left"), "did not give it ([Errno 28] No space left); the same"),
        (
            hub_errors.LocalEntryNotFoundError("word " * 90),
            f"reached ({'word ' * 23}...); if this is",
        ),
    ],
)
def test_an_error_of_the_library_is_one_short_line(monkeypatch, error, said):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint_module.hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError) as raised:
        local_directory("org/name", "adapter")
    assert (
        f"org/name: no such adapter directory in the working directory, {os.getcwd()}; the Hu"
        in (str(raised.value))
    )
    assert said in str(raised.value) and "\n" not in str(raised.value)


def asked(*_, **__):
    pytest.fail("the hub is asked for a path")  # no Exception, so nobody catches it


@pytest.mark.parametrize("name", ["models/V2", "./V2", "V2", "/models/V2", "../V2/V3"])
def test_a_mistyped_path_is_not_taken_for_a_hub_name(tmp_path, monkeypatch, name):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_module.hub, "snapshot_download", asked)
    where = "" if name[0] == "/" else f" in the working directory, {tmp_path}"
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such checkpoint directory{where}$"):
        local_directory(name)


@pytest.mark.parametrize("name", ["checkpoints/ESFT-vanilla-lite", "checkpoints/Any"])
def test_of_the_projects_own_checkpoints_is_said_how_to_get_them(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_module.hub, "snapshot_download", asked)
    said = f"{name}: no such checkpoint .*, {tmp_path}; .* README.md say how to download it .*`.$"
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=said):
            local_directory(name)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


@pytest.mark.parametrize("name", ["demo/base", "configs/DeepSeek-V3"])
def test_the_projects_own_paths_are_meant_from_its_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_module.hub, "snapshot_download", asked)
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}; it is in {ROOT}: run the command there$"
    ):
        local_directory(name)
