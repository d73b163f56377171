"""The report of synthetic runs: what it shows, what it escapes, and the broken runs it must survive."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.config import Config
from or1.core.text import count_text, duration
from or1.report.page import ReportError, write_report
from or1.report.page_data import load_run
from or1.report.page_plots import smooth, tick_label
from or1.report.records import eval_histories
from or1.report.summary import summarise
from or1.reward.terms import graded_run
from or1.run.state import TrainState

STAGES = (
    {"steps": 24, "max_response_tokens": 96, "prompts_per_step": 16, "group_size": 8},
    {"steps": 36, "max_response_tokens": 192, "prompts_per_step": 16, "group_size": 8},
)
ATTACK = "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)>"
ALPHABET = [chr(code) for code in range(32, 127)] + ["\n", "<eos>"]


def make_config(run_dir: Path, stages=STAGES, sets=("heldout", "hard")) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"path": str(run_dir / "model"), "dtype": "float32"},
            "data": {"train": ["train.jsonl"], "prompt_suffix": " Answer in \\boxed{}."},
            "loss": {"entropy": {"control": "adaptive"}},
            "stage": list(stages),
            "eval": {
                "every_steps": 12,
                "sets": [{"name": name, "path": f"{name}.jsonl", "samples": 4} for name in sets],
            },
        }
    )


def make_record(config: Config, step: int, rng: random.Random) -> dict:
    """One plausible line: reward rises along a logistic curve, length grows, entropy settles at its target."""
    total = config.total_steps
    stage = 0 if step <= config.stage[0].steps else len(config.stage) - 1
    skill = 0.3 + 0.5 / (1 + math.exp(-8 * (step / max(total, 1) - 0.4)))
    record = {"step": step, "stage": stage, "time": 1.75e9 + 5.0 * step}
    if step:
        record |= _training_metrics(config, step, stage, skill, rng)
    if step % config.eval.every_steps == 0 or step == total:
        for order, each in enumerate(config.eval.sets):
            accuracy = skill * (1 - 0.4 * order)
            key = f"eval/{each.name}"
            record |= {
                f"{key}/avg@4": accuracy,
                f"{key}/avg@4_ci95": 0.03,
                f"{key}/pass@4": min(1, accuracy + 0.12),
                f"{key}/len_mean": 50 + step / 2,
                f"{key}/truncated": 0.02,
                "time/eval": 2.5,
            }
    return record


def _training_metrics(config: Config, step: int, stage: int, skill: float, rng: random.Random) -> dict:
    limit = config.stage[stage].max_response_tokens
    reward = min(max(skill + rng.gauss(0, 0.04), 0), 1)
    truncated = abs(rng.gauss(0.08, 0.02)) * (1 - skill)
    rest = (1 - reward - truncated) / 2
    solved, failed = reward**4, (1 - reward) ** 4
    times = {"rollout": 2.2 + rng.random() * 0.4, "reward": 0.4, "train": 1.3 + rng.random() * 0.2, "sync": 0.1}
    return {
        "reward/mean": reward,
        "reward/status/ok": reward,
        "reward/status/wrong": rest * 1.6,
        "reward/status/no_answer": rest * 0.4,
        "reward/status/crash": 0.0,
        "reward/status/truncated": truncated,
        "reward/status/timeout": 1 / 128 if step == 7 else 0.0,
        "group/frac_zero_std": solved + failed,
        "group/solved": solved,
        "group/failed": failed,
        "group/kept": round(16 * (1 - solved - failed)),
        "completion/len_mean": limit * (0.4 + 0.1 * skill) + rng.gauss(0, 2),
        "completion/len_max": limit * min(1, 0.9 + rng.random() * 0.2),
        "completion/truncated": truncated,
        "policy/entropy": 0.2 + 0.3 * math.exp(-step / 10) + rng.gauss(0, 0.015),
        "policy/entropy_coef": min(5e-3, 1e-4 * step) * (step % 3 > 0),
        "policy/clip_frac": 0.0,
        "mismatch/kl": 1e-6 * math.exp(rng.gauss(0, 0.5)),
        "optim/loss": rng.gauss(0, 0.02),
        "optim/grad_norm": 0.3 * math.exp(rng.gauss(0, 0.3)),
        "optim/lr": 1e-6,
        "optim/updates": 1,
        "optim/skipped": 0,
        "perf/tokens_per_s": 2400 + rng.gauss(0, 60),
        "perf/peak_mem_gib": 1.4,
        **{f"time/{name}": value for name, value in times.items()},
        "time/step": sum(times.values()) + 0.1,
    }


def make_rollout(run_dir: Path, step: int, attack: str = "") -> None:
    """Four responses with different fates, encoded by the character tokenizer of `make_tokenizer`."""
    rng = random.Random(step)
    thought = "First add the ones: 7+5=12, write 2, carry 1.\nThen the tens: 4+3+1=8.\nSo the sum is 82. "
    fates = [
        (thought + "\\boxed{82}" + attack, "ok", "stop"),
        (thought[:40] + "\\boxed{72}", "wrong", "stop"),
        (thought * 2, "truncated", "length"),
        ("no idea", "no_answer", "stop"),
    ]
    rows = []
    for text, status, finish in fates:
        ids = [ALPHABET.index(char) for char in text] + ([ALPHABET.index("<eos>")] if finish == "stop" else [])
        logp = [-rng.expovariate(6) * (12 if rng.random() < 0.08 else 1) for _ in ids]
        rows.append(
            {
                "step": step,
                "stage": 0,
                "prompt_id": "train.jsonl:17",
                "source": "train.jsonl",
                "prompt": "What is 47 + 35?" + attack,
                "golds": ["82" + attack],
                "response": text,
                "token_ids": ids,
                "logp": logp,
                "reward": float(status == "ok"),
                "status": status,
                "finish": finish,
                "version": step - 1,
                "advantage": 1.5 if status == "ok" else -0.5,
                "kept": True,
            }
        )
    path = run_dir / "rollouts" / f"step_{step}.parquet"
    path.parent.mkdir(exist_ok=True)
    schema = pa.Table.from_pylist(rows[:1]).schema
    schema = schema.set(schema.get_field_index("token_ids"), pa.field("token_ids", pa.list_(pa.int32())))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(ALPHABET)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_run(run_dir: Path, steps: int = 60, attack: str = "", stages=STAGES, rollouts=(1, 30, 60)) -> Path:
    """A run directory as the trainer leaves it."""
    run_dir.mkdir()
    config = make_config(run_dir, stages)
    (run_dir / "config.resolved.json").write_text(config.model_dump_json())
    rng = random.Random(0)
    lines = [json.dumps(make_record(config, step, rng)) for step in range(steps + 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    make_tokenizer(run_dir / "model")
    for step in rollouts:
        make_rollout(run_dir, step, attack)
    return run_dir


class Page(HTMLParser):
    """Tags, attributes and text of a page, and a check that every tag is closed in order."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(run_dir: Path) -> tuple[str, Page]:
    html = write_report(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[str, Page]:
    return read(make_run(tmp_path_factory.mktemp("runs") / "adder", attack=ATTACK))


def test_every_plot_is_there_with_its_stage_boundaries(full):
    html, page = full
    assert page.tags.count("svg") == 10
    assert html.count(">stage 2</text>") == 10
    for label in ("target 0.2", "coefficient", "limit", "all right", "all wrong", "heldout avg@4", "mismatch KL"):
        assert label in page.text


def test_accuracy_before_and_after_is_shown_as_recorded(full):
    _, page = full
    for history in eval_histories(load_run(Path(_run_dir(page))).records):
        assert f"{100 * history.points[0].avg:.1f} %" in page.text
        assert f"{100 * history.points[-1].avg:.1f} %" in page.text
        assert f"{history.accuracy.change:+.1f} points" in page.text
    assert page.text.count("± 3.0") == 12


def _run_dir(page: Page) -> str:
    return re.search(r"run_dir(\S+?adder)", page.text)[1]


def test_untrusted_text_is_escaped_and_nothing_is_loaded_or_run(full):
    html, page = full
    assert {"script", "img", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "xlink:href")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert ATTACK in page.text
    assert "default-src 'none'" in dict(page.attributes)["content"] or "default-src 'none'" in html


def test_ids_of_inlined_plots_do_not_collide(full):
    _, page = full
    ids = [value for name, value in page.attributes if name == "id"]
    targets = {value[1:] for name, value in page.attributes if name == "href"}
    assert len(ids) == len(set(ids)) and targets <= set(ids)


def test_plots_follow_the_theme(full):
    html, _ = full
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.S))
    assert "#0a00" not in svgs and "#0b00" not in svgs and "var(--s1)" in svgs


def test_transcripts_show_each_kind_with_its_facts_and_shaded_tokens(full):
    html, page = full
    for kind in ("solved", "failed", "truncated"):
        assert html.count(f'class="tag {kind}"') == 3
    assert "First add the ones" in page.text and "\\boxed{82}" in page.text and "reward 1 \u00b7 rewarded" in page.text
    assert "<eos>" in page.text and re.search(r'<i class="p[1-4]" title="p 0\.\d+">', html)


def test_counts_that_should_be_zero_stand_out(full):
    html, _ = full
    assert "<div class=alert><b>1</b><span>verifier timeouts</span></div>" in html
    assert "<div><b>0</b><span>verifier crashes</span></div>" in html


def test_a_run_with_one_step(tmp_path):
    _, page = read(make_run(tmp_path / "r", steps=1, rollouts=(1,)))
    assert "not finished" in page.text and "1 / 60" in page.text and page.tags.count("svg") == 10


def test_a_run_with_only_the_first_evaluation(tmp_path):
    _, page = read(make_run(tmp_path / "r", steps=0, rollouts=()))
    assert page.tags.count("svg") == 2  # evaluations and their time
    assert "so far" in page.text and "Not recorded in this run: Reward" in page.text and "Transcripts" not in page.text


def test_a_long_run_is_smoothed_and_stays_small(tmp_path):
    stages = ({**STAGES[0], "steps": 800}, {**STAGES[1], "steps": 1200})
    html, page = read(make_run(tmp_path / "r", steps=2000, stages=stages, rollouts=()))
    assert "finished" in page.text and len(html) < 2_500_000


def test_cut_last_line_and_broken_lines_are_left_out_and_named(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=5, rollouts=())
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:3]) + b'\xff{"step": 3}\n[1]\n' + b"".join(lines[3:5]) + lines[5][:40])
    _, page = read(run_dir)
    assert "The last line of metrics.jsonl is incomplete" in page.text
    assert "2 unreadable lines left out (first: line 4)" in page.text
    assert "4 / 60" in page.text


def test_lines_after_a_resume_replace_those_of_the_lost_future(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=8, rollouts=())
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "stage": 0, "time": 1.75e9, "reward/mean": 0.987}) + "\n")
    run = load_run(run_dir)
    assert run.last_step == 6 and run.series("reward/mean")[1][-1] == 0.987
    assert "went back from step 8 to 6" in "".join(run.notes)


@pytest.mark.parametrize("value", ["NaN", "null", "Infinity", '"high"', "true", "[1]", "1" + "0" * 400])
def test_values_that_are_no_finite_number_are_left_out(tmp_path, value):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 0, "eval/a/avg@1": {value}}}\n{{"step": 1, "reward/mean": {value}, "time/step": {value}, '
        f'"stage": {value}, "time": {value}, "optim/grad_norm": 0.5}}\n'
    )
    _, page = read(tmp_path)
    assert page.tags.count("svg") == 1 and "config.resolved.json is missing" in page.text


def test_unreadable_rollouts_are_named_and_others_used(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=40, rollouts=(1, 20, 40))
    last = run_dir / "rollouts" / "step_40.parquet"
    last.write_bytes(last.read_bytes()[:200])
    pq.write_table(pa.table({"step": [1]}), run_dir / "rollouts" / "step_1.parquet")
    html, page = read(run_dir)
    assert "rollouts/step_40.parquet cannot be read" in page.text and "missing columns" in page.text
    assert html.count('class="tag solved"') == 1


def test_transcripts_without_a_tokenizer_are_plain(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    (run_dir / "model" / "tokenizer.json").write_text("{")
    html, page = read(run_dir)
    assert "Shading" not in page.text and "First add the ones" in page.text and 'class="p' not in html


def test_long_and_odd_responses_are_clipped_and_made_visible(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    path = run_dir / "rollouts" / "step_1.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["response"] = "a" * 100_000 + "\x00\u202e\x1b[31m end"
    pq.write_table(pa.Table.from_pylist(rows), path)
    _, page = read(run_dir)
    assert "[86,011 characters left out]" in page.text
    assert "<U+0000><U+202E><U+001B>[31m end" in page.text


def test_a_config_of_another_version_is_shown_but_not_used(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=2, rollouts=())
    raw = json.loads((run_dir / "config.resolved.json").read_text())
    (run_dir / "config.resolved.json").write_text(json.dumps(raw | {"novelty": {"a": 1}}))
    _, page = read(run_dir)
    assert "does not fit this version of or1 (1 problems)" in page.text and "[novelty]" in page.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a folder"),
        (lambda path: path.mkdir(), "has no metrics.jsonl"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text('{"step": 0, "ti')), "no complete step yet"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path, make, message):
    make(tmp_path / "r")
    with pytest.raises(ReportError, match=message) as caught:
        write_report(tmp_path / "r")
    assert str(tmp_path / "r") in str(caught.value)


# --- graded rewards


def make_graded(run_dir: Path, steps: int = 24) -> Path:
    """A run whose rewards lie between -0.1 and 0.6, so that hardly any response is solved."""
    make_run(run_dir, steps=steps, rollouts=(1,))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        mean = -0.1 + 0.5 * line["step"] / steps
        if line["step"]:
            line |= {"reward/mean": mean, "reward/graded": 0.9, "reward/p10": mean - 0.1, "reward/p90": mean + 0.2}
            line |= {"reward/status/ok": 0.8, "group/solved": 0.0}
        for name in ("heldout", "hard"):
            if f"eval/{name}/avg@4" in line:
                line |= {
                    f"eval/{name}/avg@4": 0.025,
                    f"eval/{name}/reward_mean": mean,
                    f"eval/{name}/reward_mean_ci95": 0.02,
                }
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run_dir / "rollouts" / "step_1.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0] |= {"reward": 0.183, "status": "ok"}
    pq.write_table(pa.Table.from_pylist(rows), path)
    return run_dir


def test_graded_rewards_lead_with_their_mean(tmp_path):
    html, page = read(make_graded(tmp_path / "r"))
    assert html.count('<span class="to">0.400</span>') == 2 and html.count("-0.100 &rarr;") == 2
    assert "accuracy avg@4: 2.5 % → 2.5 %, +0.0 points" in page.text and 'class="track"' not in html
    assert page.text.index("Held-out reward") < page.text.index("Held-out accuracy")
    assert "<th>mean reward</th><th>accuracy</th>" in html
    assert "Share of sampled responses that earn" not in page.text and "Mean reward of the sampled" in page.text
    assert "p10" in page.text and "p90" in page.text and "all equal" in page.text


def test_a_reward_below_1_is_partial_and_never_solved(tmp_path):
    html, page = read(make_graded(tmp_path / "r"))
    assert 'class="tag solved"' not in html and 'class="tag partial"' in html
    assert "reward 0.183 · rewarded" in page.text


def test_rewards_of_0_and_1_lead_with_accuracy(full):
    html, page = full
    assert 'caption">mean reward' not in html and html.count('class="track"') == 2
    assert "Held-out reward" not in page.text and "Held-out accuracy" in page.text
    assert "Share of sampled responses that earn the reward" in page.text


def test_runs_from_before_reward_graded_are_told_by_mean_and_status():
    record = {"step": 1, "reward/mean": 0.25, "reward/status/ok": 0.25, "reward/status/crash": 0.0}
    assert not graded_run([record, {"step": 0}]) and graded_run([record, record | {"reward/mean": 0.3}])
    assert not graded_run([record | {"reward/mean": 0.3, "reward/status/crash": 0.1}])  # left out of the mean


# --- one meaning for truncated


@pytest.mark.parametrize("old", [False, True])
def test_summary_and_report_count_truncated_responses_alike(tmp_path, old):
    run_dir = make_run(tmp_path / "r", steps=2, rollouts=(1,))
    cut, both = {"completion/truncated": 0.25}, {"reward/status/truncated": 0.375}
    new = {} if old else {"completion/no_think_close": 0.125, "completion/count": 64.0}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line | (cut | both | new if line["step"] else {}) for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run_dir / "rollouts" / "step_1.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1] |= {"status": "truncated"}
    pq.write_table(pa.Table.from_pylist(rows[1:2]), path)
    config = load_run(run_dir).config
    counts = summarise(config, TrainState.start(config), 0).counts
    found = load_run(run_dir).health_counts()
    size = 2 * (128 if old else 64)
    assert counts["truncated responses"] == found["truncated responses"] == size // 4
    assert counts["responses with no </think>"] == found["no </think>"] == size // 8
    _, page = read(run_dir)
    assert "reward 0 · no </think>" in page.text and "no </think>truncated" not in page.text


def test_the_summary_has_the_training_reward_and_says_whether_rewards_are_graded(tmp_path):
    run_dir = make_graded(tmp_path / "r")
    config = load_run(run_dir).config
    summary = summarise(config, TrainState.start(config), 0)
    assert summary.graded and (summary.reward.steps[0], summary.reward.steps[-1]) == (1, 24)
    assert summary.reward.values[-1] == pytest.approx(0.4)


# --- hostile files

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = ", ".join(
    f'"{key}": 1e308'
    for key in (
        "time",
        "time/step",
        "time/rollout",
        "reward/mean",
        "optim/grad_norm",
        "completion/len_mean",
        "completion/count",
        "eval/a/avg@1",
        "eval/a/reward_mean",
    )
)


@pytest.mark.parametrize(
    "line",
    [
        f'{{"step": 4, "x": {DEEP}}}',
        f'{{"step": 4, "eval/x/avg@{"9" * 5000}": 0.5}}',
        f'{{"step": {"9" * 300}}}',
        f'{{"step": 4, {HUGE}}}\n{{"step": 5, {HUGE}}}',
        '{"step": 4, "time": 1e90}',
        '{"step": 4, "eval/a/avg@1": 0.5, "eval/a/avg@1_ci95": -1, "eval/a/reward_mean_ci95": -1}',
    ],
    ids=["deep", "digits", "step", "huge", "time", "interval"],
)
def test_hostile_metrics_are_left_out(tmp_path, line):
    run_dir = make_run(tmp_path / "r", steps=3, rollouts=())
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    _, page = read(run_dir)
    assert "avg@99" not in page.text and "Curves" in page.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"a": {DEEP}}}', "is not valid JSON"),
        ('{"a": ' + "[" * 400 + "]" * 400 + ', "b": [' + '{"a":' * 400 + "1" + "}" * 400 + "]}", "does not fit"),
    ],
    ids=["too deep to parse", "deep"],
)
def test_a_deep_config_is_a_note(tmp_path, text, said):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=())
    (run_dir / "config.resolved.json").write_text(text)
    _, page = read(run_dir)
    assert said in page.text


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("advantage", pa.array(["text"] * 4)),
        ("advantage", pa.array([2**62] * 4, pa.duration("s"))),
        ("golds", pa.array([[1.5]] * 4)),
        ("token_ids", pa.array([["x"]] * 4)),
        ("logp", pa.array([[None]] * 4)),
        ("status", pa.array([1] * 4)),
        ("reward", pa.array([b"\xff"] * 4)),
        ("response", pa.array([{"a": 1}] * 4)),
    ],
)
def test_columns_of_other_types_are_a_note(tmp_path, column, values):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    path = run_dir / "rollouts" / "step_1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)
    _, page = read(run_dir)
    assert "rollouts/step_1.parquet cannot be read: " in page.text and "Transcripts" not in page.text


@pytest.mark.parametrize("text", ['{"a": 1}', f'{{"a": {DEEP}}}'], ids=["no tokenizer", "deep"])
def test_a_hostile_tokenizer_leaves_transcripts_plain(tmp_path, text):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    (run_dir / "model" / "tokenizer.json").write_text(text)
    _, page = read(run_dir)
    assert "Shading" not in page.text and "First add the ones" in page.text


def test_messages_of_the_run_are_listed_as_text(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=())
    (run_dir / "log.txt").write_bytes(b"t step 1: " + ATTACK.encode() + b"\x1b[2J \xff\n")
    _, page = read(run_dir)
    assert ATTACK + "<U+001B>[2J \ufffd" in page.text and "Messages" in page.text and "script" not in page.tags
    (run_dir / "log.txt").write_text("".join(f"line {n}\n" for n in range(1000)))
    _, page = read(run_dir)
    assert "line 699" not in page.text and "line 700\n" in page.text and "The last 300 lines" in page.text


# --- shapes


def test_one_slow_step_of_a_long_run_is_no_slope(tmp_path):
    """Areas are steps: the time of one evaluation is not spread over its neighbours."""
    run_dir = make_run(tmp_path / "r", steps=0, rollouts=())
    lines = [{"step": n, "stage": 0, "time/train": 1.0, "time/eval": 50.0 if n == 50 else 0.0} for n in range(1, 101)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html, _ = read(run_dir)
    svg = html[html.index('aria-label="Time per step"') :]
    paths = [re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path) for path in re.findall(r'd="([^"]*)"', svg)]
    areas = [path for path in paths if len(path) > 100]
    corners = [(a, b) for area in areas for a, b in pairwise(area) if a[1] != b[1]]
    assert len(areas) == 2 and corners and all(a[0] == b[0] for a, b in corners)  # every change of height is upright


def test_facts_leave_no_empty_block(full):
    html, _ = full
    rule = re.search(r"\.facts \{[^}]*\}", html)[0]
    assert "background" not in rule and "nowrap" in re.search(r"\.facts b \{[^}]*\}", html)[0]


def test_smooth_averages_but_never_across_a_stage_boundary():
    assert smooth([2.0] * 50) == [2.0] * 50
    assert smooth([0.0, 3.0] * 20)[10] == pytest.approx(1.2)
    assert smooth([1.0] * 20 + [9.0] * 20, [20]) == [1.0] * 20 + [9.0] * 20


def test_numbers_for_people():
    assert [duration(s) for s in (0.4, 42, 192, 18420)] == ["0.4 s", "42 s", "3 min 12 s", "5 h 07 min"]
    assert [count_text(n) for n in (0, 999, 12_600, 3.2e6)] == ["0", "999", "12.6 k", "3.2 M"]
    assert [tick_label(n) for n in (0, 0.25, 192, 16384, 2e-6)] == ["0", "0.25", "192", "16.4k", "2e-06"]
