"""GEMM 1 by QuACK (Hopper, Blackwell) with the epilogue of `exp_gemm`: E in bf16 and two sums a tile.

Needs quack-kernels and nvidia-cutlass-dsl (extra `quack`), so only `rows.choose` imports this module, when asked to.
QuACK composes an epilogue from operators: a value of each row (`ColVecLoad`), a sum over the columns of a tile
(`ColVecReduce`), and one column of each row (`ColVecSelect`).

Legend: C rows of a chunk, H hidden, V vocab.
"""

from functools import cache

from quack.cute_dsl_utils import get_device_capacity
from quack.epilogue import gemm_epilogue
from quack.epilogue.math import pexp2
from quack.epilogue.ops import ColVecLoad, ColVecReduce, ColVecSelect
from quack.gemm_config import GemmConfig
from torch import Tensor

from ..rows import triton_far
from .exp_gemm import ExpRows, FarRows, Partials

# Compute capabilities by their first number: the GEMMs of QuACK that this module has a tile for.
MAJORS = (9, 10)
# In the order of preference. A partial sum would count the empty columns of a broken tile, so one must divide V.
_TILES = {9: (192, 256, 128), 10: (256, 192, 128)}
# TMA moves 16 bytes at a time.
_ALIGNED = 8

_targets = ColVecLoad("targets")


@gemm_epilogue(
    # Pinned, because a square product would leave open whether a vector belongs to rows or columns.
    ops={"rate": ColVecLoad("rate"), "shift": ColVecLoad("shift")},
    reduces={"sums": ColVecReduce("sums"), "moments": ColVecReduce("moments", scaled=True)},
    outs={"own": ColVecSelect("own", idx_op=_targets)},
    extra_ops=(_targets,),
)
def exp_epilogue(acc, rate, shift):
    """Return E of an element of the product, its parts of the sums, and E again, which is stored for the target."""
    d = acc * rate - shift
    e = pexp2(d)
    return {"D": e, "sums": e, "moments": (e, d), "own": e}


@cache
def config(major: int, vocab: int) -> GemmConfig:
    """Return the tiles for a compute capability and a vocabulary that `QuackGemm.why_not` accepts."""
    tile_n = next(n for n in _TILES[major] if vocab % n == 0)
    if major == 9:
        # Two warp groups that alternate hide the epilogue, and their accumulators fit the registers up to 208 columns.
        return GemmConfig(tile_m=128, tile_n=tile_n, pingpong=tile_n <= 208, is_dynamic_persistent=False)
    return GemmConfig(tile_m=256, tile_n=tile_n, pingpong=False, is_dynamic_persistent=True, device_capacity=major)


def arguments(rows: ExpRows, e_CV: Tensor, tile_n: int) -> tuple[dict[str, Tensor], Partials]:
    """Return the epilogue's operands by name, and those of them that it writes."""
    count, vocab = e_CV.shape
    new = rows.rate_C.new_empty
    out = Partials(new(count, vocab // tile_n), new(count, vocab // tile_n), new(count))
    given = {"rate": rows.rate_C[None], "shift": rows.shift_C[None], "targets": rows.targets_C}
    return given | {"sums": out.sums_CT, "moments": out.moments_CT, "own": out.own_C}, out


class QuackGemm:
    """An `exp_gemm.ExpGemm` on a GPU of compute capability 9.x or 10.x."""

    def why_not(self, weight_VH: Tensor) -> str | None:
        """Return the reason why it cannot multiply with this weight, None if it can."""
        vocab, width = weight_VH.shape
        if weight_VH.stride() != (width, 1):
            return "the weight is not contiguous"
        if vocab % _TILES[9][-1] or width % _ALIGNED:
            return (
                f"the weight is {vocab} x {width}; QuACK's GEMM needs a vocabulary of a multiple of {_TILES[9][-1]} "
                f"and a hidden size of a multiple of {_ALIGNED}"
            )
        return None

    def product(self, rows: ExpRows, weight_VH: Tensor, e_CV: Tensor) -> Partials:
        """Write bf16 E to e_CV and return the partial sums. The first call of a shape compiles for some seconds."""
        chosen = config(get_device_capacity(e_CV.device)[0], e_CV.shape[1])
        operands, out = arguments(rows, e_CV, chosen.tile_n)
        exp_epilogue(rows.hidden_CH, weight_VH.mT, out={"D": e_CV}, config=chosen, tuned=False, **operands)
        return out

    def redo(self, rows: ExpRows, weight_VH: Tensor, far: FarRows) -> None:
        """Compute the rows where `far.far_C` is true again, in place."""
        triton_far.redo(*rows[:3], weight_VH, far)
