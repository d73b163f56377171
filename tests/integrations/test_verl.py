"""verl's fused forward, losses and engine with or1 loaded as external_lib."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl")
pytestmark = pytest.mark.integrations

from verl.models.transformers.monkey_patch import patch_forward_with_backends  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils import torch_functional as verl_F  # noqa: E402
from verl.utils.experimental import torch_functional as fused  # noqa: E402
from verl.utils.import_utils import import_external_libs  # noqa: E402
from verl.utils.kernel import linear_cross_entropy as triton_head  # noqa: E402

VERLS_OWN = {"torch": fused.FusedLinearForPPO.forward, "triton": triton_head.linear_cross_entropy}
TEMPERATURE = 0.8


@pytest.fixture
def external_lib() -> Any:
    """or1 as verl's workers load it, with a fresh controller."""
    import_external_libs("or1.integrations.verl")
    import or1.integrations.verl as plugin

    plugin.install()
    return plugin


@pytest.fixture
def keep_class_forward() -> Iterator[None]:
    """verl patches the class of a model; other tests want it back."""
    from transformers import Qwen2ForCausalLM

    original = Qwen2ForCausalLM.forward
    yield
    Qwen2ForCausalLM.forward = original


def tiny_model(vocab: int, hidden: int = 128) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.15,
            tie_word_embeddings=False,
        )
    )


def unfused(model: Any, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return verl's result without fused kernels."""
    logits = model(ids_BT).logits / TEMPERATURE
    return verl_F.logprobs_from_logits(logits, labels_BT), verl_F.entropy_from_logits(logits)


def fused_forward(model: Any, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    out = model(input_ids=ids_BT, temperature=TEMPERATURE, return_dict=True, shift_labels=labels_BT)
    return out.log_probs, out.entropy


def gradients(model: Any, logp: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *logp.shape, generator=generator)
    model.zero_grad()
    (logp * weights[0] + entropy * weights[1]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("vocab", [1000, 1024, 1500])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.usefixtures("keep_class_forward")
def test_fused_forward_equals_unfused(
    external_lib: Any, monkeypatch: pytest.MonkeyPatch, backend: str, vocab: int
) -> None:
    model = tiny_model(vocab)
    ids_BT = torch.randint(vocab, (2, 23), generator=torch.Generator().manual_seed(2))
    labels_BT = ids_BT.roll(-1, dims=1)
    want = unfused(model, ids_BT, labels_BT)
    want_grads = gradients(model, *want)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    got = fused_forward(model, ids_BT, labels_BT)
    for name, mine, theirs in zip(("log-probs", "entropy"), got, want, strict=True):
        assert mine.dtype == torch.float32 and float((mine - theirs).detach().abs().max()) <= 1e-5, name
    for name, grad in gradients(model, *got).items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-5 * float(want_grads[name].abs().max()))

    if backend == "torch":
        monkeypatch.setattr(fused.FusedLinearForPPO, "forward", VERLS_OWN["torch"])
    else:
        monkeypatch.setattr(triton_head, "linear_cross_entropy", VERLS_OWN["triton"])
    print(f"\nvocabulary {vocab}, backend {backend}: largest error in log-prob and entropy against verl unfused")
    print("  or1 ", *(f"{float((x - y).detach().abs().max()):.1e}" for x, y in zip(got, want, strict=True)))
    try:
        own = fused_forward(model, ids_BT, labels_BT)
    except (AssertionError, RuntimeError) as error:
        # Behind what fails first, its kernel asserts CUDA tensors: not even Triton's interpreter can run it.
        print(f"  verl cannot run without CUDA: {type(error).__name__}: {str(error).splitlines()[0]}")
        assert backend == "triton" and not torch.cuda.is_available()
    else:
        print("  verl", *(f"{float((x - y).detach().abs().max()):.1e}" for x, y in zip(own, want, strict=True)))


def test_other_backends_and_shapes_go_the_same_way(external_lib: Any) -> None:
    """impl_backend liger is the torch class; a packed row is [1, T]; a temperature a token is allowed."""
    hidden = torch.randn(1, 7, 16, requires_grad=True)
    weight, labels = torch.randn(33, 16), torch.randint(33, (1, 7), dtype=torch.int32)
    plain = fused.FusedLinearForPPO(impl_backend="liger")(hidden, weight, labels, temperature=0.5)
    tokens = triton_head.linear_cross_entropy(hidden, weight, labels, torch.full((1, 7), 0.5), "none")
    assert plain[0].shape == (1, 7)
    for a, b in zip(plain, tokens, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(external_lib.UnsupportedVerlError, match="reduction is 'mean'"):
        external_lib.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def actor_config(**settings: Any) -> Any:
    from verl.workers.config import FSDPActorConfig, OptimizerConfig, PolicyLossConfig

    return FSDPActorConfig(
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=1,
        optim=OptimizerConfig(lr=1e-3),
        policy_loss=PolicyLossConfig(loss_mode="magic"),
        **settings,
    )


def test_magic_loss_is_the_clipped_token_mean(external_lib: Any) -> None:
    """Eq. 3.1 by hand, and equal to verl's own loss where that one's dual clip is inert."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    torch.manual_seed(0)
    old, mask = -torch.rand(3, 5) * 3, torch.rand(3, 5) > 0.3
    logp = (old + torch.randn(3, 5) * 0.3).requires_grad_()
    advantages = torch.randn(3, 1).expand(3, 5)
    config = actor_config(clip_ratio_high=0.28, global_batch_info={"dp_size": 2, "batch_num_tokens": 40})
    args = {
        "old_log_prob": old,
        "log_prob": logp,
        "advantages": advantages,
        "response_mask": mask,
        "loss_agg_mode": "token-mean",
        "config": config,
    }
    loss, metrics = get_policy_loss_fn("magic")(**args)
    ratio = (logp - old).exp()
    by_hand = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)[mask].sum() / 40 * 2
    theirs, their_metrics = get_policy_loss_fn("vanilla")(**args)
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-6) == pytest.approx(float(theirs), rel=1e-6)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(their_metrics["actor/pg_clipfrac"]) and loss.requires_grad
    weighted, _ = get_policy_loss_fn("magic")(**args, rollout_is_weights=torch.full((3, 5), 0.5))
    assert float(weighted) == pytest.approx(float(loss) / 2, rel=1e-6)
    with pytest.raises(external_lib.UnsupportedVerlError, match="token-mean"):
        get_policy_loss_fn("magic")(**args | {"loss_agg_mode": "seq-mean-token-mean"})


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def batch_of(model: Any, responses: list[tuple[int, float, float]]) -> Any:
    """Return sequences as verl's engines get them: response length, entropy and advantage each; prompts of 3."""
    torch.manual_seed(3)
    sequences = [torch.randint(model.config.vocab_size, (3 + n,)) for n, _, _ in responses]
    tensors = {
        "input_ids": nested(sequences),
        "prompts": nested([s[:3] for s in sequences]),
        "responses": nested([s[3:] for s in sequences]),
        "response_mask": nested([torch.ones(n) for n, _, _ in responses]),
        "old_log_probs": nested([torch.full((n,), -e) for n, e, _ in responses]),
        "advantages": nested([torch.full((n,), a) for n, _, a in responses]),
    }
    return tu.get_tensordict(tensors, {"dp_size": 1, "batch_num_tokens": 10, "global_batch_size": len(responses)})


@contextmanager
def one_rank() -> Iterator[None]:
    """torch.distributed with this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def worker_of(engine_class: type, model: Any) -> Any:
    """Return verl's training worker around an engine without a GPU, with the settings of its __init__."""
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    worker = object.__new__(TrainingWorker)
    worker.engine, worker.loss_fn = engine_class(model), partial(ppo_loss, config=actor_config())
    worker.profiler, worker.flops_counter, worker.device_name = MagicMock(), None, "cpu"
    worker.profiler.check_enable.return_value = False
    worker.model_config = {}
    worker.engine_config = SimpleNamespace(
        forward_only=False,
        use_dynamic_bsz=False,
        max_token_len_per_gpu=None,
        micro_batch_size_per_gpu=1,
        use_fused_kernels=False,
    )
    return worker


@pytest.fixture
def engine_class() -> type:
    from verl.workers.engine.base import BaseEngine

    class Engine(BaseEngine):
        """The parts of an engine that need no GPU."""

        def __init__(self, model: Any) -> None:
            self.model, self.coefficients, self.entropy_grads = model, [], []

        def train_mode(self, **_: Any) -> Any:
            return nullcontext()

        def optimizer_zero_grad(self) -> None:
            self.model.zero_grad()

        def optimizer_step(self) -> float:
            return float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm())

        def lr_scheduler_step(self) -> float:
            return 1.0

        def get_data_parallel_group(self) -> None:
            return None

        def get_data_parallel_size(self) -> int:
            return 1

        def get_data_parallel_rank(self) -> int:
            return 0

        def is_mp_src_rank_with_outputs(self) -> bool:
            return True

        def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
            assert tu.get_non_tensor_data(data, "calculate_entropy", False)
            pairs = [unfused(self.model, ids[None], ids.roll(-1)[None]) for ids in data["input_ids"].unbind()]
            logp, entropy = (torch.cat([pair[i][0] for pair in pairs]) for i in (0, 1))
            entropy.retain_grad()
            loss, metrics = loss_function(model_output={"log_probs": logp, "entropy": entropy}, data=data)
            loss.backward()
            self.coefficients.append(loss_function.keywords["config"].entropy_coeff)
            self.entropy_grads.append(nested_like(entropy.grad, data["input_ids"]))
            return {"metrics": metrics, "loss": [float(loss.detach())], "model_output": {}}

    return Engine


def nested_like(values: Tensor, shape: Tensor) -> list[Tensor]:
    return list(values.split(shape.offsets().diff().tolist()))


def test_the_controller_moves_once_a_rollout(external_lib: Any, engine_class: type) -> None:
    """Report, Eq. 3.2: two mini-batches of 0.4 and 0.7 nats, passed twice, have one entropy and one coefficient."""
    controller = external_lib.install(coef=0.1, target=0.6, delta=0.01, coef_max=1.0, variant="paper")
    worker = worker_of(engine_class, tiny_model(64, hidden=16))
    rollout = [(4, 0.4, 1.0), (4, 0.4, -1.0), (4, 0.7, 1.0), (4, 0.7, -1.0)]
    with one_rank():
        for k in range(2):
            data = batch_of(worker.engine.model, rollout)
            tu.assign_non_tensor(data, mini_batch_size=2, epochs=2)
            metrics = tu.get(worker.train_mini_batch(data=data), "metrics")
            assert controller.coef == pytest.approx(0.11 + 0.01 * k), "e = 0.55 is below the target, once"
            assert metrics["actor/rollout_entropy"] == pytest.approx([0.55] * 4)
    # A controller of mini-batches would be off for those of 0.7 nats, and move eight times.
    assert worker.engine.coefficients == pytest.approx([0.10] * 4 + [0.11] * 4)


def test_responses_without_an_advantage_have_no_bonus_and_no_say(external_lib: Any, engine_class: type) -> None:
    """A solved problem of 0.1 nats is left out of e_k and of the bonus; a rollout of nothing else moves nothing."""
    controller = external_lib.install(coef=0.1, target=0.6, delta=0.01, coef_max=1.0, variant="paper")
    worker = worker_of(engine_class, tiny_model(64, hidden=16))
    kept, solved = [(4, 0.8, 1.0), (4, 0.8, -1.0)], [(4, 0.1, 0.0), (4, 0.1, 0.0)]
    with one_rank():
        found = []
        for responses in (kept + solved, [(4, 0.5, 1.0), (4, 0.5, -1.0), *solved], solved * 2):
            data = batch_of(worker.engine.model, responses)
            tu.assign_non_tensor(data, mini_batch_size=4)
            found.append(tu.get(worker.train_mini_batch(data=data), "metrics")["actor/rollout_entropy"][0])
    assert found[:2] == pytest.approx([0.8, 0.5]) and math.isnan(found[2])
    assert worker.engine.coefficients == pytest.approx([0.0, 0.09, 0.0])
    assert controller.coef == pytest.approx(0.10), "down, up, and no more"
    grads = worker.engine.entropy_grads[1]
    assert [bool(grad.any()) for grad in grads] == [True, True, False, False]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (ModuleNotFoundError("no uvicorn", name="uvicorn"), None),  # no worker can be in this process
        (ModuleNotFoundError("gone", name="verl.workers.engine_workers"), "no verl.workers.engine_workers"),
        (SimpleNamespace(TrainingWorker=object), "TrainingWorker.train_mini_batch, which trains on a whole rollout"),
        (SimpleNamespace(), "TrainingWorker.train_mini_batch"),
    ],
)
def test_a_verl_without_what_trains_a_rollout_is_refused(
    external_lib: Any, monkeypatch: pytest.MonkeyPatch, module: Any, message: str | None
) -> None:
    def load(name: str) -> Any:
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(external_lib.importlib, "import_module", load)
    with nullcontext() if message is None else pytest.raises(external_lib.UnsupportedVerlError, match=message):
        external_lib._install_worker()


def test_a_critic_and_a_mini_batch_that_comes_alone_are_trained(external_lib: Any, engine_class: type) -> None:
    """A critic's config has no policy loss. The tensors of a rollout may be dense."""
    trained = external_lib._once_a_rollout(lambda self, data: data)
    assert trained(SimpleNamespace(loss_fn=partial(print, config=SimpleNamespace())), "untouched") == "untouched"
    dense = {
        "old_log_probs": torch.tensor([[-0.5, -9.0], [-0.1, -0.1]]),
        "response_mask": torch.tensor([[1, 0], [1, 1]]),
        "advantages": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    }
    assert external_lib.kept_mask(dense).tolist() == [[1, 0], [0, 0]]
    assert external_lib.kept_entropy(dense) == pytest.approx(0.5)


def test_the_controller_sets_the_coefficient_of_verls_engine(
    external_lib: Any, engine_class: type, tmp_path: Path
) -> None:
    """verl's own train_batch and ppo_loss: the bonus lags one step, reaches the gradient, and survives a checkpoint."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
    from verl.workers.utils.losses import ppo_loss

    controller = external_lib.install(coef=0.1, gate=False, target=0.6, delta=0.01, coef_max=1.0)
    engine = engine_class(tiny_model(64, hidden=16))
    loss_function = partial(ppo_loss, config=actor_config())
    both = [(4, 0.4, 1.0), (6, 0.6, -1.0)]
    outputs = [engine.train_batch(batch_of(engine.model, both), loss_function)["metrics"] for _ in range(2)]
    # e = (4 * 0.4 + 6 * 0.6) / 10 = 0.52 < 0.6: no bonus in the first step, 0.11 in the second.
    assert outputs[0]["actor/rollout_entropy"] == pytest.approx(0.52)
    assert [m["actor/entropy_coeff"] for m in outputs] == pytest.approx([0.0, 0.11])
    assert outputs[0]["grad_norm"] != pytest.approx(outputs[1]["grad_norm"], rel=1e-4)
    assert controller.coef == pytest.approx(0.12)

    external_lib._saving(lambda *_: None)(engine, str(tmp_path / "actor"))
    fresh = external_lib.install()
    external_lib._loading(lambda *_: None)(engine, str(tmp_path / "actor"))
    assert fresh.state() == {"coef": pytest.approx(0.12), "gate": True}
    assert hasattr(FSDPEngine.save_checkpoint, "__wrapped__") and hasattr(FSDPEngine.load_checkpoint, "__wrapped__")
