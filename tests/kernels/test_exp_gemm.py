"""The head with a GEMM 1 that leaves exponentials and partial sums: its algebra, on an epilogue in plain torch."""

import pytest
import torch

from or1_kernels import LMHead, linear_policy_loss, options, rows
from or1_kernels.engine import exp_gemm, wide
from tests.helpers.exp_product import PlainExpGemm
from tests.kernels.test_wide import Emulated


@pytest.fixture
def gemm(monkeypatch):
    """Let impl="quack" mean the plain epilogue with torch's row passes behind it."""
    made = PlainExpGemm()
    backend = rows.TORCH._replace(name="quack", policy_rows_=fail, exp_gemm=made)
    monkeypatch.setattr(options, "resolve", lambda impl, device, dtype: backend if impl == "quack" else rows.TORCH)
    monkeypatch.setattr(wide, "choose", lambda weight, num_rows: Emulated(operand=weight.dtype))
    return made


def fail(*_, **__):
    raise AssertionError("the row passes ran")


@pytest.mark.parametrize("objective", ["ppo", "ppo_kl_is", "cispo_kl"])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 0.5)])
@pytest.mark.parametrize("far", [0, 3])
def test_the_head_is_as_exact_as_plain_torch(kit, gemm, objective, temperature, scale, far):
    given = {"objective": kit.objectives[objective], "entropy_coef": 0.0}
    case = kit.make_case(37, 16, 96, dtype=torch.bfloat16, **given, temperature=temperature, logit_scale=scale)
    for row in range(far):
        # The target is some 100 nats below the maximum.
        case.hidden[row] *= 30
        case.targets[row] = (case.weight.float() @ case.hidden[row].float()).argmin()
    if far:
        z = case.hidden.float() @ case.weight.float().T * scale / temperature
        own = z.gather(1, case.targets[:, None])[:, 0]
        assert (z.amax(1) - own)[:far].min() > 44
        logp = own - z.logsumexp(1)
        case = case.with_options(old_logp=logp - 0.1, rollout_logp=logp + 0.05, ref_logp=logp + 0.02)
    mine = kit.policy(case, impl="quack", chunk_rows=16)
    kit.assert_as_exact(mine, kit.plain(case), kit.plain(case.to(torch.float64)))
    assert gemm.chunks == 3 and gemm.redone >= far and (far or not gemm.redone)


def test_main_grad_gets_the_fp32_weight_gradient(kit, gemm):
    case = kit.make_case(37, 16, 96, dtype=torch.bfloat16, entropy_coef=0.0)
    main = torch.full((96, 16), 0.5)
    kit.policy(case, impl="quack", chunk_rows=16, main_grad=main)
    truth = kit.plain(case.to(torch.float64)).dweight
    assert gemm.chunks == 3 and (main - 0.5 - truth).abs().max() <= 0.01 * truth.abs().max()


@pytest.mark.parametrize("gap", [1.0, 8.0, 16.0, 30.0])
def test_the_probability_of_all_other_tokens_keeps_its_digits(gemm, gap):
    """1 - p of the target down to e^-30, where a difference of fp32 sums would be noise or 0."""
    weight = torch.zeros(96, 8, dtype=torch.bfloat16)
    weight[5, 0] = gap
    # The others lie in the target's tile, except two.
    weight[:5, 1], weight[40:42, 1] = 0.125, -2.0
    weight[torch.arange(96) > 41, 1] = -100
    weight[6:32, 1] = -100
    hidden = torch.ones(1, 8, dtype=torch.bfloat16)
    targets = torch.tensor([5])
    loss, stats = linear_policy_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        torch.ones(1),
        token_weight=torch.ones(1),
        entropy_coef=0.0,
        impl="quack",
    )
    loss.backward()
    p = (hidden.double() @ weight.double().T).softmax(1)[0]
    others = p[torch.arange(96) != 5].sum()
    assert (-stats.logp.double().expm1() - others).abs() <= 2**-9 * others
    assert (weight.grad[5, 0].double() + others).abs() <= 2**-7 * others
    assert gemm.chunks == 1 and not gemm.redone


@pytest.mark.parametrize(
    "change", [{"entropy_coef": 0.01}, {"entropy_coef": torch.zeros(())}, {"softcap": 9.0}, {"bias": torch.zeros(96)}],
    ids=["bonus", "tensor", "softcap", "bias"],
)  # fmt: skip
def test_other_losses_take_the_row_passes(kit, gemm, monkeypatch, change):
    backend = rows.TORCH._replace(name="quack", exp_gemm=gemm)
    monkeypatch.setattr(options, "resolve", lambda *_: backend)
    case = kit.make_case(20, 16, 96, dtype=torch.bfloat16, **{"entropy_coef": 0.0} | change)
    if "bias" in change:
        case = case.with_options(bias=change["bias"].bfloat16())
    kit.assert_as_exact(kit.policy(case, impl="quack"), kit.plain(case), kit.plain(case.to(torch.float64)))
    assert not gemm.chunks


def test_a_vocabulary_with_a_broken_tile_is_refused(gemm):
    head = LMHead(8, 100, dtype=torch.bfloat16)
    hidden, targets = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="'quack' cannot run: the last tile is not whole; use impl='auto'"):
        linear_policy_loss(hidden, head.weight, targets, torch.ones(4), token_weight=torch.ones(4), impl="quack")


def test_a_missing_package_or_device_is_named(monkeypatch):
    for found, text in ((None, r"pip install 'or1\[quack\]'"), (object(), "for Hopper and Blackwell GPUs")):
        monkeypatch.setattr(rows.choose, "find_spec", lambda name, found=found: found)
        with pytest.raises(RuntimeError, match=text):
            rows.resolve("quack", torch.device("cpu"), torch.bfloat16)


def test_nan_and_infinity_propagate(kit, gemm):
    case = kit.make_case(5, 16, 96, dtype=torch.bfloat16, entropy_coef=0.0)
    case.hidden[2, 3] = torch.nan
    got = kit.policy(case, impl="quack")
    assert got.logp.isnan().tolist() == [False, False, True, False, False]
    assert pytest.approx(1.4426950408889634) == exp_gemm.LOG2E
