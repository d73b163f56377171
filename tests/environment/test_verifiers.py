"""Environments of the real package verifiers, trained with the embedded engine."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import DataError, EngineError
from or1.core.types import Group
from or1.environment.open import open_environment
from or1.magic.selection import minibatches, select
from or1.model.load import load_tokenizer
from or1.rollout.collect import collect
from or1.rollout.engine import Finished, Sampling, continued, jobs_of
from or1.train.build import Parts, build
from or1.train.metrics import UpdateStats
from or1.train.update import update
from or1.trainer import Trainer
from tests.helpers.snippets import blocks

pytest.importorskip("verifiers.v1")
pytestmark = pytest.mark.integrations

TASKSETS = Path(__file__).parent / "tasksets"
QWEN3 = '{name = "qwen3", thinking_retention = "all"}'
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


class Quiet:
    """A display that shows nothing."""

    def progress(self, name: str) -> Any:
        return lambda done, total: None

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture(scope="module")
def chatter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random model that reads characters and the marks of Qwen3's chat format."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted({*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"})
    words = {word: i for i, word in enumerate([*MARKS, *TAGS, *signs, "<unk>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(MARKS))
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tmp_path_factory.mktemp("chatter")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    ids: dict[str, Any] = {"eos_token_id": words["<|im_end|>"], "pad_token_id": 0, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), **sizes, **heads, **ids)).save_pretrained(path)
    return path


def settings(tmp_path: Path, model: Path, taskset: str, environment: str, lr: float = 1e-2, **stage: int) -> Config:
    sizes = {"steps": 5, "max_response_tokens": 64, "prompts_per_step": 8, "group_size": 8} | stage
    lines = "\n".join(f"{name} = {value}" for name, value in sizes.items())
    path = tmp_path / "run.toml"
    (tmp_path / "run").mkdir(exist_ok=True)
    path.write_text(
        f"""
run_dir = "{tmp_path / "run"}"
[model]
path = "{model}"
dtype = "float32"
device = "cpu"
[data]
max_prompt_tokens = 700
[environment]
id = "{TASKSETS / taskset}.py"
{environment}
[optim]
lr = {lr}
max_tokens_per_rank = 4096
[log]
tensorboard = false
[[stage]]
{lines}
""",
        encoding="utf-8",
    )
    return load_config(path)


def trained(config: Config) -> list[dict[str, Any]]:
    with build(config, Quiet()) as parts:
        assert Trainer(parts).run()
    lines = (config.run_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def first_rollout(parts: Parts) -> tuple[Any, list[Group]]:
    step = parts.state.stages.step(1)
    return step, Trainer(parts).sample(step).groups


def test_a_single_turn_environment_is_trained(tmp_path: Path, adder: Path, root: Path) -> None:
    rows = root / "examples/tiny-adder/train.jsonl"
    taskset = f'args = {{taskset = {{path = "{rows}", tasks = 8}}}}'
    steps = trained(settings(tmp_path, adder, "adder", taskset, 1e-4, max_response_tokens=40))
    rewards = [step["reward/mean"] for step in steps]
    print("single turn:", rewards)
    # The same eight problems in every step, so a rise is no luck with problems.
    assert np.mean(rewards[3:]) > rewards[0] + 0.05
    for step in steps:
        # The parts are before their weights.
        total = step["reward/part/right"] + 0.5 * step["reward/part/brief"]
        assert step["reward/mean"] == pytest.approx(total)
        # Nothing is encoded a second time, so the trainer computes what the engine sampled with.
        assert step["mismatch/kl"] < 1e-9
        assert step["rollout/nonfinite_logp"] == step["reward/status/crash"] == 0


def test_a_two_turn_environment_is_trained(tmp_path: Path, chatter: Path) -> None:
    steps = trained(settings(tmp_path, chatter, "counting", f"renderer = {QWEN3}", 2e-2))
    rewards = [step["reward/mean"] for step in steps]
    print("two turns:", rewards)
    assert rewards[4] > 2 * rewards[0]
    assert all(step["mismatch/kl"] < 1e-9 and step["rollout/nonfinite_logp"] == 0 for step in steps)
    assert all(step["completion/len_max"] <= 24 for step in steps)


def test_masked_tokens_have_no_part_in_the_gradient(tmp_path: Path, chatter: Path) -> None:
    config = settings(tmp_path, chatter, "counting", f"renderer = {QWEN3}")
    with build(config, Quiet()) as parts:
        step, groups = first_rollout(parts)
        with_turns = [r for g in groups for r in g.responses if r.sampled is not None]
        assert len(with_turns) > 20
        for response in with_turns:
            assert np.isnan(response.logp[~response.sampled]).all()
            assert np.isfinite(response.logp[response.sampled]).all()
            written = parts.tokenizer.decode(response.token_ids[~response.sampled].tolist())
            first = int(response.sampled.argmin())
            # The question counts the characters that the policy wrote.
            assert "user" in written and "+1" in written and first <= 12
            assert response.sampled_tokens <= 24
        chosen = select(groups, config.loss, config.reward, step.stage)
        (batch,) = minibatches(chosen, config.loss, step.stage)
        expected, logps = by_hand(config, chosen)
        found: dict[str, torch.Tensor] = {}
        step_if_finite = parts.optimizer.step_if_finite

        def spy(loss: torch.Tensor) -> Any:
            found.update({name: grad.clone() for name, grad in parts.optimizer.gradients().items()})
            return step_if_finite(loss)

        parts.optimizer.step_if_finite = spy
        update(parts.policy, parts.optimizer, batch.sequences, 0.0, UpdateStats(), batch.normaliser)
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)
    for ours, engine in logps:
        np.testing.assert_allclose(ours, engine, atol=2e-5)


def by_hand(config: Config, chosen: Any) -> tuple[dict[str, torch.Tensor], list[tuple[Any, Any]]]:
    """Return the gradient of sum(-A log p) over sampled tokens, divided by their number, one response at a time."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    total, tokens, logps = torch.zeros(()), 0, []
    for group, advantages in zip(chosen.kept, chosen.advantages_KM, strict=True):
        for response, advantage in zip(group.responses, advantages, strict=True):
            if np.isnan(advantage) or not len(response.token_ids):
                continue
            ids = torch.tensor(np.concatenate([group.prompt.token_ids, response.token_ids]).astype(np.int64))
            logits = model(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1]
            targets = torch.tensor(response.token_ids.astype(np.int64))
            logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            every = np.ones(len(targets), bool)
            mask = torch.tensor(every if response.sampled is None else response.sampled)
            total = total - float(advantage) * logp[mask].sum()
            tokens += int(mask.sum())
            logps.append((logp[mask].detach().numpy(), response.logp[mask.numpy()]))
    (total / tokens).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, logps


def test_faults_of_an_environment_are_counted(tmp_path: Path, chatter: Path) -> None:
    common = f"renderer = {QWEN3}\nargs = {{taskset = {{fault = "
    raising = settings(tmp_path, chatter, "counting", f'{common}"raise"}}}}')
    with build(raising, Quiet()) as parts:
        _, groups = first_rollout(parts)
    for group in groups:
        # A random model also begins thoughts that it does not end, which the renderer cannot continue.
        crashed = [score.status.value == "crash" for score in group.scores]
        assert all(crashed) == bool(group.prompt.row["idx"] % 2), group.scores
    assert any("a fault of the environment" in score.cause for group in groups for score in group.scores)
    hanging = settings(tmp_path, chatter, "counting", f'{common}"hang"}}}}\ntimeout_s = 1.0', prompts_per_step=2)
    with build(hanging, Quiet()) as parts:
        _, groups = first_rollout(parts)
    for group in groups:
        assert ("timeout" in {s.status.value for s in group.scores}) == bool(group.prompt.row["idx"] % 2)


class Script:
    """An engine that begins with a given text, and then ends its turn."""

    shares_weights, continuous_batching, version = True, False, 3

    def __init__(self, tokenizer: Any, text: str):
        self.first, self.last = tokenizer(text).input_ids, tokenizer("7<|im_end|>").input_ids

    def generate(self, prompts: Any, sampling: Any, slots: Any = None) -> Any:
        for job in jobs_of(prompts, sampling, slots):
            ids = np.array(self.first if job.unfinished is None else self.last, np.int32)
            logp = np.full(len(ids), -0.5, np.float32)
            yield Finished(*job.slot, continued(job, ids, logp, "stop", self.version))


def test_the_result_of_a_tool_is_masked(tmp_path: Path, chatter: Path) -> None:
    config = settings(tmp_path, chatter, "calculator", f"renderer = {QWEN3}")
    tokenizer = load_tokenizer(config.model.path)
    call = '<tool_call>\n{"name": "calculator_add", "arguments": {"a": 30, "b": 4}}\n</tool_call><|im_end|>'
    with open_environment(config) as environment:
        engine = environment.engine(Script(tokenizer, call), tokenizer, [tokenizer.eos_token_id])
        (prompt,) = environment.problems.prompts
        # Tools are in the prompt, as the first request of an episode has them.
        assert "calculator_add" in tokenizer.decode(prompt.token_ids)
        rollout = collect(engine, environment.scorer, [prompt], Sampling(1.0, 300, 2, seed=1))
    for response, score in zip(rollout.groups[0].responses, rollout.groups[0].scores, strict=True):
        assert score.reward == 1 and response.finish == "stop" and response.version == 3
        assert response.token_ids[response.sampled].tolist() == engine_script(tokenizer, call)
        written = "".join(tokenizer.decode(response.token_ids[~response.sampled]).split())
        assert written == "<|im_start|>user<tool_response>34</tool_response><|im_end|><|im_start|>assistant"


def engine_script(tokenizer: Any, call: str) -> list[int]:
    return [*tokenizer(call).input_ids, *tokenizer("7<|im_end|>").input_ids]


def test_what_cannot_be_played_is_refused(tmp_path: Path, chatter: Path) -> None:
    with pytest.raises(EngineError, match="verifiers cannot load it"):
        build(settings(tmp_path, chatter, "counting", "args = {taskset = {nothing = 1}}"), Quiet())
    with pytest.raises(DataError, match=r"none of its 40 tasks fits data.max_prompt_tokens = 3"):
        config = settings(tmp_path, chatter, "counting", f"renderer = {QWEN3}")
        short = config.data.model_copy(update={"max_prompt_tokens": 3})
        build(config.model_copy(update={"data": short}), Quiet())


def test_the_example_of_the_page_is_one(tmp_path: Path, chatter: Path, root: Path) -> None:
    (source,) = blocks((root / "docs" / "environments.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "sums.py").write_text(source, encoding="utf-8")
    with open_environment(settings(tmp_path, chatter, str(tmp_path / "sums"), f"renderer = {QWEN3}")) as environment:
        prompts = environment.problems.prompts
    assert [(p.text, p.row["answer"]) for p in (prompts[0], prompts[-1])] == [
        ("What is 0 + 0?", "0"),
        ("What is 999 + 999?", "1998"),
    ]
