"""torch.compile: the head is one operator with a fake kernel, no graph breaks, and the results are eager's."""

import pytest
import torch

from or1_kernels import LMHead, PolicyObjective, linear_logprob_entropy, linear_policy_loss


def leaves(case):
    return case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policy_loss_is_one_graph_and_equals_eager(kit, impl, dtype):
    case = kit.make_case(37, 16, 101, dtype=dtype, objective=PolicyObjective(kl_coef=0.1, is_cap=2.0))

    def step(hidden, weight):
        # Work on both sides of the head shares its graph.
        loss, stats = linear_policy_loss(
            hidden * 2, weight, case.targets, case.advantages, impl=impl, temperature=0.7, softcap=9.0, **case.options
        )
        return loss * 3, stats.logp, stats.entropy, stats.ratio, stats.clipped

    a, b = leaves(case), leaves(case)
    eager, traced = step(*a), compiled(step)(*b)
    eager[0].backward()
    traced[0].backward()
    for x, y in zip((*eager, a[0].grad, a[1].grad), (*traced, b[0].grad, b[1].grad), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_scores_are_one_graph_and_equal_eager(kit, impl):
    case = kit.make_case(37, 16, 101)

    def step(hidden, weight):
        logp, entropy = linear_logprob_entropy(hidden, weight, case.targets, impl=impl, logit_scale=0.5)
        return (logp * case.advantages + 0.1 * entropy).sum()

    a, b = leaves(case), leaves(case)
    step(*a).backward()
    compiled(step)(*b).backward()
    torch.testing.assert_close(b[0].grad, a[0].grad)
    torch.testing.assert_close(b[1].grad, a[1].grad)


def test_a_head_module_compiles_and_frozen_parts_get_no_gradient(kit):
    case = kit.make_case(20, 16, 50)
    head = LMHead(16, 50)
    head.weight.requires_grad_(False)
    hidden = case.hidden.requires_grad_()
    fn = compiled(lambda h: head(h, case.targets, case.advantages, token_weight=torch.full((20,), 0.05))[0])
    fn(hidden).backward()
    want = hidden.grad.clone()
    hidden.grad = None
    head(hidden, case.targets, case.advantages, token_weight=torch.full((20,), 0.05))[0].backward()
    torch.testing.assert_close(want, hidden.grad)
    assert head.weight.grad is None


def test_main_grad_breaks_the_graph_but_works(kit):
    case, main = kit.make_case(20, 8, 31), torch.zeros(31, 8)
    torch._dynamo.reset()

    def step(hidden, weight):
        return linear_policy_loss(hidden, weight, case.targets, case.advantages, main_grad=main, **case.options)[0]

    torch.compile(step, backend="aot_eager")(*leaves(case)).backward()
    torch.testing.assert_close(main, kit.policy(case).dweight)


@pytest.mark.parametrize("op", ["policy_loss", "logprob_entropy"])
def test_operators_pass_torchs_own_checks(kit, op):
    case = kit.make_case(6, 4, 11)
    from or1_kernels.engine import compiled as ops

    scalars = {"scale": 1.0, "softcap": None, "impl": "torch", "preset": "fast", "chunk_rows": None}
    inv_tau = torch.ones(6)
    if op == "logprob_entropy":
        torch.library.opcheck(ops.logprob_entropy, (*leaves(case), None, case.targets, inv_tau), scalars)
        return
    per_row = torch.stack((inv_tau, case.advantages, case.options["token_weight"]))
    torch.library.opcheck(
        ops.policy_loss,
        (*leaves(case), None, case.targets, per_row, torch.tensor(0.1)),
        scalars
        | {
            "names": "inv_tau,advantages,token_weight",
            "kind": "ppo_clip",
            "low": 0.2,
            "high": 0.2,
            "kl_coef": 0.0,
            "is_cap": None,
            "is_floor": 0.0,
            "is_mask": False,
            "eps": None,
            "needs": [True, True, False],
        },
    )
