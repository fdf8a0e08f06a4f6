"""Attention over two sets of keys from the attention over each."""

from spillway.kernels.cpu.block_layout import (
    A_LSE,
    A_LSE_STRIDE,
    A_STRIDE,
    B_LSE,
    B_LSE_STRIDE,
    B_STRIDE,
    FORMAT,
    HEAD_DIM,
    HEADS,
    OUT,
    OUT_LSE,
    OUT_LSE_STRIDE,
    OUT_STRIDE,
    ROWS,
    A,
    B,
)
from spillway.kernels.cpu.formats import ITEM_BYTES
from spillway.kernels.cpu.jit.emit import microkernel
from spillway.kernels.cpu.jit.formats import FLOATS, load_float, store_float
from spillway.kernels.cpu.jit.scalars import exp2, fetch_add, load_float32, log_sum, store_float32
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import arg, item_bytes
from spillway.kernels.cpu.launch import TICKET

LOG2_E = 1.4426950408889634
NO_KEYS = float("-inf")


@microkernel("viiiffii")
def mix_row(e, number_format, a, b, weight_a, weight_b, channels, out):
    """out = a * weight_a + b * weight_b; a side of weight 0 is ignored, whatever it holds."""

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            for lanes, start, stop in e.split(channels):
                with e.loop(start, stop, lanes) as i:
                    parts = []
                    for source, weight in ((a, weight_a), (b, weight_b)):
                        value = load_float(e, e.at(source, i, item), kind, lanes)
                        weights = e.splat(weight, lanes)
                        unused = e.b.fcmp_ordered("==", weights, e.const(value, 0.0))
                        parts.append(e.b.select(unused, e.const(value, 0.0), e.b.fmul(value, weights)))
                    store_float(e, e.b.fadd(*parts), e.at(out, i, item), kind)

        return write

    e.switch(number_format, [case(kind) for kind in FLOATS])


@device
def merge_head(args: int, row: int, head: int) -> None:
    """One head of one row."""
    number_format, channels = arg(args, FORMAT), arg(args, HEAD_DIM)
    lse_a = load_float32(arg(args, A_LSE) + row * arg(args, A_LSE_STRIDE) + 4 * head)
    lse_b = load_float32(arg(args, B_LSE) + row * arg(args, B_LSE_STRIDE) + 4 * head)
    largest = lse_a if lse_a > lse_b else lse_b
    weight_a, weight_b, total = 0.0, 0.0, 0.0
    lse = NO_KEYS
    if largest > NO_KEYS:
        weight_a, weight_b = exp2((lse_a - largest) * LOG2_E), exp2((lse_b - largest) * LOG2_E)
        total = weight_a + weight_b
        weight_a, weight_b = weight_a / total, weight_b / total
        lse = largest + log_sum(0.0, total)
    place = head * channels * item_bytes(number_format)
    mix_row(
        number_format,
        arg(args, A) + row * arg(args, A_STRIDE) + place,
        arg(args, B) + row * arg(args, B_STRIDE) + place,
        weight_a,
        weight_b,
        channels,
        arg(args, OUT) + row * arg(args, OUT_STRIDE) + place,
    )
    store_float32(arg(args, OUT_LSE) + row * arg(args, OUT_LSE_STRIDE) + 4 * head, lse)


@device
def merge_states(args: int) -> None:
    """Take rows until none is left."""
    row = fetch_add(args + 8 * TICKET, 1)
    while row < arg(args, ROWS):
        for head in range(arg(args, HEADS)):
            merge_head(args, row, head)
        row = fetch_add(args + 8 * TICKET, 1)
