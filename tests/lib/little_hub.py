"""A Hugging Face hub on loopback: what the hub's client and diffusers ask for, for repositories that are folders.

It answers HEAD and GET of files, the model's info and its file tree, at any revision that it was told of.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest


def _commit(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode(), usedforsecurity=False).hexdigest()


class LittleHub:
    """`repos[name][revision]` is a folder, `refused[name]` a status and X-Error-Code, `requests` what came in."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Path]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            little = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop answering: from now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Let the hub's client in this process ask here, with nothing in its cache."""
        constants = huggingface_hub.constants
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))

    def files_fetched(self) -> list[str]:
        """Paths inside their repository of all files that were downloaded."""
        gets = [line.partition(" ")[2] for line in self.requests if line.startswith("GET")]
        return [path.split("/resolve/")[1].partition("/")[2] for path in gets if "/resolve/" in path]

    def find(self, name: str, revision: str) -> tuple[Path, str] | None:
        """Folder and commit of a revision, which may be given as its commit."""
        for known, folder in self.repos[name].items():
            if revision in (known, _commit(name, known)):
                return folder, _commit(name, known)
        return None


class _Handler(BaseHTTPRequestHandler):
    little: LittleHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.little.requests.append(f"{self.command} {unquote(path)}")
        words = [unquote(word) for word in path.strip("/").split("/")]  # a branch may have a slash in its name
        api = words[:2] == ["api", "models"]
        name, rest = "/".join(words[2:4] if api else words[:2]), words[4:] if api else words[2:]
        if name in self.little.refused:
            status, code = self.little.refused[name]
            return self._send(status, b"", {"X-Error-Code": code} if code else {})
        if name not in self.little.repos:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        found = self.little.find(name, revision)
        if found is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder, commit = found
        if api:
            return self._send_json(_tree(folder) if rest[:1] == ["tree"] else _info(name, folder, commit))
        return self._send_file(folder.joinpath(*rest[2:]), commit)

    def _send_file(self, file: Path, commit: str) -> None:
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = file.read_bytes()
        return self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{_digest(data)}"'})

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _info(name: str, folder: Path, commit: str) -> dict:
    siblings = [{"rfilename": file} for file in _files(folder)]
    return {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}


def _tree(folder: Path) -> list[dict]:
    return [
        {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
        for file in _files(folder)
        for data in [(folder / file).read_bytes()]
    ]
