"""Datasets of the hub, through the real huggingface_hub and a local server that stands for the hub."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from or1.config.data_paths import dataset_of
from or1.data import DataError, load_prompts
from tests.helpers.hub import NOWHERE, SHA, Hub, listing, parquet_of, serving


def parquet(*questions: str) -> bytes:
    return parquet_of([{"question": question, "answer": f"so #### {len(question)}"} for question in questions])


FILES = {
    "main/train/0000.parquet": parquet("a", "bb"),
    "main/train/0001.parquet": parquet("ccc"),
    "main/test/0000.parquet": parquet("dddd"),
    "data/x.jsonl": b'{"question": "1+1=", "answer": "2"}\n',
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    with serving({"openai/gsm8k": FILES}, tmp_path / "cache", monkeypatch) as server:
        yield server


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
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert [p.text for p in load("hf:openai/gsm8k:main/train").prompts] == ["a", "bb", "ccc"]


def test_one_file_of_a_repository(hub: ThreadingHTTPServer) -> None:
    assert load("hf:openai/gsm8k/data/x.jsonl").prompts[0].id == "openai/gsm8k/data/x.jsonl:1"


def test_a_file_of_a_commit_is_read_without_network_once_it_is_there(
    hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hf:openai/gsm8k@{SHA}/main/test/0000.parquet"
    dataset = dataset_of(name)
    assert dataset is not None and (dataset.revision, dataset.file) == (SHA, "main/test/0000.parquet")
    assert [p.text for p in load(name).prompts] == ["dddd"]
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    asked = len(hub.asked)
    assert [p.text for p in load(name).prompts] == ["dddd"]
    assert len(hub.asked) == asked


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
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"^{name}: the hub cannot be reached, and no [^\n]+; start once with network"):
        load(name)


def test_a_partial_copy_is_not_taken_for_the_split(hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(FILES)
    monkeypatch.delitem(FILES, "main/train/0001.parquet")
    monkeypatch.setattr(Hub, "answer", _without_second(whole, Hub.answer))
    with pytest.raises(DataError):
        load("hf:openai/gsm8k:main/train")
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(DataError, match="no whole copy is in the cache"):
        load("hf:openai/gsm8k:main/train")


def _without_second(names: dict[str, bytes], answer):
    """Return an answer that lists all files, of which the second of the training split cannot be fetched."""

    def partly(self: Hub, *, body: bool) -> None:
        if "/api/" not in self.path:
            return answer(self, body=body)
        content = listing("openai/gsm8k", names)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    return partly
