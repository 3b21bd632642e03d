"""A small server on the loopback interface that speaks what the Hugging Face hub's client needs of its HTTP API."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """Repositories by name: `{"owner/name": {"file": b"content"}}`; every request is noted in `requests`.

    `refs` maps a repository's branches and tags to one of its commits, `gated` names repositories that answer 403 and
    `cut` maps a file to the number of bytes after which the connection is cut, that many times as `cuts` says.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.gated: set[str] = set()
        self.tags: dict[str, dict[str, bytes]] = {}
        self.cut: dict[str, int] = {}
        self.cuts = 0
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloads(self) -> list[str]:
        """Files whose content was sent for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    @staticmethod
    def commit(files: dict[str, bytes]) -> str:
        digest = hashlib.sha1()
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        return digest.hexdigest()

    def files_at(self, name: str, revision: str) -> dict[str, bytes] | None:
        current = self.repositories[name]
        if revision in ("main", self.commit(current)):
            return current
        for tag, files in self.tags.items():
            if revision in (tag, self.commit(files)):
                return files
        return None

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        path = request.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        if match is None or match[1] not in self.repositories:
            return self.fail(request, 404 if match is None else 401, "RepoNotFound", "Repository not found")
        name = match[1]
        if name in self.gated:
            return self.fail(request, 403, "GatedRepo", f"Access to model {name} is restricted.")
        files = self.files_at(name, (api and api[3]) or (resolve and resolve[2]) or "main")
        if files is None:
            return self.fail(request, 404, "RevisionNotFound", "Invalid rev id")
        commit = self.commit(files)
        if api:
            listing = [{"type": "file", "path": f, "size": len(c), "oid": etag(c)} for f, c in files.items()]
            siblings = [{"rfilename": f} for f in files]
            info = {"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
            return self.send(request, json.dumps(listing if api[2] == "tree" else info).encode(), {}, body)
        if resolve[3] not in files:
            return self.fail(request, 404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = files[resolve[3]]
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return self.send(request, content, headers, body, cut=self.cut.get(resolve[3]))

    def send(self, request, content: bytes, headers: dict[str, str], body: bool, cut: int | None = None) -> None:
        start, total = 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if wanted:
            start, end = int(wanted[1]), int(wanted[2]) if wanted[2] else total - 1
            content = content[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        request.send_response(206 if wanted else 200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if not body:
            return
        if cut is not None and self.cuts > 0:
            self.cuts -= 1
            request.wfile.write(content[:cut])
            request.wfile.flush()
            request.close_connection = True
            return
        request.wfile.write(content)

    @staticmethod
    def fail(request, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        content = json.dumps({"error": message}).encode()
        request.send_response(status)
        extra = {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": str(len(content))}
        for key, value in {**(headers or {}), **extra}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
