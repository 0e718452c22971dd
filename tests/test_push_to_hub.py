"""`push_to_hub` by huggingface_hub's own client, to a stand-in for the Hub on this machine, and the way back."""

import base64
import json
import os
import subprocess
import sys
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file

from tests.saving import tell
from tools import ROOT

REPOSITORY = "someone/pushed"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUSH = f"""
import sys
from transformers import AutoModel, AutoProcessor
for door in (AutoModel, AutoProcessor):
    door.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("{REPOSITORY}")
"""


def how_to_send(path: str) -> dict:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}


class Hub(BaseHTTPRequestHandler):
    """The routes of the Hub that a push and a download take, for one repository with one commit."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    large: dict[str, bytes]

    def log_message(self, *_) -> None:
        pass

    def answer(self, content: bytes | dict = b"", status: int = 200, **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}"
        route = self.path.split("?")[0]
        if route == "/api/repos/create":
            return self.answer({"url": f"{address}/{REPOSITORY}", "id": COMMIT})
        if route == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if route == f"/api/models/{REPOSITORY}/preupload/main":
            return self.answer({"files": [how_to_send(file["path"]) for file in json.loads(body)["files"]]})
        if route == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            places = [{**file, "actions": {"upload": {"href": f"{address}/large/{file['oid']}"}}} for file in wanted]
            return self.answer({"objects": places})
        if route == f"/api/models/{REPOSITORY}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            return self.answer({"commitUrl": f"{address}/{REPOSITORY}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer(status=404)

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            file = line["value"]
            if line["key"] == "file":
                self.files[file["path"]] = base64.b64decode(file["content"])
            elif line["key"] == "lfsFile":
                self.files[file["path"]] = self.large[file["oid"]]

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.large[sha256(content).hexdigest()] = content
        self.answer()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].removeprefix(f"/{REPOSITORY}/resolve/").split("/", 1)
        content = self.files.get(parts[-1]) if parts[0] in ("main", COMMIT) else None
        if content is None:
            return self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.answer(content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """The stand-in's address, and the files pushed to it."""
    kept = type("KeptHub", (Hub,), {"files": {}, "large": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kept)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kept.files
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_what_is_pushed_downloads_and_computes_the_same(tiny_checkpoint, hub, tmp_path):
    address, files = hub
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the Hub's other way to send weights, which the stand-in does not speak
        "HF_TOKEN": "hf_none",
    }

    def run(user: str, *command: str) -> None:
        folders = {"HF_HOME": str(tmp_path / user), "HF_MODULES_CACHE": str(tmp_path / user / "modules")}
        python, everything = [sys.executable, *command], {**environment, **folders}
        done = subprocess.run(python, env=everything, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-5000:]

    run("one", "-c", PUSH, str(tiny_checkpoint))
    code = {path.name for path in ROOT.glob("*.py")}
    data = {"README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"}
    assert code | data <= set(files)
    assert all(files[name] == (ROOT / name).read_bytes() for name in code)
    named = json.loads(files["config.json"])["auto_map"].values()
    assert not any("--" in entry for entry in named)  # the code is that of the pushed repository, of no other

    out = tmp_path / "out"
    out.mkdir()
    run("another", str(Path(__file__).with_name("saving.py")), REPOSITORY, str(out))
    told = load_file(out / "told.safetensors")
    for name, tensor in tell(tiny_checkpoint).items():
        torch.testing.assert_close(told[name], tensor, msg=name)
