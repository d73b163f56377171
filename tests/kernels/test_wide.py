"""What the head does for the GEMMs of a GPU, on a CPU: chunk sizes, the first chunk, fp16 in a unit, switches."""

from dataclasses import dataclass

import pytest
import torch

from or1_kernels.engine import wide

CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Emulated(wide.Wide):
    """The same products with torch's CPU GEMMs: 2-byte operands, fp32 sums."""

    def logits(self, hidden_CH, weight_VH, out_CV):
        out_CV.copy_(hidden_CH.float() @ weight_VH.float().T)

    def wide_mm(self, draw_CV, weight_VH):
        return draw_CV.float() @ weight_VH.float()

    def set_dweight(self, draw_CV, hidden_CH, dweight_VH):
        assert draw_CV.dtype == hidden_CH.dtype == self.operand
        dweight_VH.copy_(draw_CV.T.float() @ hidden_CH.float())

    def add_dweight(self, draw_CV, hidden_CH, dweight_VH):
        assert draw_CV.dtype == hidden_CH.dtype == self.operand
        dweight_VH += draw_CV.T.float() @ hidden_CH.float()


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("tokens", [1, 1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_exact_however_many_tokens_share_the_loss(kit, impl, monkeypatch, dtype, tokens, main_grad):
    monkeypatch.setattr(wide, "choose", lambda weight, num_rows: Emulated(operand=weight.dtype))
    case = kit.make_case(50, 16, 101, dtype=dtype)
    scaled = case.with_options(token_weight=case.options["token_weight"] / tokens)
    main = torch.full((101, 16), 0.5) if main_grad else None
    kernel = (
        kit.policy(scaled, impl=impl, chunk_rows=16, main_grad=main)
        if main_grad
        else kit.policy(scaled, impl=impl, chunk_rows=16)
    )
    truth = kit.plain(scaled.to(torch.float64))
    dweight = main - 0.5 if main_grad else kernel.dweight
    # The rounding of a result that is returned in fp16 is the caller's, who scales the loss; main_grad has none.
    tiny = 1e-7 if dtype == torch.float16 or main_grad else 0
    assert (dweight - truth.dweight).abs().max() <= 0.02 * truth.dweight.abs().max() + tiny
    assert (kernel.dhidden - truth.dhidden).abs().max() <= 0.02 * truth.dhidden.abs().max() + tiny


def test_a_loss_scale_brings_fp16_gradients_back(kit, monkeypatch):
    """The gradient is fp32 until backward multiplies it by the loss scale."""
    from or1_kernels import linear_policy_loss

    monkeypatch.setattr(wide, "choose", lambda weight, num_rows: Emulated(operand=weight.dtype))
    case = kit.make_case(50, 16, 101, dtype=torch.float16)
    options = case.options | {"token_weight": case.options["token_weight"] * 2**-20}
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss, _ = linear_policy_loss(hidden, weight, case.targets, case.advantages, **options)
    (loss * 2**20).backward()
    truth = kit.plain(case.to(torch.float64))
    assert (weight.grad - truth.dweight).abs().max() <= 2e-3 * truth.dweight.abs().max()
    assert (hidden.grad - truth.dhidden).abs().max() <= 2e-3 * truth.dhidden.abs().max()


@pytest.mark.parametrize("slopes", [[0.0, 0.0], [3e-7, -5.0], [1e30], []])
def test_the_unit_is_a_power_of_two_at_the_largest_slope(slopes):
    unit, largest = wide.unit_of(torch.tensor(slopes)), max((abs(x) for x in slopes), default=0.0)
    assert torch.frexp(unit).mantissa == 0.5
    assert unit == 1 if largest == 0 else 0.5 <= largest / unit <= 1


@pytest.mark.parametrize("rows", [1, 127, 128, 5000, 32_768, 131_072])
@pytest.mark.parametrize(("vocab", "width"), [(160, 8), (50_257, 768), (152_064, 3584), (151_936, 1536)])
def test_chunks_are_whole_tiles_and_fit_the_memory(monkeypatch, vocab, width, rows):
    monkeypatch.setattr(wide, "_machine", lambda device: (132, 80 << 30))
    size = wide.chunk_rows(rows, (vocab, width), "fast", CUDA)
    assert size % 128 == 0 and 128 <= size <= 8192
    assert size == 128 or size * vocab * 4 <= (80 << 30) // 16
    assert wide.chunk_rows(rows, (vocab, width), "lean", CUDA) <= 1024


def test_7b_fills_its_waves(monkeypatch):
    """8192 rows are 64 x 14 tiles, 6.8 waves of 132; 4096 rows are 3.4 waves and cost 4."""
    monkeypatch.setattr(wide, "_machine", lambda device: (132, 141 << 30))
    assert wide.chunk_rows(32_768, (152_064, 3584), "fast", CUDA) == 8192
    monkeypatch.setattr(wide, "_machine", lambda device: (132, 24 << 30))
    assert wide.chunk_rows(32_768, (152_064, 3584), "fast", CUDA) <= 2560


@pytest.mark.parametrize("before", [True, False])
def test_partial_sums_are_fp32_inside_and_as_before_outside(before):
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    saved = [getattr(matmul, name) for name in names]
    try:
        for name in names:
            setattr(matmul, name, before)
        with pytest.raises(RuntimeError, match="inside"), wide.fp32_sums():
            assert not any(getattr(matmul, name) for name in names)
            raise RuntimeError("inside")
        assert all(getattr(matmul, name) is before for name in names)
    finally:
        for name, value in zip(names, saved, strict=True):
            setattr(matmul, name, value)
