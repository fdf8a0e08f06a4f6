"""Where the tensors of a step lie on a GPU, seen without one: torch's fake tensors have a device, but no memory.

Weights are loaded and steps are run as on CUDA. An operation that is given tensors of two devices raises, and so does a
kernel here; what a kernel would compute is left out.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from spillway.kernels import dispatch, ops
from spillway.kernels.tuning import gpu
from spillway.kernels.tuning.ahead import H200
from spillway.node_agent.checkpoint import Checkpoint, WeightReader
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.weights import LoadOptions
from spillway.node_agent.plan import StepPlan, Work
from spillway.node_agent.rank import Rank

CUDA = torch.device("cuda", 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were started, each with tensors of the GPU alone."""
    names: list[str] = []

    def launch(kernel: Any, _grid: object, _on: object, *arguments: object, **_options: object) -> None:
        devices = {each.device for each in arguments if isinstance(each, torch.Tensor)}
        assert devices == {CUDA}, f"{kernel.__name__} is given tensors on {devices}"
        names.append(kernel.__name__)

    for module in pkgutil.iter_modules(ops.__path__):
        op = importlib.import_module(f"{ops.__name__}.{module.name}")
        if hasattr(op, "launch") and module.name != "launch":
            monkeypatch.setattr(op, "launch", launch)
    monkeypatch.setattr(gpu, "_real_gpu", lambda _device: H200)
    monkeypatch.setitem(dispatch._modules, "cuda", ops)
    read = WeightReader.view

    def read_in_earnest(self: WeightReader, name: str) -> torch.Tensor:
        with unset_fake_temporarily():
            return read(self, name)

    monkeypatch.setattr(WeightReader, "view", read_in_earnest)
    return names


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_of_a_step_is_on_the_gpu(
    tiny_checkpoint: Callable[..., Path], launched: list[str], family: str, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    spec = checkpoint.spec
    prompt = Work(list(range(40)), 0, [0, 1, 2], sample=True)
    early = Work(list(range(16)), 0, [3], sample=False)
    token = Work([7], 40, [0, 1, 2], sample=True)
    far = Work([7], 300, list(range(19)), sample=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = Decoder.load(checkpoint, LoadOptions(torch.device("cuda"), dtype))
        pool = torch.zeros(32, spec.layers, 2, spec.kv_heads, 16, spec.head_dim, dtype=dtype, device="cuda")
        rank = Rank(decoder, pool, None)
        for plan, rows in (
            (StepPlan(prefills=[prompt]), 1),
            (StepPlan(prefills=[early]), 0),
            (StepPlan(decodes=[token], prefills=[early, prompt]), 2),
            (StepPlan(decodes=[token, far], copies=[(1, 20), (2, 21)]), 2),
        ):
            logits = rank.run(plan).logits
            assert logits is not None
            assert (tuple(logits.shape), logits.dtype, logits.device) == ((rows, spec.vocab), torch.float32, CUDA)
    assert {"_flash_prefill_kernel", "_paged_decode_kernel", "_merge_spans_kernel", "_move_blocks_kernel"} < set(
        launched
    )
