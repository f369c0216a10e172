"""A Hub on 127.0.0.1, and what the encoders make of it; test_encoders runs it as a process.

usage: loopback_hub.py REPOSITORIES GATED_JSON; prints one line of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


class Hub(BaseHTTPRequestHandler):
    """Answers /ORG/NAME/resolve/REVISION/FILE as the Hub does, with its headers and errors."""

    root: Path
    gated: frozenset[str]
    commit = COMMIT  # of main

    def log_message(self, *args) -> None:
        pass

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            return self._refuse(404, "RepoNotFound")
        repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repository in self.gated:
            return self._refuse(401, "GatedRepo")
        if not (self.root / repository).is_dir():
            return self._refuse(404, "RepoNotFound")
        if revision not in ("main", self.commit):
            return self._refuse(404, "RevisionNotFound")
        path = self.root / repository / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        # What lies in LFS goes by its sha256, what lies in git itself by a shorter digest.
        kind = "sha256" if path.suffix == ".safetensors" else "sha1"
        self.send_header("ETag", f'"{hashlib.new(kind, content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD


class CommittingHub(Hub):
    """Also makes repositories, for the user `lab` where no organisation is named, and commits."""

    commits: int = 0

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here, path = f"http://{self.headers['Host']}", self.path.split("?")[0]
        repository = "/".join(path.split("/")[3:5])  # /api/models/ORG/NAME/...
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'lab'}/{asked['name']}"
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self._answer({"url": f"{here}/{kind}{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if not (self.root / repository).is_dir():
            return self._refuse(404, "RepoNotFound")
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self._answer({"files": files})
        if "/commit/" not in path:
            return self._refuse(404, "EntryNotFound")
        type(self).commits += 1
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                target = self.root / repository / line["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        self._answer({"commitUrl": f"{here}/{repository}/commit/1", "commitOid": COMMIT})


@contextmanager
def serving(handler: type[Hub], folder: Path, monkeypatch) -> Iterator[type[Hub]]:
    """Let this process take 127.0.0.1 for the Hub; repositories lie in `folder`/hub."""
    import huggingface_hub
    from huggingface_hub.utils import close_session

    handler.root, handler.gated = folder / "hub", frozenset()
    handler.root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    endpoint, template = constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    template = template.replace(endpoint, here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    close_session()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
        close_session()


def main(root: str, gated: str) -> None:
    Hub.root, Hub.gated = Path(root), frozenset(json.loads(gated))
    (Hub.root / "org/empty").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["HF_HUB_DISABLE_XET"] = "1"

    import huggingface_hub.constants
    import torch

    from xmag_hf.encoders import EncoderError, check_encoder, load_encoder

    def ask(name: str, revision: str | None = None) -> dict:
        try:
            checked = check_encoder(name, revision=revision)
            encoder = load_encoder(name, revision=revision)
        except EncoderError as error:
            return {"error": str(error)}
        image = torch.full((1, 3, encoder.input_px, encoder.input_px), 128, dtype=torch.uint8)
        embedding = encoder(image)
        return {
            "shape": list(embedding.shape),
            "sum": embedding.sum().item(),
            "name": encoder.name,
            "revision": encoder.revision,
            "checked": [checked.name, checked.revision],  # before any weights were fetched
            "commit": encoder.card.commit,
            "licence": encoder.licence,
        }

    names = ["hf:org/vit", "hf:org/resnet", "timm:resnet10t", "uni2-h", "phikon"]
    names += ["hf:org/nothing", "hf:org/no-weights", "hf:org/empty"]
    names += ["hf:org/student"]
    answers: dict = {"commit": COMMIT} | {name: ask(name) for name in names}
    # Nothing is loaded: transformers lists a repository in parts, which this Hub does not answer.
    answers["hf:org/parts"] = {"revision": check_encoder("hf:org/parts").revision}
    answers["hf:org/vit@v9"] = ask("hf:org/vit", "v9")
    (Hub.root / "org/student/README.md").write_text("# mended\n")
    Hub.commit = LATER
    answers["later"] = {"hf:org/student": ask("hf:org/student")}
    server.shutdown()
    server.server_close()
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    answers["offline"] = {name: ask(name) for name in ("hf:org/vit", "timm:resnet10t", "uni2-h")}
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
