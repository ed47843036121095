"""A small server on this machine that speaks the part of the Hugging Face Hub's protocol that an upload needs.

Repositories are made, files announced, large ones sent apart (Git LFS, "basic" transfer), and a commit names them
all. What arrives is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_for_the_test"


@dataclass
class Kept:
    """What arrived, by repository."""

    created: list[dict[str, Any]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    """As a repository was first made."""
    commits: int = 0
    seen: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    """Part of a path: status to answer with."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    kept: Kept

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def answer(self, value: Any = None, status: int = 200) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def is_refused(self) -> bool:
        """Answer as told for some paths, and 401 without the right token."""
        path = self.path.split("?")[0]
        self.kept.seen.append(f"{self.command} {path}")
        status = next((status for part, status in self.kept.refuse.items() if part in path), 0)
        if not status and "/lfs-store/" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status:
            self.read_body()
            self.answer({"error": f"refused with {status}"}, status)
        return bool(status)

    def do_POST(self) -> None:
        if self.is_refused():
            return
        path, body = self.path.split("?")[0], self.read_body()
        if path == "/api/repos/create":
            request = json.loads(body)
            owner, name = request.get("organization") or "me", request["name"]
            self.kept.created.append(request)
            self.kept.files.setdefault(f"{owner}/{name}", {})
            self.kept.private.setdefault(f"{owner}/{name}", request.get("visibility") == "private")
            self.answer({"url": f"{self.address}/{owner}/{name}", "id": f"{owner}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.answer({"files": [self.choose_mode(file) for file in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.answer({"transfer": "basic", "objects": [self.offer(entry) for entry in objects]})
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), body)
        else:
            self.answer({"error": f"unknown: {path}"}, 404)

    def do_GET(self) -> None:
        if self.is_refused():
            return
        repo = self.path.split("?")[0].removeprefix("/api/models/")
        if repo in self.kept.private:
            self.answer({"id": repo, "private": self.kept.private[repo]})
        else:
            self.answer({"error": f"unknown: {repo}"}, 404)

    def do_PUT(self) -> None:
        if self.is_refused():
            return
        body = self.read_body()
        self.kept.blobs[hashlib.sha256(body).hexdigest()] = body
        self.answer()

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def choose_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def offer(self, entry: dict[str, Any]) -> dict[str, Any]:
        action = {"upload": {"href": f"{self.address}/lfs-store/{entry['oid']}"}}
        return {**entry, "authenticated": True, "actions": action}

    def commit(self, repo: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines()]
        arrived: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                arrived[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                arrived[value["path"]] = self.kept.blobs[value["oid"]]
        self.kept.files[repo].update(arrived)
        self.kept.commits += 1
        oid = f"{self.kept.commits:040x}"
        self.answer({"commitUrl": f"{self.address}/{repo}/commit/{oid}", "commitOid": oid, "success": True})


class LocalHub:
    """The server, running in a thread while the `with` block lasts."""

    def __enter__(self) -> LocalHub:
        self.kept = Kept()
        handler = type("OneHandler", (Handler,), {"kept": self.kept})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
