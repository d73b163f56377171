"""A local server that stands for the hub, for tests that download datasets through the real huggingface_hub."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"
"""Address of a hub that cannot be reached."""


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as the content of a parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def listing(repo: str, names: Iterable[str]) -> bytes:
    """Return the hub's answer about a dataset with these files."""
    return json.dumps({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}).encode()


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that a download uses. The server has `repos`, contents of files by repository."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """Answer with the body."""
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        """Answer for a dataset or one of its files, at whatever revision; other files as a plain web server."""
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        content, code = self.found(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        revision = path.split("/")[5] if "/resolve/" in path else SHA
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if path.startswith("/api/") else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", revision if len(revision) == 40 else SHA)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def found(self, path: str) -> tuple[bytes | None, str]:
        """Return the content at a path and the hub's code of the error if there is none."""
        if path in self.server.pages:
            return self.server.pages[path], ""
        for repo, files in self.server.repos.items():
            if path.startswith(f"/api/datasets/{repo}/revision/"):
                return listing(repo, files), ""
            if path.startswith(f"/datasets/{repo}/resolve/"):
                return files.get(path.removeprefix(f"/datasets/{repo}/resolve/").partition("/")[2]), "EntryNotFound"
        return None, "RepoNotFound"

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serving(
    repos: Mapping[str, Mapping[str, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThreadingHTTPServer]:
    """Serve datasets and make huggingface_hub ask here, with an empty cache. `asked` of the server lists the paths."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    server.repos = repos
    server.pages = {}
    # The default of half a second would be the time that each test waits at its end.
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    # Tests of vLLM set HF_HUB_OFFLINE for their whole process.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
