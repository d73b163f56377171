"""Datasets of the hub, through the real huggingface_hub and a local server that stands for the hub."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from or1.data import DataError, load_prompts

SHA = "0123456789abcdef0123456789abcdef01234567"


def parquet(*questions: str) -> bytes:
    file = io.BytesIO()
    rows = [{"question": question, "answer": f"so #### {len(question)}"} for question in questions]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FILES = {
    "main/train/0000.parquet": parquet("a", "bb"),
    "main/train/0001.parquet": parquet("ccc"),
    "main/test/0000.parquet": parquet("dddd"),
    "data/x.jsonl": b'{"question": "1+1=", "answer": "2"}\n',
}


def listing(names: Iterable[str]) -> bytes:
    return json.dumps({"id": "openai/gsm8k", "sha": SHA, "siblings": [{"rfilename": name} for name in names]}).encode()


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that a download uses."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if path.startswith("/api/datasets/openai/gsm8k/revision/"):
            content = listing(FILES)
        elif path.startswith("/datasets/openai/gsm8k/resolve/") and (name := path.split("/", 6)[6]) in FILES:
            content = FILES[name]
        else:
            self.send_response(404)
            code = "EntryNotFound" if "gsm8k" in path else "RepoNotFound"
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if path.startswith("/api/") else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def load(name: str):
    return load_prompts([name], None, max_prompt_tokens=9)


def test_a_split_is_downloaded_once_numbered_through_and_read_without_network(
    hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load("hf:openai/gsm8k:main/train")
    assert [(p.id, p.golds) for p in found.prompts] == [(f"openai/gsm8k:main/train:{i}", (str(i),)) for i in (1, 2, 3)]
    assert "main/test/0000.parquet" not in " ".join(hub.asked)
    downloads = [path for path in hub.asked if "/resolve/" in path]
    again = load("hf:openai/gsm8k:main/train")
    assert [p.text for p in again.prompts] == ["a", "bb", "ccc"]
    assert [path for path in hub.asked if "/resolve/" in path] == downloads, "the files came from the cache"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert [p.text for p in load("hf:openai/gsm8k:main/train").prompts] == ["a", "bb", "ccc"]


def test_one_file_of_a_repository(hub: ThreadingHTTPServer) -> None:
    assert load("hf:openai/gsm8k/data/x.jsonl").prompts[0].id == "openai/gsm8k/data/x.jsonl:1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:openai/gsm8k:main/trian", "has no such split; there are: main/test, main/train; correct the name"),
        ("hf:openai/gsm8k/no.jsonl", "no such file in the dataset; correct the name"),
        ("hf:no/such:train", "no such dataset, or a private one; correct the name, or set HF_TOKEN"),
        ("hf:gsm8k", "is not the name of a dataset; write hf:OWNER/NAME:CONFIG/SPLIT or hf:OWNER/NAME/FILE"),
    ],
)
def test_a_wrong_name_is_one_line(hub: ThreadingHTTPServer, name: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    assert str(caught.value) == f"{name}: {message}"


@pytest.mark.parametrize("name", ["hf:openai/gsm8k:main/train", "hf:openai/gsm8k/data/x.jsonl"])
def test_no_network_and_no_copy_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"^{name}: the hub cannot be reached, and no [^\n]+; start once with network"):
        load(name)


def test_a_partial_copy_is_not_taken_for_the_split(hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(FILES)
    monkeypatch.delitem(FILES, "main/train/0001.parquet")
    monkeypatch.setattr(Hub, "answer", _without_second(whole, Hub.answer))
    with pytest.raises(DataError):
        load("hf:openai/gsm8k:main/train")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="no whole copy is in the cache"):
        load("hf:openai/gsm8k:main/train")


def _without_second(names: dict[str, bytes], answer):
    """Return an answer that lists all files, of which the second of the training split cannot be fetched."""

    def partly(self: Hub, *, body: bool) -> None:
        if "/api/" not in self.path:
            return answer(self, body=body)
        content = listing(names)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    return partly
