"""`or1 data`: files of published datasets, against a local server that stands for the hub."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet
import pytest

from or1.cli import main
from or1.config import published
from or1.config.data_paths import HUB, dataset_of
from or1.config.published import PUBLISHED, Made, Published
from or1.core.errors import EXIT_DATA
from or1.data import load_prompts
from or1.data.obtain import obtain
from tests.helpers.hub import NOWHERE, SHA, parquet_of, serving

AUTHORS = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
"""sha256 of the files that the authors of GSM8K published."""


def _gsm8k(count: int) -> list[dict[str, str]]:
    return [{"question": f"\u00bd of {2 * n}?", "answer": f"so\n#### {n}"} for n in range(count)]


def _skywork(count: int) -> list[dict[str, object]]:
    prompt = [{"role": "user", "content": "1+1="}]
    return [{"prompt": prompt, "reward_model": {"ground_truth": '["2"]', "style": "rule"}}] * count


REPOS = {
    "openai/gsm8k": {f"main/{s}-00000-of-00001.parquet": parquet_of(_gsm8k(n)) for s, n in (("train", 3), ("test", 2))},
    "Skywork/Skywork-OR1-RL-Data": {
        "data/math-00000-of-00001.parquet": parquet_of(_skywork(4)),
        **{f"data/code-0000{n}-of-00003.parquet": parquet_of(_skywork(n + 1)) for n in range(3)},
    },
    "EleutherAI/hendrycks_math": {
        f"{subject}/{split}-00000-of-00001.parquet": parquet_of(
            [{"problem": f"{subject} {split}", "level": "1", "type": subject, "solution": r"\boxed{7}"}]
        )
        for subject in published._SUBJECTS
        for split in ("train", "test")
    },
    "HuggingFaceH4/MATH-500": {"test.jsonl": b'{"problem": "p", "solution": "s", "answer": "1"}\n'},
    "HuggingFaceH4/aime_2024": {
        "data/train-00000-of-00001.parquet": parquet_of([{"problem": "p", "solution": "s", "answer": "4"}])
    },
    "opencompass/AIME2025": {
        f"aime2025-{part}.jsonl": json.dumps({"question": f"q{part}", "answer": "70"}).encode() for part in ("I", "II")
    },
    "livecodebench/code_generation_lite": {
        f"test{part}.jsonl": "".join(
            json.dumps(
                {
                    "question_content": f"add {day}",
                    "starter_code": "",
                    "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
                    "private_test_cases": "[]",
                    "metadata": "{}",
                    "contest_date": f"{day}T00:00:00",
                }
            )
            + "\n"
            for day in days
        ).encode()
        for part, days in {4: ("2024-07-31", "2024-08-01"), 5: ("2024-12-01",), 6: ("2025-02-01", "2025-02-02")}.items()
    },
    "open-r1/DAPO-Math-17k-Processed": {
        "all/train/0000.parquet": parquet_of([{"prompt": "p", "reward_model": {"ground_truth": "34", "style": "x"}}])
    },
}
ROWS = {
    "gsm8k": (3, 2),
    "math": (7, 7, 1),
    "aime24": (1, 1),
    "aime25": (1, 2),
    "livecodebench": (3,),
    "skywork-or1": (4, 6),
    "dapo-math-17k": (1,),
}
"""Rows of the files of the server, by name and file."""
AIME = parquet_of([{"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "204"}}])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Serve small datasets under the names, paths and commits of the catalogue; its numbers are those of the server."""
    monkeypatch.chdir(tmp_path)
    with serving(REPOS, tmp_path / "cache", monkeypatch) as server:
        web = f"http://127.0.0.1:{server.server_port}"
        for name, rows in ROWS.items():
            files = []
            for made, count in zip(PUBLISHED[name].files, rows, strict=True):
                sources = tuple(source.replace("https://raw.githubusercontent.com", web) for source in made.sources)
                if sources != made.sources:
                    server.pages[sources[0].removeprefix(web)] = AIME
                digest = hashlib.sha256(AIME).hexdigest() if made.sha256 else ""
                files.append(made._replace(sources=sources, rows=made.rows and count, sha256=digest))
            monkeypatch.setitem(PUBLISHED, name, Published("", tuple(files)))
        yield server


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_are_written_verified_and_loaded(
    name: str, hub: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", name]) == 0
    first = capsys.readouterr().out
    downloads = len(hub.asked)
    for made, count in zip(PUBLISHED[name].files, ROWS[name], strict=True):
        assert f"data/{made.file}: {count} rows, sha256 " in first
        prompts = load_prompts([f"data/{made.file}"], None, max_prompt_tokens=9).prompts
        assert len(prompts) == count
        assert all(prompt.golds or prompt.tests for prompt in prompts)
    assert main(["data", name]) == 0
    again = capsys.readouterr().out
    assert again.count(", verified\n") == len(PUBLISHED[name].files)
    assert again.replace(", verified", "") == first
    assert len(hub.asked) == downloads, "the second call asks for nothing"


def test_the_manifest_names_source_and_commit(hub: ThreadingHTTPServer) -> None:
    main(["data", "dapo-math-17k", "--out", "d"])
    entry = json.loads(Path("d/dapo-math-17k.manifest").read_text())["files"]["dapo_math_17k.jsonl"]
    assert entry["commits"] == [SHA] and entry["rows"] == 1
    assert entry["sources"] == ["hf:open-r1/DAPO-Math-17k-Processed:all/train"]
    # Written again, the split comes from the recorded commit, whatever the newest is by then.
    Path("d/dapo_math_17k.jsonl").unlink()
    hub.asked.clear()
    assert main(["data", "dapo-math-17k", "--out", "d"]) == 0
    assert f"/api/datasets/open-r1/DAPO-Math-17k-Processed/revision/{SHA}" in hub.asked


def test_a_changed_file_is_named_and_a_missing_one_written_again(
    hub: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "gsm8k"])
    path = Path("data/gsm8k_test.jsonl")
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    capsys.readouterr()
    assert main(["data", "gsm8k"]) == EXIT_DATA
    captured = capsys.readouterr()
    assert "gsm8k_train.jsonl" in captured.out and ", verified" in captured.out
    assert captured.err.startswith("or1: data/gsm8k_test.jsonl: differs from what was downloaded (")
    assert captured.err.endswith("remove the file to download it again\n") and captured.err.count("\n") == 1
    path.unlink()
    assert main(["data", "gsm8k"]) == 0
    assert path.read_bytes() == content


def test_a_call_that_was_cut_off_continues(
    hub: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = REPOS["openai/gsm8k"]
    partial = {name: content for name, content in whole.items() if "/train-" in name}
    monkeypatch.setitem(hub.repos, "openai/gsm8k", partial)
    assert main(["data", "gsm8k"]) == EXIT_DATA
    assert "no such file in the dataset" in capsys.readouterr().err
    monkeypatch.setitem(hub.repos, "openai/gsm8k", whole)
    # A kill between a file and the manifest leaves a whole file without an entry.
    Path("data/gsm8k.manifest").unlink()
    assert main(["data", "gsm8k"]) == 0
    assert sorted(path.name for path in Path("data").iterdir()) == [
        "gsm8k.manifest",
        "gsm8k_test.jsonl",
        "gsm8k_train.jsonl",
    ]


def test_a_file_of_the_user_stays(hub: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    Path("data/gsm8k_train.jsonl").write_text("mine")
    assert main(["data", "gsm8k"]) == EXIT_DATA
    assert "data/gsm8k_train.jsonl: is there already, with other content; " in capsys.readouterr().err
    assert Path("data/gsm8k_train.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["gsm8k", "aime24", "dapo-math-17k"])
def test_without_network_there_is_one_line(
    name: str, hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    made = PUBLISHED[name].files[0]
    source = made.sources[0] if made.sources[0].startswith(HUB) else f"{NOWHERE}/aime24.parquet"
    monkeypatch.setitem(PUBLISHED, name, Published("", (made._replace(sources=(source,)),)))
    assert main(["data", name]) == EXIT_DATA
    said = capsys.readouterr().err
    assert said.startswith(f"or1: {source}: ") and said.count("\n") == 1
    assert "cannot be reached" in said and "start " in said
    assert not list(Path("data").glob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": 5}, "has 3 rows, and 5 are published; the source has changed"), ({"sha256": "0" * 64}, "has sha256 ")],
)
def test_what_differs_from_the_published_numbers_is_refused(
    change: dict[str, object],
    message: str,
    hub: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = PUBLISHED["gsm8k"].files[0]._replace(**change)
    monkeypatch.setitem(PUBLISHED, "gsm8k", Published("", (made,)))
    assert main(["data", "gsm8k"]) == EXIT_DATA
    assert message in capsys.readouterr().err
    assert not list(Path("data").glob("*"))


def test_a_damaged_copy_in_the_cache_is_not_taken(
    hub: ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "gsm8k"])
    for blob in (tmp_path / "cache").glob("*/blobs/*"):
        blob.write_bytes(b"PAR1" + blob.read_bytes()[4:-1])
    assert main(["data", "gsm8k", "--out", "other"]) == EXIT_DATA
    assert "differs from the hub's sha256" in capsys.readouterr().err


def test_names_are_listed_and_every_source_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    for name, entry in PUBLISHED.items():
        assert name in said
        for made in entry.files:
            for source in made.sources:
                assert not source.startswith(HUB) or dataset_of(source) is not None, source
                # Only a split without a known commit is pinned by the first download.
                assert "@" in source or source.startswith("https://") or made.file == "dapo_math_17k.jsonl"


def test_the_published_numbers_hold_for_the_real_files(root: Path, tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    data = next((place / "shared" / "data" for place in root.parents if (place / "shared" / "data").is_dir()), None)
    if data is None:
        pytest.skip("needs ../shared/data with the real files")
    for name in ("aime24", "aime25"):
        content = (data / f"{name}.parquet").read_bytes()
        made = _original(name)
        assert hashlib.sha256(content).hexdigest() == made.sha256
        assert pyarrow.parquet.read_metadata(io.BytesIO(content)).num_rows == made.rows
    for split, made in zip(("train", "test"), _CATALOGUE["gsm8k"].files, strict=True):
        rows = [json.loads(line) for line in (data / f"gsm8k_{split}.jsonl").read_text().splitlines()]
        hub.repos = {**hub.repos, "openai/gsm8k": {f"main/{split}-00000-of-00001.parquet": parquet_of(rows)}}
        obtain("gsm8k", Published("", (made,)), tmp_path / split, lambda _: None)
        written = tmp_path / split / made.file
        assert hashlib.sha256(written.read_bytes()).hexdigest() == AUTHORS[split], "byte for byte the authors' file"


_CATALOGUE = dict(PUBLISHED)


def _original(name: str) -> Made:
    return _CATALOGUE[name].files[0]
