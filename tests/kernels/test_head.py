"""The fused head against its definition: exactness, gradients, shapes, invariances. Runs for every implementation.

The tolerance is relative: error against fp64 at most twice that of plain torch in the same dtype.
"""

import pytest
import torch

from or1_kernels import PolicyObjective, linear_logprob_entropy, linear_policy_loss
from tests.helpers.objectives import OBJECTIVES

# n: none, one, odd, several chunks; h: one that no vector width divides; v: tiny, prime, wider than a tile
SHAPES = [(1, 8, 7), (127, 33, 7), (127, 64, 5003), (300, 19, 1031)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_plain_torchs(kit, impl, shape, dtype):
    case = kit.make_case(*shape, dtype=dtype)
    mine = kit.policy(case, impl=impl, chunk_rows=64)
    kit.assert_as_exact(mine, kit.plain(case), kit.plain(case.to(torch.float64)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(kit, impl, objective):
    case = kit.make_case(127, 32, 501, objective=kit.objectives[objective])
    truth = kit.plain(case.to(torch.float64))
    mine = kit.policy(case, impl=impl, chunk_rows=50)
    kit.assert_as_exact(mine, kit.plain(case), truth)
    assert mine.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fp64_inputs_are_fp64_throughout(kit, objective):
    case = kit.make_case(127, 32, 501, objective=kit.objectives[objective]).to(torch.float64)
    mine, want = kit.policy(case, chunk_rows=50), kit.plain(case)
    for name in ("loss", "logp", "entropy", "dhidden", "dweight"):
        torch.testing.assert_close(getattr(mine, name), getattr(want, name), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": "rows"},
        {"bias": True},
        {"softcap": 5.0},
        {"logit_scale": 0.3},
        {"bias": True, "softcap": 8.0, "logit_scale": 1.7, "temperature": "rows"},
    ],
    ids=str,
)
def test_logit_transforms(kit, impl, options):
    options = dict(options)
    n, v = 65, 211
    if options.get("temperature") == "rows":
        options["temperature"] = torch.linspace(0.4, 1.9, n)
    if options.get("bias"):
        options["bias"] = torch.linspace(-2, 2, v)
    case = kit.make_case(n, 24, v, **options)
    kit.assert_as_exact(kit.policy(case, impl=impl), kit.plain(case), kit.plain(case.to(torch.float64)))


def test_arbitrary_upstream_gradients_even_strided(kit, impl):
    case = kit.make_case(90, 16, 301)
    wide = torch.randn(90, 6)
    upstream = (wide[:, 2], wide.flip(1)[:, 1])
    mine = kit.score(case, upstream, impl=impl, chunk_rows=32)
    peer = kit.score(case, upstream, impl="reference")
    truth = kit.score(case.to(torch.float64), upstream, impl="reference")
    kit.assert_as_exact(mine, peer, truth)
    expanded = kit.score(case, (torch.tensor(0.5).expand(90), torch.tensor(-0.1).expand(90)), impl=impl)
    dense = kit.score(case, (torch.full((90,), 0.5), torch.full((90,), -0.1)), impl=impl)
    assert torch.equal(expanded.dweight, dense.dweight)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_log_prob_and_entropy(softcap):
    gen = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64, requires_grad=True)  # noqa: E731
    hidden, weight, bias = draw(5, 4), draw(7, 4), draw(7)
    targets = torch.tensor([0, 3, 6, 3, 1])
    tau = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.8])

    def score(hidden, weight, bias):
        return linear_logprob_entropy(
            hidden, weight, targets, temperature=tau, bias=bias, softcap=softcap, logit_scale=0.7, chunk_rows=2
        )

    assert torch.autograd.gradcheck(score, (hidden, weight, bias))


@pytest.mark.parametrize("objective", ["ppo", "clip_higher", "ppo_kl_is"])
def test_gradcheck_of_the_policy_loss(kit, objective):
    case = kit.make_case(6, 4, 9, objective=kit.objectives[objective]).to(torch.float64).with_options(entropy_coef=0.3)

    def loss(hidden, weight):
        return linear_policy_loss(hidden, weight, case.targets, case.advantages, chunk_rows=4, **case.options)[0]

    assert torch.autograd.gradcheck(loss, (case.hidden.requires_grad_(), case.weight.requires_grad_()))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_only_wanted_gradients_are_made_and_each_is_independent(kit, impl, needs):
    case = kit.make_case(40, 8, 50)
    full, part = kit.policy(case, impl=impl), kit.policy(case, needs, impl=impl)
    assert (part.dhidden is not None, part.dweight is not None) == needs
    # Triton's launch that makes gradients too sums in another order than the pass for statistics alone.
    rounding = 1e-6 if impl == "triton" and not any(needs) else 0.0
    torch.testing.assert_close(full.logp, part.logp, rtol=rounding, atol=rounding)
    for wanted, name in zip(needs, ("dhidden", "dweight"), strict=True):
        assert not wanted or torch.equal(getattr(full, name), getattr(part, name))


def test_bias_gradient_alone(kit, impl):
    case = kit.make_case(40, 8, 50)
    bias = torch.zeros(50, requires_grad=True)
    logp, _ = linear_logprob_entropy(case.hidden, case.weight, case.targets, bias=bias, impl=impl)
    logp.sum().backward()
    p = (case.hidden @ case.weight.T).softmax(-1)
    want = torch.nn.functional.one_hot(case.targets, 50).sum(0) - p.sum(0)
    torch.testing.assert_close(bias.grad, want.float(), rtol=1e-5, atol=1e-5)


def test_no_rows_give_a_connected_zero(kit, impl):
    mine = kit.policy(kit.make_case(0, 8, 11), impl=impl)
    assert mine.loss.item() == 0 and mine.logp.shape == (0,) and mine.clipped.dtype == torch.bool
    assert torch.equal(mine.dweight, torch.zeros(11, 8)) and mine.dhidden.shape == (0, 8)


def test_no_grad_mode_scores_alike_and_keeps_nothing(kit, impl):
    case = kit.make_case(30, 8, 50)
    with torch.no_grad():
        mine = kit.policy(case, needs=(False, False), impl=impl)
        logp, entropy = linear_logprob_entropy(case.hidden.requires_grad_(), case.weight, case.targets, impl=impl)
    assert not logp.requires_grad and not mine.loss.requires_grad
    assert torch.equal(mine.logp, logp) and torch.equal(mine.entropy, entropy)


def test_upstream_factor_scales_the_policy_gradient(kit, impl):
    case = kit.make_case(30, 8, 50)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss, _ = linear_policy_loss(hidden, weight, case.targets, case.advantages, impl=impl, **case.options)
    whole = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    quarter = torch.autograd.grad(loss * 0.25, (hidden, weight))
    for a, b in zip(whole, quarter, strict=True):
        assert torch.equal(a * 0.25, b)


def test_a_kept_graph_can_be_differentiated_again(kit, impl):
    case = kit.make_case(30, 8, 50)
    weight = case.weight.requires_grad_()
    loss, _ = linear_policy_loss(case.hidden, weight, case.targets, case.advantages, impl=impl, **case.options)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = first.clone()
    (last,) = torch.autograd.grad(loss * 3, weight)  # may take over the accumulator: nobody can ask again
    assert torch.equal(first, kept) and torch.equal(last, kept * 3)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_permuting_rows_permutes_results_bit_for_bit(kit, impl, dtype):
    case = kit.make_case(127, 32, 1031, dtype=dtype)
    order = torch.randperm(127, generator=torch.Generator().manual_seed(5))
    base, moved = kit.policy(case, impl=impl, chunk_rows=32), kit.policy(case.rows(order), impl=impl, chunk_rows=32)
    for name in ("logp", "entropy", "ratio", "clipped", "dhidden"):
        assert torch.equal(getattr(base, name)[order], getattr(moved, name)), name


def test_run_to_run_bitwise_equal(kit, impl):
    case = kit.make_case(127, 32, 1031)
    first, second = kit.policy(case, impl=impl), kit.policy(case, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_accumulated_splits_equal_the_whole(kit):
    case = kit.make_case(60, 16, 101).to(torch.float64)
    whole = kit.policy(case)
    parts = [kit.policy(case.rows(slice(a, b))) for a, b in ((0, 7), (7, 41), (41, 60))]
    assert sum(p.loss for p in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(sum(p.dweight for p in parts), whole.dweight, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(torch.cat([p.dhidden for p in parts]), whole.dhidden, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_chunking_changes_nothing_but_rounding(kit, impl, chunk_rows):
    case = kit.make_case(50, 16, 101)
    a, b = kit.policy(case, impl=impl), kit.policy(case, impl=impl, chunk_rows=chunk_rows)
    for name in ("loss", "logp", "entropy", "dhidden", "dweight"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 127])
def test_rows_of_weight_zero_get_no_gradient(kit, impl, n):
    case = kit.make_case(n, 8, 50).with_options(token_weight=torch.zeros(n))
    mine = kit.policy(case, impl=impl)
    assert mine.loss.item() == 0 and not mine.dweight.any() and not mine.dhidden.any()


def test_stats_say_who_ran_and_are_detached(kit, impl):
    case = kit.make_case(9, 8, 50)
    hidden = case.hidden.requires_grad_()
    _, stats = linear_policy_loss(hidden, case.weight, case.targets, case.advantages, impl=impl, **case.options)
    assert stats.impl == impl
    assert not any(x.requires_grad for x in (stats.logp, stats.entropy, stats.ratio))
    assert stats.logp.dtype == torch.float32


def test_on_policy_needs_no_old_log_prob(kit, impl):
    case = kit.make_case(31, 8, 50)
    given = kit.policy(case.with_options(old_logp=None), impl=impl)
    assert torch.equal(given.ratio, torch.ones(31)) and not given.clipped.any()
    explicit = kit.policy(case.with_options(old_logp=given.logp), impl=impl)
    assert torch.equal(given.dweight, explicit.dweight)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"hidden": torch.zeros(4, 8).bfloat16()}, TypeError, "cast one"),
        ({"weight": torch.zeros(10, 7)}, ValueError, "one H"),
        ({"targets": torch.tensor([0, 1, 2, 10])}, IndexError, r"\[0, 10\)"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, ValueError, "int64"),
        ({"token_weight": torch.zeros(3)}, ValueError, "token_weight"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"impl": "cuda"}, ValueError, "must be one of"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
        ({"objective": PolicyObjective(kl_coef=0.1)}, ValueError, "ref_logp is missing"),
    ],
)
def test_bad_arguments_are_named(change, error, word):
    good = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(10, 8),
        "targets": torch.zeros(4, dtype=torch.int64),
        "advantages": torch.ones(4),
        "token_weight": torch.ones(4),
    }
    with pytest.raises(error, match=word):
        linear_policy_loss(**(good | change))


@pytest.mark.parametrize(("stash", "old", "gemms"), [(0, True, 4), (1 << 30, True, 3), (0, False, 3)])
def test_gspo_takes_four_gemms_or_three_with_a_stash_or_on_policy(kit, monkeypatch, stash, old, gemms):
    """One chunk. The results do not depend on what is kept, nor on where the weight's gradient is summed."""
    from or1_kernels.engine import chunked

    case = kit.make_case(61, 16, 211, objective=kit.objectives["gspo"], chunk_rows=100)
    if not old:
        case = case.with_options(old_logp=None)
    want, seen = kit.policy(case, impl="reference"), []
    for name in ("logits", "_gemms_2_and_3"):
        inner = getattr(chunked.Engine, name)
        count = 1 if name == "logits" else 2
        monkeypatch.setattr(
            chunked.Engine, name, lambda *a, inner=inner, count=count, **k: seen.append(count) or inner(*a, **k)
        )
    got = kit.policy(case, impl="torch", stash_bytes=stash)
    assert sum(seen) == gemms
    for name in ("loss", "logp", "ratio", "dhidden", "dweight"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-6)
    total = torch.ones_like(case.weight)
    assert kit.policy(case, impl="torch", main_grad=total).dweight is None
    torch.testing.assert_close(total - 1, want.dweight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["live", [30, 2, 3, 29, 1, 40]])
def test_gspo_of_some_rows_compares_their_sequences(kit, order):
    """Rows in any order, with numbers of sequences beyond their count, give what the same rows give alone."""
    case = kit.make_case(61, 16, 211, objective=kit.objectives["gspo"])
    index = case.options["token_weight"].nonzero()[:, 0] if order == "live" else torch.tensor(order)
    whole, alone = kit.policy(case, rows=order if order == "live" else index), kit.policy(case.rows(index))
    torch.testing.assert_close(whole.ratio[index], alone.ratio)
    torch.testing.assert_close(whole.dhidden[index], alone.dhidden)
    torch.testing.assert_close(whole.dweight, alone.dweight)
    assert alone.clipped.any() and len(alone.ratio.unique()) > 1


def test_gspo_says_what_it_lacks(kit):
    case = kit.make_case(6, 4, 9, objective=kit.objectives["gspo"])
    with pytest.raises(ValueError, match="sequences is missing"):
        kit.policy(case.with_options(sequences=None))
    with pytest.raises(ValueError, match=r"sequences are torch.float32\[6\]"):
        kit.policy(case.with_options(sequences=torch.zeros(6)))
    with pytest.raises(ValueError, match="grad_row_eps"):
        kit.policy(case, grad_row_eps=0.0)
