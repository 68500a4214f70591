"""`kto-ds export --push-to-hub` against a stand-in for the hub on this machine: what arrives, and what is said when nothing can."""

import base64
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kto_ds import cli
from kto_ds.errors import UserError
from kto_ds.stages.push import require_pushable
from tests.distributed.runs import environment

TOKEN = "hf_only_for_this_test"
FILES = {"config.json": b"{}", "README.md": b"# a model\n", "model.safetensors": bytes(range(256)) * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload takes: create, look, preupload, git LFS, commit."""

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "private": self.server.is_private, "siblings": [], "sha": "0" * 40})

    def do_PUT(self) -> None:
        self.server.stored[urlsplit(self.path).path.removeprefix("/store/")] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        self.server.seen.append((path, body, self.headers.get("authorization")))
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self._answer({"url": f"{self.server.address}/me/model", "id": "1"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/models/me/model/preupload/main":
            files = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer({"files": files})
        if path == "/me/model.git/info/lfs/objects/batch":
            objects = [{**entry, "actions": {"upload": {"href": f"{self.server.address}/store/{entry['oid']}"}}} for entry in json.loads(body)["objects"]]
            return self._answer({"transfer": "basic", "objects": objects})
        assert path == "/api/models/me/model/commit/main", path
        self.server.commits.append([json.loads(line) for line in body.splitlines()])
        return self._answer({"success": True, "commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1" * 40})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.is_private, server.seen, server.made, server.commits, server.stored = True, [], [], [], {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def variables(address: str, home: Path, **more: str) -> dict[str, str]:
    own = {name: value for name, value in environment().items() if not name.startswith(("HF_", "HUGGING"))}
    return {**own, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", **more}


def pushed(folder: Path, address: str, *, public: bool = False, **more: str) -> str:
    """Push in a process of its own, as the client reads its variables when it is imported; return what is said."""
    code = f"from pathlib import Path\nfrom kto_ds.errors import UserError\nfrom kto_ds.stages.push import push\ntry:\n    print(*push(Path({str(folder)!r}), 'me/model', public={public}))\nexcept UserError as error:\n    print('refused', error)"
    done = subprocess.run([sys.executable, "-c", code], env=variables(address, folder.parent / "home", **more), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == FILES, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def received(hub) -> dict[str, bytes]:
    """Return the files of the one commit, those of git LFS from where they were put."""
    [[header, *entries]] = hub.commits
    assert header["key"] == "header"
    regular = {entry["value"]["path"]: base64.b64decode(entry["value"]["content"]) for entry in entries if entry["key"] == "file"}
    large = {entry["value"]["path"]: hub.stored[entry["value"]["oid"]] for entry in entries if entry["key"] == "lfsFile"}
    assert all(hashlib.sha256(content).hexdigest() == oid for oid, content in hub.stored.items()) and set(large) == {"model.safetensors"}
    return regular | large


@pytest.mark.parametrize("public", [False, True])
def test_all_of_an_export_arrives(hub, export, public):
    hub.is_private = not public
    assert pushed(export, hub.address, public=public, HF_TOKEN=TOKEN).strip() == f"{hub.address}/me/model {not public}"
    assert received(hub) == FILES and hub.made[0]["name"] == "model" and hub.made[0]["organization"] == "me"
    assert hub.made[0].get("visibility", "private" if hub.made[0].get("private") else "public") == ("public" if public else "private")


def test_a_public_repository_gets_nothing_unasked(hub, export):
    hub.is_private = False
    said = pushed(export, hub.address, HF_TOKEN=TOKEN)
    assert "me/model is there already and public" in said and "--public" in said and not hub.commits and not hub.stored
    assert f"the export stays in {export}" in said and "hf upload" not in said and "start the same" not in said


def test_a_private_repository_stays_private_and_is_called_so(hub, export):
    assert pushed(export, hub.address, public=True, HF_TOKEN=TOKEN).strip() == f"{hub.address}/me/model True"


@pytest.mark.parametrize("token, answer", [("hf_another", "does not let you write to me/model (HTTP 401)"), (None, "does not let you write to me/model (HTTP 401)")])
def test_who_may_not_write_is_told_how_to_log_in(hub, export, token, answer):
    said = pushed(export, hub.address, **({"HF_TOKEN": token} if token else {}))
    assert said.startswith("refused --push-to-hub") and answer in said and "hf auth login" in said and f"start the same command again; the export stays in {export}" in said and "hf upload" not in said and not hub.commits


@pytest.mark.parametrize("more, answer", [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps"), ({}, "the hub cannot be reached: ConnectError")])
def test_without_a_network_the_export_stays(export, more, answer):
    said = pushed(export, "http://127.0.0.1:9", HF_TOKEN=TOKEN, **more)
    assert said.startswith("refused") and answer in said and f"start the same command again; the export stays in {export}" in said and "hf upload" not in said


@pytest.mark.parametrize("repo, options, where", [
    ("a/b/c", {}, "--push-to-hub"), ("me/a model", {}, "--push-to-hub"), ("me/model", {"private": True, "public": True}, "--private, --public"), (None, {"public": True}, "--public"),
])  # fmt: skip
def test_what_cannot_be_pushed_is_refused_before_the_export(repo, options, where):
    with pytest.raises(UserError) as refused:
        require_pushable(repo, **{"private": False, "public": False, **options})
    assert refused.value.where == where and refused.value.remedy


def test_the_command_refuses_a_wrong_name_at_once(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: run\nmodel: {path: nowhere}\ndata: {train: [{path: rows.jsonl}]}\n")
    assert cli.run(["export", "--config", str(config), "--push-to-hub", "me/a/b"]) == 2
    assert "--push-to-hub: 'me/a/b' cannot name a repository" in capsys.readouterr().err
