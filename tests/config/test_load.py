"""Config errors: all at once, each with its path and a remedy, fast, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from or1.config import Config
from or1.config.file_rules import missing_files
from or1.config.load import dump_config, load_config
from or1.core.errors import ConfigError

QUICKSTART = "examples/quickstart.toml"

FIVE_MISTAKES = """
run_dir = "runs/x"
[model]
path = "no/such/folder/here"
[data]
train = "no-such-file.jsonl"
[rollout]
temprature = 0.7
[optim]
lr = -1.0
[[stage]]
steps = 5
max_response_tokens = 64
prompts_per_step = 8
group_size = 4
minibatch_prompts = 16
"""


@pytest.fixture(autouse=True)
def _from_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def problems_of(text: str, tmp_path: Path, *overrides: str) -> dict[str, str]:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return {p.path: p.message for p in caught.value.problems}


def test_five_mistakes_are_all_named_with_remedies(tmp_path: Path) -> None:
    found = problems_of(FIVE_MISTAKES, tmp_path)
    assert set(found) == {"model.path", "data.train.0", "rollout.temprature", "optim.lr", "stage.0.minibatch_prompts"}
    assert "did you mean 'temperature'?" in found["rollout.temprature"]
    assert "-1.0" in found["optim.lr"] and "greater than 0" in found["optim.lr"]
    assert "no-such-file.jsonl" in found["data.train.0"]
    assert "16" in found["stage.0.minibatch_prompts"] and "prompts_per_step = 8" in found["stage.0.minibatch_prompts"]


def test_a_refused_value_that_is_required_hides_no_other_mistake(tmp_path: Path) -> None:
    text = FIVE_MISTAKES.replace("steps = 5", 'steps = "ten"').replace("prompts_per_step = 8\n", "")
    found = problems_of(text + '[[eval.sets]]\npath = "no-set.jsonl"\n', tmp_path, "optim.betas=[0.9, 1.5]")
    assert set(found) == {
        "model.path",
        "data.train.0",
        "rollout.temprature",
        "optim.lr",
        "stage.0.steps",
        "stage.0.prompts_per_step",
        "eval.sets.0.name",
        "eval.sets.0.path",
        "optim.betas.1",
    }
    without = problems_of(text.replace("[model]", "").replace('path = "no/such/folder/here"', ""), tmp_path)
    assert "missing" in without["model"] and "model.path" not in without and "data.train.0" in without


def test_scaled_positions_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 9, "rope_scaling": {"rope_type": "yarn"}}')
    overrides = ["stage.1.max_response_tokens=400", "optim.max_tokens_per_rank=4096"]
    assert load_config(QUICKSTART, [f"model.path={tmp_path}", *overrides]).stage[1].max_response_tokens == 400
    with pytest.raises(ConfigError, match="400 is more than max_position_embeddings = 256 in examples/tiny-adder"):
        load_config(QUICKSTART, overrides)


def test_a_mistyped_model_folder_is_not_taken_for_a_hub_id(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json in 'examples/tiny-addr'"):
        load_config(QUICKSTART, ["model.path=examples/tiny-addr"])
    assert load_config(QUICKSTART, ["model.path=Qwen/Qwen2.5-1.5B"]).model.path == "Qwen/Qwen2.5-1.5B"


def test_a_missing_published_file_names_the_command_that_writes_it(tmp_path: Path) -> None:
    problems = list(missing_files([("eval.sets.0.path", "data/aime24.parquet"), ("data.train.0", "data/own.jsonl")]))
    assert [problem.path for problem in problems] == ["eval.sets.0.path", "data.train.0"]
    assert "`or1 data aime24 --out data` writes it" in problems[0].message
    assert "docs/own-data.md" in problems[1].message


def test_bad_config_exits_2_within_a_second_and_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(FIVE_MISTAKES)
    probe = (
        "import sys; from or1.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code if not {'torch', 'transformers', 'pyarrow'} & set(sys.modules) else 99)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe, "train", str(path)], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert done.returncode == 2, done.stderr
    for number in "12345":
        assert f"  {number}. " in done.stderr
    assert "6. " not in done.stderr
    # Two processes' worth of slack over the promised second, since tests share the machine.
    assert seconds < 2.0


def test_help_needs_no_torch() -> None:
    probe = "import sys, runpy\ntry:\n    from or1.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run([sys.executable, "-c", probe + "sys.exit('torch' in sys.modules)"], capture_output=True)
    assert done.returncode == 0 and b"train" in done.stdout


def test_overrides_reach_nested_values_and_lists() -> None:
    config = load_config(QUICKSTART, ["optim.lr=2e-5", "seed=7", "stage.1.steps=3", "run_dir=runs/other"])
    assert (config.optim.lr, config.seed, config.stage[1].steps, config.run_dir) == (2e-5, 7, 3, "runs/other")


@pytest.mark.parametrize("bad", ["optim.lr", "stage.9.steps=1", "seed.deeper=1", "=3"])
def test_a_bad_override_is_named(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"--set|unknown key"):
        load_config(QUICKSTART, [bad])


def test_config_is_frozen_and_round_trips_through_json() -> None:
    config = load_config(QUICKSTART)
    assert Config.model_validate(json.loads(dump_config(config))) == config
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


def test_entropy_variants_have_their_own_defaults(tmp_path: Path) -> None:
    paper = load_config(QUICKSTART, ["loss.entropy.variant=paper", 'loss.entropy.control="adaptive"'])
    assert (paper.loss.entropy.delta, paper.loss.entropy.coef_max) != (1e-4, 5e-3)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("optim.max_tokens_per_rank=10", "optim.max_tokens_per_rank"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1"),
        ("optim.weights=stochastic", "optim.weights"),
        ("model.attention=fast", "model.attention"),
        ("loss.entropy.coef=0.5", "loss.entropy.coef"),
        ("loss.clip_low=1.5", "loss.clip_low"),
        ("stage.0.group_size=1", "stage.0.group_size"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("optim.lr=nan", "optim.lr"),
        ("data.train=[]", "data.train"),
        ("stage=[]", "stage"),
        ("run_dir=3", "run_dir"),
        ("stage.1.max_response_tokens=400", "stage.1.max_response_tokens"),
        ("eval.max_response_tokens=257", "eval.max_response_tokens"),
    ],
)
def test_each_limit_names_its_path(override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert where in {p.path for p in caught.value.problems}


def test_require_think_close_is_refused_where_nothing_heeds_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    override = [f"reward.kind={tmp_path}/own.py:f", "reward.require_think_close=true"]
    with pytest.raises(ConfigError, match=r"reward.require_think_close: true has no effect with a function of your"):
        load_config(QUICKSTART, override)
    assert load_config(QUICKSTART, override[1:]).reward.require_think_close


def test_unreadable_files_are_one_clear_problem(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'run_dir = "caf\xe9"')
    (tmp_path / "broken.toml").write_text("run_dir = [")
    for name, word in (("latin.toml", "UTF-8"), ("broken.toml", "TOML"), ("absent.toml", "cannot be read")):
        with pytest.raises(ConfigError, match=word):
            load_config(tmp_path / name)


def test_every_number_has_a_bound_above() -> None:
    """A number that no run can have stalls the machine or ends in a traceback far from the setting."""
    unbounded = []

    def look(path: str, schema: dict) -> None:
        for each in (schema, *schema.get("anyOf", ()), *schema.get("prefixItems", ()), schema.get("items", {})):
            if each.get("type") in ("integer", "number") and not {"maximum", "exclusiveMaximum"} & each.keys():
                unbounded.append(path)

    whole = Config.model_json_schema()
    for name, section in (whole["$defs"] | {"Config": whole}).items():
        for key, schema in section.get("properties", {}).items():
            look(f"{name}.{key}", schema)
    # AdamW's betas have a rule of their own; those of the loss are factors of what is finite or not, which is counted.
    of_loss = ("LossConfig", "EntropyConfig", "StageLossConfig", "StageEntropyConfig")
    assert {path for path in unbounded if not path.startswith(of_loss)} == {"OptimConfig.betas"}


@pytest.mark.parametrize(
    "override",
    [
        "stage.0.prompts_per_step=4611686018427387904",
        "eval.sets.0.samples=1000000000",
        "eval.sets.0.name=..",
        "reward.workers=100000",
        "reward.timeout_s=1e300",
        "rollout.temperature=1e-300",
        "eval.sets.0.temperature=1e-300",
        "dist.heartbeat_timeout_s=1e-9",
        "optim.eps=1e-300",
        "optim.lr=1e30",
        "data.keep_difficulty=[-1, 3]",
        "stage.0.group_size=65536",
        "rollout.top_k=99999999999999999999",
        "seed=99999999999999999999999",
    ],
)
def test_a_number_that_no_run_can_have_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(QUICKSTART, [override, *(["stage.0.prompts_per_step=1024"] if "group" in override else [])])


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("stage.\u00b2.steps=1", "--set stage"),
        ("stage.\u0661.steps=1", "--set stage"),
        ("data.train.\u00b2=1", "--set data.train"),
        (f"stage.{'9' * 5000}.steps=1", "--set stage"),
        (f"optim.lr=0x{'f' * 9000}", "optim.lr"),
        (f"seed={'[' * 200}{']' * 200}", "seed"),
        (".".join("a" * 3000) + "=1", "--set a.a.a"),
        (f"run_dir={'x' * 256}", "run_dir"),
        (f"run_dir={'x/' * 2100}", "run_dir"),
        ('run_dir="a\\u0000b"', "run_dir"),
        ("run_dir=a\udc80b", "run_dir"),
        ("run_dir=", "run_dir"),
        (f"data.train={'x' * 256}", "data.train.0"),
        (f"model.path={'x' * 256}", "model.path"),
        (f"reward.kind={'x' * 256}.py:f", "reward.kind"),
        (f"loss.reference={'x' * 256}", "loss.reference"),
    ],
)
def test_odd_text_is_a_problem_and_no_traceback(override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert any(p.path.startswith(where) for p in caught.value.problems), caught.value
    assert len(str(caught.value)) < 3000


def test_a_file_that_may_not_be_looked_at_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plain user finds below a folder of another, where is_file raises PermissionError."""
    stat = Path.stat
    monkeypatch.setattr(
        Path,
        "stat",
        lambda self, **options: (
            (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(self)))
            if "closed" in str(self)
            else stat(self, **options)
        ),
    )
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, ["data.train=closed/a.jsonl", "model.path=closed/model/x"])
    assert {p.path for p in caught.value.problems} == {"data.train.0", "model.path"}


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("optim.learning_rate=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("stage.0.num_generations=8", "stage.0.group_size"),
        ("rollout.n=8", "stage.0.group_size"),
        ("loss.beta=0.1", "loss.kl_coef"),
        ("loss.kl_loss_coef=1", "loss.kl_coef"),
        ("loss.epsilon_high=0.3", "loss.clip_high"),
        ("clip_ratio_high=0.3", "loss.clip_high"),
        ("max_completion_length=99", "stage.0.max_response_tokens"),
        ("actor_rollout_ref.rollout.n=8", "stage.0.group_size"),
        ("data.train_batch_size=32", "stage.0.prompts_per_step"),
        ("optim.group_size=8", "stage.0.group_size"),
        ("trainer.save_freq=3", "checkpoint.every_steps"),
        ("per_device_train_batch_size=8", "stage.0.prompts_per_step"),
        ("gradient_accumulation_steps=8", "optim.max_tokens_per_rank"),
        ("loss.entropy_coef_delta=0.1", "loss.entropy.delta"),
        ("orchestrator.rollouts_per_example=16", "stage.0.group_size"),
        ("micro_train_batch_size=4", "optim.max_tokens_per_rank"),
        ("log.wandb_project=me", "log.wandb"),
    ],
)
def test_a_name_of_another_trainer_is_translated(override: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key; here it is {setting}"):
        load_config(QUICKSTART, [override])


def test_every_translation_names_a_setting() -> None:
    from or1.config import peers

    known = {*peers.settings(Config), "eval.sets"}
    assert len(known) > 100 and {*peers._PEERS.values()} <= known
    own = {path.rpartition(".")[2] for path in known}
    assert not own & {*peers._PEERS} - {"max_tokens"}


def test_usual_spellings_of_dtype_and_device_are_taken() -> None:
    taken = {"bf16": "bfloat16", "torch.bfloat16": "bfloat16", "fp32": "float32", "fp64": "float64"}
    for given, dtype in taken.items():
        assert load_config(QUICKSTART, [f"model.dtype={given}"]).model.dtype == dtype
    for given in ("gpu", "cuda:0", "cuda"):
        assert load_config(QUICKSTART, [f"model.device={given}"]).model.device == "cuda"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        load_config(QUICKSTART, ["model.device=cuda:1"])
    with pytest.raises(ConfigError, match="there is no float16"):
        load_config(QUICKSTART, ["model.dtype=fp16"])
    with pytest.raises(ConfigError, match="Did you mean 'sdpa'"):
        load_config(QUICKSTART, ["model.attention=spda"])


def test_a_refused_form_is_told_without_a_regular_expression() -> None:
    with pytest.raises(ConfigError, match=r"path/file\.py:function") as caught:
        load_config(QUICKSTART, ["reward.kind=match"])
    assert "A-Za-z" not in str(caught.value)


def test_files_are_found_from_the_folder_of_the_config(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "examples")
    config = load_config("quickstart.toml")
    adder = root / "examples" / "tiny-adder"
    assert (config.model.path, config.data.train) == (str(adder), (str(adder / "train.jsonl"),))
    assert [each.path for each in config.eval.sets] == [str(adder / "heldout.jsonl")] * 2
    assert config.run_dir == "runs/quickstart"
    monkeypatch.chdir(root)
    assert load_config(QUICKSTART).model.path == "examples/tiny-adder", "what is found from here keeps its name"


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(ConfigError, match=r"loss\.reference: no config\.json in 'examples/no-such'"):
        load_config(QUICKSTART, ["loss.kl_coef=0.1", "loss.reference=examples/no-such"])


def test_a_data_file_may_be_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.toml"
    config.write_text(Path(QUICKSTART).read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'\.' is a folder"):
        load_config(str(config), ["data.train=.", "model.path=no/such"])


def test_a_missing_model_is_named_beside_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "c").mkdir(parents=True)
    text = Path(QUICKSTART).read_text()
    monkeypatch.chdir(tmp_path)
    found = problems_of(text, tmp_path / "deep" / "c")
    assert {"model.path", "data.train.0", "eval.sets.0.path"} <= set(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", QUICKSTART], "did you mean 'train'"),
        (["ckpt", "verfy", "x"], "did you mean 'verify'"),
        (["train", QUICKSTART, "--set", "optim.lr", "1e-3"], "--set optim.lr=1e-3"),
        (["train", QUICKSTART, "--nproc", "\u00b2"], "is not a whole number of at least 1"),
    ],
)
def test_a_slip_on_the_command_line_is_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from or1.cli import main

    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2 and said in capsys.readouterr().err
