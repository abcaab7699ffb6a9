"""A stand-in for the Hub on loopback: what `huggingface_hub` asks of it to publish and load models, and no more.

Requests and answers are those of the Hub's HTTP API as huggingface_hub 2.4 makes and reads them. Repositories keep every commit, so
that revisions can be asked for; weights go the way of large files (preupload says `lfs`, then batch and PUT).
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

TOKEN = "a-token-that-may-write"
LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    """`commits`: {id: files by name}; `branches`: {name: id}."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        name = hashlib.sha1(repr((message, len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """`log` has each request as "METHOD /path"; `fail` may answer one in place of the server.

    `fail(method, path)` returns None to let it pass, a status, or "drop" to close the connection without an answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.log: list[str] = []
        self.tokens: set[str | None] = set()
        self.visibilities: list[str | None] = []  # asked for when a repository was to be made
        self.fail: Callable[[str, str], Any] = lambda method, path: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Forgets everything."""
        for memory in (self.repositories, self.large, self.log, self.tokens, self.visibilities):
            memory.clear()
        self.fail = lambda method, path: None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo]
        return found.commits[found.branches[revision]]

    def count(self, start: str) -> int:
        """How many requests began so."""
        return sum(line.startswith(start) for line in self.log)


@contextmanager
def speaking_to(hub: Hub, home: Path) -> Iterator[ProcessPoolExecutor]:
    """A process whose huggingface_hub takes `hub` for the Hub, and which reaches nothing else."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # another protocol, to other servers
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN", raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_only_loopback)
        pool.submit(os.getpid).result()  # it starts, with these settings
    with pool:
        yield pool


def _only_loopback() -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith("127."):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        path = urlparse(self.path).path
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server.log.append(f"{self.command} {unquote(path)}")
        self.server.tokens.add(self.token)
        failure = self.server.fail(self.command, unquote(path))
        if failure == "drop":
            self.close_connection = True
            self.connection.close()
        elif failure is not None:
            self._error(failure, "the test wants this to fail")
        elif path.startswith("/large/"):  # signed addresses: no token
            self.server.large[path.removeprefix("/large/")] = self.data
            self._send({})
        elif self.token not in (TOKEN, None):
            self._error(401, "Invalid credentials in Authorization header")
        else:
            self._route([unquote(part) for part in path.strip("/").split("/")])

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "validate-yaml"]:
                bad = "licence_of_nothing" in json.loads(self.data)["content"]
                self._send({"errors": [{"message": "bad licence"}] if bad else [], "warnings": []}, 400 if bad else 200)
            case ["api", "repos", "create"]:
                self._create(json.loads(self.data))
            case ["api", "models", owner, name, *rest] if found := self._repository(f"{owner}/{name}"):
                self._api(f"{owner}/{name}", found, rest)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._batch(json.loads(self.data))
            case [owner, name, "resolve", revision, *file] if found := self._repository(f"{owner}/{name}"):
                self._resolve(found, revision, "/".join(file))
            case _:
                self._error(404, "Repository not found", code="RepoNotFound")

    def _repository(self, repo: str) -> Repository | None:
        """One that the asker may see."""
        found = self.server.repositories.get(repo)
        return None if found is None or (found.private and self.token != TOKEN) else found

    def _create(self, asked: dict[str, Any]) -> None:
        if self.token != TOKEN:
            return self._error(401, "Invalid username or password.")
        owner = asked.get("organization") or "me"
        if owner == "others":
            return self._error(403, "You don't have the rights to create a model under the namespace 'others'")
        repo = f"{owner}/{asked['name']}"
        there = repo in self.server.repositories
        self.server.visibilities.append(asked.get("visibility"))
        if not there:
            self.server.repositories[repo] = new = Repository(private=asked.get("visibility") == "private")
            new.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._send({"url": f"{self.server.url}/{repo}", "name": repo}, 409 if there else 200)

    def _api(self, repo: str, found: Repository, rest: list[str]) -> None:
        match rest:
            case ["branch", branch]:
                there = branch in found.branches
                found.branches.setdefault(branch, found.branches["main"])
                self._send({}, 409 if there else 200)
            case ["preupload", _]:
                there = found.commits[found.branches[rest[1]]]
                self._send({"files": [_mode(file["path"], there) for file in json.loads(self.data)["files"]]})
            case ["commit", branch]:
                self._commit(repo, found, branch)
            case ["refs"]:
                branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found.branches.items()]
                self._send({"branches": branches, "converts": [], "tags": []})
            case [] | ["revision", _] | ["tree", _, *_]:
                commit = found.find(rest[1] if rest else "main")
                if commit is None:
                    self._error(404, "Invalid rev id", code="RevisionNotFound")
                elif rest[:1] == ["tree"]:
                    self._send([_entry(name, data) for name, data in found.commits[commit].items()])
                else:
                    files = [{"rfilename": name} for name in found.commits[commit]]
                    self._send({"id": repo, "sha": commit, "private": found.private, "tags": [], "siblings": files})
            case _:
                self._error(404, f"the stand-in has no {rest}")

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            href = {"href": f"{self.server.url}/large/{one['oid']}", "header": {}}
            objects.append(one if one["oid"] in self.server.large else {**one, "actions": {"upload": href}})
        self._send({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, found: Repository, branch: str) -> None:
        files, message = dict(found.commits[found.branches[branch]]), ""
        for line in self.data.splitlines():
            match json.loads(line):
                case {"key": "header", "value": {"summary": message}}:
                    pass
                case {"key": "file", "value": {"path": name, "content": content}}:
                    files[name] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": name, "oid": oid}}:
                    files[name] = self.server.large[oid]
                case {"key": "deletedFile", "value": {"path": name}}:
                    del files[name]
        proposed = "create_pr=1" in self.path
        commit = found.commit("refs/pr/1" if proposed else branch, files, message)
        answer = {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
        self._send(answer | ({"pullRequestUrl": f"{self.server.url}/{repo}/discussions/1"} if proposed else {}))

    def _resolve(self, found: Repository, revision: str, name: str) -> None:
        commit = found.find(revision)
        if commit is None:
            return self._error(404, "Invalid rev id", code="RevisionNotFound")
        data = found.commits[commit].get(name)
        if data is None:
            return self._error(404, "Entry not found", code="EntryNotFound", commit=commit)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        return self._send(data, 200, **headers)

    def _error(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send({"error": message}, status, **{key: value for key, value in headers.items() if value})

    def _send(self, answer: Any, status: int = 200, **headers: str) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(name: str, there: dict[str, bytes]) -> dict[str, Any]:
    """How a file is to be sent, and the hash of the one that is there: of large ones the content's, else git's."""
    data, large = there.get(name), name.endswith(LARGE)
    git = None if data is None else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    oid = hashlib.sha256(data).hexdigest() if data is not None and large else git
    return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
