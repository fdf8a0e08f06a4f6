"""Copy-on-write: whole blocks within the pool."""

from torch import Tensor

from spillway.kernels.errors import KernelShapeError
from spillway.kernels.ops.gather_blocks import move_blocks


def copy_blocks(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """See `spillway.kernels.copy_blocks`."""
    if src.shape != dst.shape:
        raise KernelShapeError(f"{tuple(src.shape)} sources for {tuple(dst.shape)} destinations")
    move_blocks(pool, dst, pool, src)
