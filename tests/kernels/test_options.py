"""Options that trade memory or work: stash, row skipping, main_grad, lean preset, dropped gradient rows, bf16 GEMMs."""

import pytest
import torch

from or1_kernels import HeadOptions, PolicyObjective, linear_logprob_entropy, linear_policy_loss
from or1_kernels.engine import gemms, host


@pytest.mark.parametrize("budget", [0, 101 * 4 * 20, 10**9])
def test_stashed_logits_give_the_recomputed_gradients_bit_for_bit(kit, impl, budget):
    case = kit.make_case(64, 16, 101)
    upstream = (torch.linspace(-1, 1, 64), torch.linspace(0.2, -0.2, 64))
    want = kit.score(case, upstream, impl=impl, chunk_rows=16)
    got = kit.score(case, upstream, impl=impl, chunk_rows=16, stash_bytes=budget)
    assert torch.equal(want.dweight, got.dweight) and torch.equal(want.dhidden, got.dhidden)


def test_a_second_backward_recomputes_what_the_first_used_up(kit, impl):
    case = kit.make_case(20, 8, 31)
    weight = case.weight.requires_grad_()
    logp, _ = linear_logprob_entropy(case.hidden, weight, case.targets, impl=impl, stash_bytes=10**9)
    first = torch.autograd.grad(logp.sum(), weight, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(logp.sum(), weight)[0])


def test_nothing_is_stashed_under_no_grad(kit, monkeypatch):
    from or1_kernels.engine import chunked

    kept = []
    original = chunked.Engine.logits
    spy = lambda self, h, keep=False: kept.append(keep) or original(self, h, keep)  # noqa: E731
    monkeypatch.setattr(chunked.Engine, "logits", spy)
    case = kit.make_case(20, 8, 31)
    with torch.no_grad():
        linear_logprob_entropy(case.hidden, case.weight.requires_grad_(), case.targets, stash_bytes=10**9)
    assert kept and not any(kept)


@pytest.mark.parametrize("how", ["live", "index"])
def test_skipped_rows_change_nothing_and_may_hold_anything(kit, impl, how):
    case = kit.make_case(70, 16, 101)
    live = case.options["token_weight"] != 0
    assert 0 < live.sum() < 70
    want = kit.policy(case, impl=impl)
    dirty = case.hidden.clone()
    dirty[~live] = torch.nan
    hidden, weight = dirty.requires_grad_(), case.weight.requires_grad_()
    rows = "live" if how == "live" else live.nonzero()[:, 0]
    loss, stats = linear_policy_loss(
        hidden, weight, case.targets, case.advantages, impl=impl, rows=rows, **case.options
    )
    loss.backward()
    torch.testing.assert_close(loss, want.loss)
    torch.testing.assert_close(weight.grad, want.dweight, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(hidden.grad[live], want.dhidden[live], rtol=1e-5, atol=1e-8)
    assert not hidden.grad[~live].any() and not stats.logp[~live].any()
    torch.testing.assert_close(stats.logp[live], want.logp[live], rtol=1e-5, atol=1e-6)


def test_no_live_row_at_all(kit, impl):
    case = kit.make_case(5, 8, 11).with_options(token_weight=torch.zeros(5))
    mine = kit.policy(case, impl=impl, rows="live")
    assert mine.loss.item() == 0 and not mine.dweight.any() and not mine.dhidden.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_collects_in_fp32_over_micro_batches(kit, impl, dtype):
    case = kit.make_case(40, 16, 101, dtype=dtype)
    main = torch.full((101, 16), 0.25)
    for part in (slice(0, 17), slice(17, 40)):
        mine = kit.policy(case.rows(part), impl=impl, main_grad=main)
        assert mine.dweight is None and mine.dhidden is not None
    truth = kit.plain(case.to(torch.float64)).dweight
    torch.testing.assert_close(main.double() - 0.25, truth, rtol=1e-4, atol=1e-7)


def test_main_grad_of_the_scores_is_collected_in_backward(kit, impl):
    case = kit.make_case(40, 16, 101)
    upstream = (torch.linspace(-1, 1, 40), torch.zeros(40))
    main = torch.zeros(101, 16)
    mine = kit.score(case, upstream, impl=impl, main_grad=main)
    assert mine.dweight is None
    assert torch.equal(main, kit.score(case, upstream, impl=impl).dweight)


def test_main_grad_refuses_a_scaled_loss(kit):
    case = kit.make_case(4, 8, 11)
    loss, _ = linear_policy_loss(
        case.hidden,
        case.weight.requires_grad_(),
        case.targets,
        case.advantages,
        main_grad=torch.zeros(11, 8),
        **case.options,
    )
    with pytest.raises(RuntimeError, match="token_weight"):
        (loss * 2).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lean_preset_is_as_exact_as_plain_torch(kit, impl, dtype):
    case = kit.make_case(127, 32, 501, dtype=dtype)
    mine = kit.policy(case, impl=impl, preset="lean", chunk_rows=64)
    kit.assert_as_exact(mine, kit.plain(case), kit.plain(case.to(torch.float64)))
    assert mine.dweight.dtype == dtype


@pytest.mark.parametrize("preset", ["fast", "lean"])
def test_bf16_instructions_with_a_residual_are_as_exact_as_fp32(kit, impl, monkeypatch, preset):
    # The path is taken from a size on that tests do not reach; its arithmetic works on any CPU.
    monkeypatch.setattr(gemms, "choose", lambda weight, num_rows: gemms.Residual())
    case = kit.make_case(200, 64, 1031, dtype=torch.bfloat16)
    mine = kit.policy(case, impl=impl, chunk_rows=64, preset=preset)
    truth = kit.plain(case.to(torch.float64))
    kit.assert_as_exact(mine, kit.plain(case), truth)
    # Logits here reach 20, and 2^-17 of that is 1.5e-4; one bf16 GEMM alone is off by up to 0.06.
    assert (mine.logp.double() - truth.logp).abs().max() < 3e-4


def test_gemms_follow_dtype_and_size(monkeypatch):
    monkeypatch.setattr(gemms, "_has_bf16_cpu", lambda: True)
    monkeypatch.setattr(host, "has_wide_product", lambda: False)
    big = torch.empty(1 << 15, 1 << 10, dtype=torch.bfloat16, device="meta")
    for dtype, want in (
        (torch.bfloat16, gemms.Residual()),
        (torch.float32, gemms.Upcast(torch.float32)),
        (torch.float16, gemms.Upcast(torch.float32)),
        (torch.float64, gemms.Upcast(torch.float64)),
    ):
        assert gemms.choose(big.to(dtype), 64) == want
    assert gemms.choose(big, 63) == gemms.Upcast(torch.float32)
    monkeypatch.setattr(host, "has_wide_product", lambda: True)
    assert gemms.choose(big, 64) == gemms.HostWideOut()
    assert gemms.choose(big, 63) == gemms.Upcast(torch.float32)
    monkeypatch.setattr(gemms, "_has_bf16_cpu", lambda: False)
    assert gemms.choose(big, 64) == gemms.Upcast(torch.float32)


def certain_case(kit):
    """Half of the rows nearly certain, as most tokens of a trained policy are."""
    case = kit.make_case(80, 16, 101)
    hidden = case.hidden.clone()
    hidden[::2] *= 6
    targets = (hidden @ case.weight.T).argmax(1)
    return kit.make_case(80, 16, 101).__class__(hidden, case.weight, targets, case.advantages, case.options)


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.05])
def test_dropped_rows_stay_within_the_reported_bound(kit, impl, eps):
    case = certain_case(kit).with_options(temperature=torch.linspace(0.5, 2, 80))
    want = kit.policy(case.to(torch.float64))
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss, stats = linear_policy_loss(
        hidden, weight, case.targets, case.advantages, impl=impl, grad_row_eps=eps, **case.options
    )
    loss.backward()
    missing = (weight.grad.double() - want.dweight).abs().sum()
    rounding = 1e-5 * want.dweight.abs().sum()
    assert missing <= stats.left_out * hidden.detach().abs().sum(1).max() + rounding
    dropped = (hidden.grad == 0).all(1) & (case.options["token_weight"] != 0)
    assert dropped.sum() > 0 and stats.left_out > 0
    row_bound = eps * case.options["token_weight"] * 2 / case.options["temperature"] * weight.detach().abs().max()
    assert ((hidden.grad.double() - want.dhidden).abs().amax(1)[dropped] <= row_bound[dropped]).all()
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-5, atol=1e-6)


def test_eps_zero_drops_exactly_the_rows_without_gradient(kit, impl):
    case = kit.make_case(60, 16, 101).with_options(entropy_coef=0.0)
    want = kit.policy(case, impl=impl)
    got = kit.policy(case, impl=impl, grad_row_eps=0.0)
    assert want.clipped.any() and (case.options["token_weight"] == 0).any()
    torch.testing.assert_close(got.dweight, want.dweight, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got.dhidden, want.dhidden, rtol=1e-5, atol=1e-8)


def test_eps_that_drops_no_row_changes_no_bit(kit, impl):
    case = kit.make_case(40, 16, 101).with_options(token_weight=torch.full((40,), 0.025), old_logp=None)
    want, got = kit.policy(case, impl=impl), kit.policy(case, impl=impl, grad_row_eps=0.0)
    assert want.dhidden.any(1).all(), "every row has a gradient"
    if impl != "triton":  # Its policy loss takes another pass without grad_row_eps.
        assert torch.equal(got.dweight, want.dweight) and torch.equal(got.dhidden, want.dhidden)
    torch.testing.assert_close(got.dweight, want.dweight, rtol=1e-5, atol=1e-8)


def test_a_batch_whose_rows_are_all_dropped_has_no_gradient(kit, impl):
    case = kit.make_case(40, 16, 101)
    want, got = kit.policy(case, impl=impl), kit.policy(case, impl=impl, grad_row_eps=1e9)
    assert not got.dweight.any() and not got.dhidden.any()
    torch.testing.assert_close(got.loss, want.loss)


def test_a_nan_row_is_never_dropped(kit, impl):
    case = kit.make_case(6, 8, 11)
    case.hidden[2] = torch.nan
    assert kit.policy(case, impl=impl, grad_row_eps=1e9).dweight.isnan().any()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"preset": "small"}, "preset"),
        ({"stash_bytes": -1}, "stash_bytes"),
        ({"grad_row_eps": -1.0}, "grad_row_eps"),
        ({"impl": "reference", "grad_row_eps": 0.1}, "grad_row_eps"),
        ({"logit_scale": 0.0}, "logit_scale"),
    ],
)
def test_options_out_of_range_are_named(options, word):
    with pytest.raises(ValueError, match=f"{word} is"):
        HeadOptions(**options)


def test_main_grad_of_the_wrong_kind_is_refused(kit):
    case = kit.make_case(4, 8, 11)
    with pytest.raises(ValueError, match=r"main_grad is torch\.float64"):
        kit.policy(case, main_grad=torch.zeros(11, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match="tempreature"):
        kit.policy(case, tempreature=0.5)
    with pytest.raises(ValueError, match="'dead'"):
        kit.policy(case, rows="dead", objective=PolicyObjective())


def test_an_unknown_option_names_the_nearest(kit):
    case = kit.make_case(4, 8, 11)
    for call in (linear_logprob_entropy, linear_policy_loss):
        arguments = (case.hidden, case.weight, case.targets, *([torch.ones(4)] if call is linear_policy_loss else []))
        given = {"token_weight": torch.ones(4)} if call is linear_policy_loss else {}
        with pytest.raises(TypeError, match="'temprature' is not an option of the head; did you mean 'temperature'"):
            call(*arguments, **given, temprature=0.5)


def test_an_objective_may_be_the_name_of_its_kind(kit):
    case = kit.make_case(4, 8, 11)
    rest = (case.hidden, case.weight, case.targets, torch.ones(4))
    given = {"token_weight": torch.ones(4), "old_logp": torch.full((4,), -2.0)}
    named, _ = linear_policy_loss(*rest, **given, objective="cispo")
    assert torch.equal(named, linear_policy_loss(*rest, **given, objective=PolicyObjective(kind="cispo"))[0])
    with pytest.raises(ValueError, match=r"objective\.kind is 'cipso'; it must be one of"):
        linear_policy_loss(*rest, **given, objective="cipso")
    with pytest.raises(TypeError, match="objective is 3, a int; pass a PolicyObjective"):
        linear_policy_loss(*rest, **given, objective=3)


def test_a_product_with_a_view_of_wider_rows_reads_nothing_behind_them():
    wide = torch.full((64, 2 * 1031 + 2), float("nan"), dtype=torch.bfloat16)
    narrow, weight = wide[:, :1031], torch.randn(1031, 64).to(torch.bfloat16)
    narrow.copy_(torch.randn(64, 1031))
    before = narrow.clone()
    gemms.zero_behind_rows(narrow)
    assert torch.equal(narrow, before) and torch.isnan(wide[:, -1]).all()
    assert torch.isfinite(narrow @ weight).all()
