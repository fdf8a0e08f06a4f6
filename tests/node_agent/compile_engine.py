"""Compiles, for a GPU that is not here, every kernel that the engine launches, with the engine's own arguments.

``python compile_engine.py CHECKPOINT DTYPE`` prints a line a kernel: its name, and what keeps it from that GPU, if
anything. A process of its own, because Triton must not interpret in it. Tensors are on the CPU and kernels are compiled
rather than run, so numbers mean nothing; shapes, strides, dtypes and constants are those of a run on CUDA.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from spillway.kernels import dispatch, ops
from spillway.kernels.tuning.ahead import H200, compiling, resources_of
from spillway.node_agent.batch import StepBatch
from spillway.node_agent.block_moves import StagedMoves
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.graphs import StepInputs
from spillway.node_agent.load import DTYPES
from spillway.node_agent.models import decoder as decoder_module
from spillway.node_agent.models import weights as weights_module
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.linear import DenseLinear, GatedLinear, Linear
from spillway.node_agent.models.weights import LoadOptions
from spillway.node_agent.plan import StepPlan, Work
from spillway.node_agent.rank import build_batch
from spillway.node_agent.request import Request, SamplingParams, Sequence
from spillway.node_agent.sampler import Sampler

BLOCK_TOKENS = 16


def linear_as_on_cuda(weight: Tensor, bias: Tensor | None, _dtype: torch.dtype, *, gated: bool = False) -> Linear:
    linear = DenseLinear(weight, bias)
    return GatedLinear(linear) if gated else linear


def pretend_cuda() -> None:
    """Have CPU tensors take the way of CUDA tensors."""
    dispatch._modules["cpu"] = ops
    dispatch._FORCED = "triton"
    for module in (decoder_module, weights_module):
        module.compute_dtype = lambda _device, dtype: dtype
    weights_module.make_linear = linear_as_on_cuda


def steps() -> list[StepBatch]:
    """A prefill, a prefill beside decodes, decodes alone, and decodes as a graph has them."""
    prompt = Work(list(range(40)), 0, [0, 1, 2], sample=True)
    token = Work([7], 40, [0, 1, 2], sample=True)
    other = Work([7], 300, list(range(19)), sample=True)
    decodes = build_batch(StepPlan(decodes=[token, other, token]), BLOCK_TOKENS)
    inputs = StepInputs(rows=4, width=64, device=torch.device("cpu"))
    return [
        build_batch(StepPlan(prefills=[prompt]), BLOCK_TOKENS),
        build_batch(StepPlan(decodes=[token], prefills=[prompt]), BLOCK_TOKENS),
        decodes,
        inputs.batch(inputs.fill(decodes)),
    ]


def main() -> None:
    checkpoint, dtype = Checkpoint.open(Path(sys.argv[1])), DTYPES[sys.argv[2]]
    pretend_cuda()
    decoder = Decoder.load(checkpoint, LoadOptions(torch.device("cpu"), dtype))
    spec = checkpoint.spec
    pool = torch.zeros(32, spec.layers, 2, spec.kv_heads, BLOCK_TOKENS, spec.head_dim, dtype=dtype)
    drawn = [Sequence(Request(0, (5,), SamplingParams(9, top_p=0.9), 0), 0, [5]) for _ in range(3)]
    with compiling(H200) as kernels:
        for batch in steps():
            decoder.forward(batch, pool)
        ops.copy_blocks(pool, torch.tensor([1]), torch.tensor([2]))
        moves = StagedMoves(pool)
        device, _ = moves._first(3)
        ops.gather_blocks(pool, moves._ids([4, 1, 2]), device)
        ops.scatter_blocks(pool, moves._ids([4, 1, 2]), device)
        logits = torch.randn(3, spec.vocab)
        Sampler(frozenset()).sample(logits, drawn)
    for name, kernel in {(kernel.metadata.name, kernel.hash): kernel for kernel in kernels}.items():
        print(name[0], resources_of(kernel).problem(H200) or "fits")


if __name__ == "__main__":
    main()
