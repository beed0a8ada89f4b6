"""A local server with the part of the Hub's HTTP API that `push_to_hub` and `from_pretrained` use, LFS files included.

Run as a program, it prints its address and serves until its standard input closes.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


class Repository:
    """The files of each commit. A file is stored as bytes, or as (sha256, size) of an LFS object."""

    def __init__(self, name: str) -> None:
        self.branches = {"main": hashlib.sha1(name.encode()).hexdigest()}
        self.commits: dict[str, dict[str, Any]] = {self.head: {".gitattributes": b""}}
        self.private = False

    @property
    def head(self) -> str:
        """The newest commit of main."""
        return self.branches["main"]

    def at(self, revision: str) -> tuple[str, dict[str, Any] | None]:
        commit = self.branches.get(revision, revision)
        return commit, self.commits.get(commit)

    def write(self, files: dict[str, Any], branch: str = "main") -> str:
        """Create a commit with exactly these files."""
        commit = hashlib.sha1(f"{self.branches[branch]} {sorted(files.items())}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def names(self) -> set[str]:
        """Names of the files of the newest commit."""
        return set(self.commits[self.head])


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: repositories by name.
        objects: contents of LFS objects by SHA-256.
        broken_uploads: number of next uploads whose connection is closed midway.
        uploads: SHA-256 of the LFS objects received, in order.
        before_commit: called once with the repository before its next commit, to simulate a concurrent push.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Another host name, as on the real Hub, so that the client drops its token.
        self.storage_url = f"http://localhost:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.broken_uploads = 0
        self.uploads: list[str] = []
        self.before_commit: Callable[[Repository], None] | None = None


class Handler(BaseHTTPRequestHandler):
    """Dispatches requests by `ROUTES`, one at a time."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def reply(self, code: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, code: int, kind: str) -> None:
        self.reply(code, {"error": kind}, {"X-Error-Code": kind, "X-Error-Message": kind})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def allowed(self, name: str) -> bool:
        """Whether the request needs no token or has the right one. Otherwise the Hub reports that the repository is missing."""
        reading = self.command in ("GET", "HEAD")
        repository = self.server.repositories.get(name)
        return (reading and not (repository and repository.private)) or self.headers.get("authorization") == f"Bearer {TOKEN}"

    def route(self) -> None:
        path = urlsplit(self.path).path
        if self.command == "PUT" and self.server.broken_uploads > 0:
            self.server.broken_uploads -= 1
            self.rfile.read(1000)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        data = self.body()
        with self.server.lock:
            for methods, pattern, handle in ROUTES:
                if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                    if not self.allowed(match.groupdict().get("name", "")) and "_lfs" not in path:
                        return self.fail(401, "RepoNotFound")
                    return handle(self, data, **match.groupdict())
        return self.fail(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route


def create(h: Handler, data: bytes) -> None:
    request = json.loads(data)
    name = f"{request.get('organization') or 'me'}/{request['name']}"
    url = f"{h.server.url}/{name}"
    if name in h.server.repositories:
        return h.reply(409, {"error": "You already created this model repo", "url": url})
    h.server.repositories[name] = Repository(name)
    h.server.repositories[name].private = request.get("private") or request.get("visibility") == "private"
    return h.reply(200, {"url": url, "id": name})


def blob_id(content: bytes) -> str:
    """The id of a file in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def preupload(h: Handler, data: bytes, name: str, revision: str) -> None:
    answers = []
    _sha, files = h.server.repositories[name].at(unquote(revision))
    for file in json.loads(data)["files"]:
        mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
        existing = (files or {}).get(file["path"])
        oid = None if existing is None else blob_id(existing) if isinstance(existing, bytes) else existing[0]
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    h.reply(200, {"files": answers})


def lfs_batch(h: Handler, data: bytes, name: str) -> None:
    objects = json.loads(data)["objects"]
    for item in objects:
        if item["oid"] not in h.server.objects:
            item["actions"] = {"upload": {"href": f"{h.server.storage_url}/_lfs/{item['oid']}"}}
    h.reply(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})


def lfs_put(h: Handler, data: bytes, oid: str) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        return h.fail(400, "BadRequest")
    h.server.objects[oid] = data
    h.server.uploads.append(oid)
    return h.reply(200)


def lfs_get(h: Handler, _: bytes, oid: str) -> None:
    h.reply(200, h.server.objects[oid])


def commit(h: Handler, data: bytes, name: str, revision: str) -> None:
    repository = h.server.repositories[name]
    if h.server.before_commit is not None:
        h.server.before_commit(repository)
        h.server.before_commit = None
    parent, files = repository.at(unquote(revision))
    files = dict(files or {})
    for line in data.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header" and value.get("parentCommit") not in (None, parent):
            return h.fail(412, "PreconditionFailed")
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            if value["oid"] not in h.server.objects:
                return h.fail(400, "LfsMissing")
            files[value["path"]] = (value["oid"], value["size"])
        elif entry["key"] == "deletedFile":
            files.pop(value["path"], None)
    if unquote(revision) not in repository.branches:
        return h.fail(404, "RevisionNotFound")
    oid = repository.write(files, unquote(revision))
    return h.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{h.server.url}/{name}/commit/x"})


def branch(h: Handler, _: bytes, name: str, revision: str) -> None:
    repository = h.server.repositories[name]
    if unquote(revision) in repository.branches:
        return h.fail(409, "Conflict")
    repository.branches[unquote(revision)] = repository.head
    return h.reply(200)


def resolve(h: Handler, _: bytes, name: str, revision: str, path: str) -> None:
    if name not in h.server.repositories:
        return h.fail(401, "RepoNotFound")
    sha, files = h.server.repositories[name].at(unquote(revision))
    if files is None:
        return h.fail(404, "RevisionNotFound")
    headers = {"X-Repo-Commit": sha}
    if (file := files.get(unquote(path))) is None:
        missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return h.reply(404, b"", headers | missing)
    if isinstance(file, bytes):
        return h.reply(200, file, headers | {"ETag": f'"{hashlib.sha1(file).hexdigest()}"'})
    linked = {
        "X-Linked-Etag": f'"{file[0]}"',
        "X-Linked-Size": str(file[1]),
        "Location": f"{h.server.storage_url}/_lfs/{file[0]}",
    }
    return h.reply(302, b"", headers | linked)


def info(h: Handler, _: bytes, name: str, revision: str = "main") -> None:
    if name not in h.server.repositories:
        return h.fail(401, "RepoNotFound")
    sha, files = h.server.repositories[name].at(unquote(revision or "main"))
    if files is None:
        return h.fail(404, "RevisionNotFound")
    siblings = [{"rfilename": path} for path in sorted(files or {})]
    return h.reply(200, {"_id": "0" * 24, "id": name, "modelId": name, "sha": sha, "private": False, "tags": [],
                         "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip


def tree(h: Handler, _: bytes, name: str, revision: str, folder: str | None = None) -> None:
    if name not in h.server.repositories:
        return h.fail(401, "RepoNotFound")
    _sha, files = h.server.repositories[name].at(unquote(revision))
    prefix = unquote(folder or "").strip("/")
    entries = [
        {"type": "file", "path": path, "size": len(file) if isinstance(file, bytes) else file[1], "oid": "0" * 40}
        for path, file in sorted((files or {}).items())
        if not prefix or path.startswith(prefix + "/")
    ]
    return h.reply(200, entries)


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", lambda h, _: h.reply(200, {"errors": [], "warnings": []})),
    ("GET", "/api/whoami-v2", lambda h, _: h.reply(200, {"name": "me", "type": "user", "orgs": [], "auth": {}})),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/_lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("GET HEAD", "/_lfs/(?P<oid>[0-9a-f]{64})", lfs_get),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", commit),
    ("POST", f"/api/models/{_NAME}/branch/{_REVISION}", branch),
    ("GET HEAD", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", resolve),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}(?P<folder>/.*)?", tree),
    ("GET", f"/api/models/{_NAME}(?:/revision/{_REVISION})?", info),
]


if __name__ == "__main__":
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    print(hub.url, flush=True)
    sys.stdin.read()
