"""`or1 init NAME`: a folder with a commented config, a reward function and a few rows, to start a task of your own."""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from pathlib import Path
from string import Template
from typing import NamedTuple

from or1.commands.examples import ADDER, copy_adder
from or1.commands.exit import fail
from or1.config import Config
from or1.config.schema import FILE_NAME, schema_text
from or1.core.errors import EXIT_RUN, PlanError, RunError
from or1.core.files import write_whole

_ROWS = 20
_LONGEST_ROW = 32768


class _Size(NamedTuple):
    """What depends on the model and the device: tokens of a row, settings of `[model]` and `[rollout]`, and remarks."""

    max_response: int
    row: int
    model: str
    rollout: str
    remarks: tuple[str, ...] = ()


_SMALL = _Size(28, 8192, 'dtype = "float32"\ndevice = "cpu"', "batch_size = 512   # responses generated together")

_CONFIG = Template("""#:schema ./config.schema.json
# A task of your own. Check it, train, look:
#
#     or1 train $folder/config.toml --dry-run
#     or1 train $folder/config.toml
#
# Every setting is in docs/configuration.md; `--set section.key=value` overrides one.

run_dir = "$folder/run"

[model]
path = "$model"   # a folder or hub id of a causal language model
$model_settings

[data]
train = "train.jsonl"         # JSONL, JSON, parquet, CSV; folders, patterns, hf:owner/name:config/split
max_prompt_tokens = $prompt
$suffix

[reward]
$reward

[rollout]
$rollout

[optim]
lr = $lr
max_tokens_per_rank = $row   # tokens of a packed row: sets the memory of an update, never its gradient

[checkpoint]
every_steps = 10

[eval]
every_steps = 10

[[eval.sets]]
name = "heldout"
path = "heldout.jsonl"
temperature = 0.0

[[stage]]
steps = 20
max_response_tokens = $response
prompts_per_step = $prompts
group_size = 16
""")

_REWARD = '''"""The reward of one response. or1 calls the function with lists of one, as TRL does with longer lists."""

import re


def reward(completions, answer, **columns):
    """Return 1 for the right number at the end, 0.1 for another number, 0 for none.

    completions  texts of the model
    answer       the column "answer" of the data row; every other column is an argument too
    """
    rewards = []
    for text, gold in zip(completions, answer):
        numbers = re.findall(r"-?[0-9]+", text)
        rewards.append((1.0 if numbers[-1] == str(gold) else 0.1) if numbers else 0.0)
    return rewards
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 init`."""
    parser.add_argument("folder", type=Path, help="new folder for the config, the reward and the data")
    parser.add_argument(
        "--model", metavar="MODEL", help="hub id or folder (default: the tiny adder, which learns on a CPU)"
    )
    parser.add_argument(
        "--task",
        choices=("own", "math", "code"),
        default="own",
        help="own: a reward function to edit; math, code: a built-in verifier (default: own)",
    )
    parser.add_argument("--gpu", metavar="NAME", help="device to size the config for, such as H100 (default: this one)")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder. Raises RunError if it has files, and PlanError for an unknown device."""
    folder: Path = arguments.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already; name a new folder")
    if arguments.task == "code" and arguments.model is None:
        return fail("the tiny adder writes no programs; name a model with --model", EXIT_RUN)
    size = _SMALL if arguments.model is None else _sized(arguments.model, arguments.gpu)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        copy_adder(folder / ADDER)
    random_rows = random.Random(0)
    for name in ("train.jsonl", "heldout.jsonl"):
        rows = [_row(arguments.task, random_rows) for _ in range(_ROWS)]
        write_whole(folder / name, "".join(f"{json.dumps(row)}\n" for row in rows))
    if arguments.task == "own":
        write_whole(folder / "reward.py", _REWARD)
    # An editor completes and checks the config by the schema that its first line names.
    write_whole(folder / FILE_NAME, schema_text())
    write_whole(folder / "config.toml", _config(folder, arguments.model, arguments.task, size))
    for remark in size.remarks:
        print(remark)
    own = ", reward.py" if arguments.task == "own" else ""
    print(f"{folder}: config.toml{own}, train.jsonl and heldout.jsonl ({_ROWS} rows each; replace them by yours)")
    print(f"Next: or1 train {folder}/config.toml --dry-run")
    return 0


def _config(folder: Path, model: str | None, task: str, size: _Size) -> str:
    reward = f'kind = "{task}"' if task != "own" else f'kind = "{folder.as_posix()}/reward.py:reward"'
    boxed = "Let's think step by step and write the final answer within \\\\boxed{}."
    suffix = f'prompt_suffix = " {boxed}"' if task == "math" and model is not None else '# prompt_suffix = ""'
    return _CONFIG.substitute(
        folder=folder.as_posix(),
        model=f"{folder.as_posix()}/{ADDER}" if model is None else model,
        model_settings=size.model,
        prompt=32 if model is None else 1024,
        suffix=f"{suffix}   # text after every question",
        reward=reward,
        rollout=size.rollout,
        lr="1e-4" if model is None else "1e-6",
        row=size.row,
        response=size.max_response,
        prompts=8 if model is None else 32,
    )


def _row(task: str, rows: random.Random) -> dict[str, object]:
    a, b = rows.randrange(10, 100), rows.randrange(1, 100)
    if task == "code":
        question = f"Write a Python program that reads a number n from standard input and prints n + {a}."
        inputs = [f"{rows.randrange(100)}\n" for _ in range(2)]
        return {"question": question, "tests": {"inputs": inputs, "outputs": [f"{int(n) + a}\n" for n in inputs]}}
    return {"question": f"{a}+{b}", "answer": str(a + b)}


def _sized(model: str, gpu: str | None) -> _Size:
    """Return the sizes of a config for a model on a device, by the plan. Raises PlanError for an unknown device."""
    from or1.plan.devices import find_device
    from or1.plan.estimate import make_plan
    from or1.plan.shapes import shape_of

    device, _ = find_device(gpu, "auto")
    settings = "" if device.is_gpu else 'device = "cpu"'
    rollout = 'engine = "vllm"' if device.is_gpu else "batch_size = 64   # responses generated together"
    rough = _Size(1024, 4096, settings, rollout)
    try:
        shape = shape_of(model)
        remarks = []
        for response in (8192, 4096, 2048, 1024, 512):
            plan = make_plan(_planned(model, settings, rollout, response), shape, device)
            row = min(plan.largest_tokens, _LONGEST_ROW)
            if plan.fits and row >= plan.longest:
                break
        else:
            remarks.append(f"{model} does not fit one {device.name}: or1 plan CONFIG names what would help")
            return rough._replace(remarks=tuple(remarks))
        return _Size(response, row // 1024 * 1024 or row, settings, rollout, tuple(remarks))
    except PlanError as error:
        if gpu is not None and "config.json" not in str(error) and "model_type" not in str(error):
            raise
        return rough._replace(remarks=(f"sizes are a guess: {error}",))


def _planned(model: str, settings: str, rollout: str, response: int) -> Config:
    """Return the config that `_config` writes, for the plan."""
    return Config.model_validate(
        {
            "run_dir": "run",
            "model": {"path": model, **tomllib.loads(settings)},
            "data": {"train": "x", "max_prompt_tokens": 1024},
            "rollout": tomllib.loads(rollout),
            "optim": {"max_tokens_per_rank": 1024 + response},
            "stage": [{"steps": 20, "max_response_tokens": response, "prompts_per_step": 32, "group_size": 16}],
        }
    )
