"""Times of work on a GPU: graph replays between events, so that neither launches nor the host's clock are in them."""

import statistics
from collections.abc import Callable, Sequence

import torch

_ENOUGH_MS = 60.0
_SAMPLES = 7


def graph_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median milliseconds of one call, over replays of a graph that makes each of ``calls`` in turn.

    Give several calls on different data where the data of one would stay in the L2 cache.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own lack
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, allocates, warms up: none of it may happen under capture
        for call in [*calls, calls[0]]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median_ms(graph.replay) / len(calls)


def event_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call that cannot be captured; launch gaps are in it."""
    call()
    return _median_ms(call)


def _median_ms(run: Callable[[], object]) -> float:
    run()
    once = _between(run, 1)
    repeats = max(1, round(_ENOUGH_MS / max(once, 1e-3) / _SAMPLES))
    return statistics.median(_between(run, repeats) / repeats for _ in range(_SAMPLES))


def _between(run: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own lack
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))
