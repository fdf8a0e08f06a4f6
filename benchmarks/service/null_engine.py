"""An agent without a model: leases lines and answers each at once, with several calls under way.

    python benchmarks/service/null_engine.py ADDRESS LEASE_LINES

Ends when there has been nothing to lease for two seconds after it had some; prints the times of its calls as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc

from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc

UNDER_WAY = 2
ANSWER = (
    b'{"id":"%b","object":"text_completion","created":%d,"model":"m","choices":[{"text":"a short answer, as '
    b'classifiers give them","index":0,"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":50,'
    b'"completion_tokens":8,"total_tokens":58},"system_fingerprint":null}'
)


def answers(leased: worker_pb2.LeaseResponse) -> worker_pb2.CompleteRequest:
    """What completes a lease."""
    results = [
        worker_pb2.CompleteRequest.Result(index=line.index, body=ANSWER % (line.response_id.encode(), line.created))
        for line in leased.lines
    ]
    return worker_pb2.CompleteRequest(job=leased.lines[0].job, lease=leased.lease, results=results)


async def work(stub: Any, name: str, lease_lines: int, times: dict[str, list[float]]) -> tuple[int, float]:
    """Leases and completes until there is nothing left; how many lines, and when the last was done (monotonic)."""
    done, done_s = 0, 0.0
    while True:
        request = worker_pb2.LeaseRequest(worker=name, model="m", max_lines=lease_lines, wait={"seconds": 2})
        started_s = time.perf_counter()
        leased = await stub.Lease(request)
        if not leased.lines:
            if done:
                return done, done_s
            continue
        times["lease"].append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        done += (await stub.Complete(answers(leased))).accepted
        times["complete"].append(time.perf_counter() - started_s)
        done_s = time.monotonic()


async def main() -> None:
    address, lease_lines = sys.argv[1], int(sys.argv[2])
    times: dict[str, list[float]] = {"lease": [], "complete": []}
    async with grpc.aio.insecure_channel(address, [("grpc.max_receive_message_length", 64 << 20)]) as channel:
        stub: Any = worker_pb2_grpc.WorkerServiceStub(channel)
        workers = [work(stub, f"null-{number}", lease_lines, times) for number in range(UNDER_WAY)]
        done = await asyncio.gather(*workers)
    lines, last_s = sum(each for each, _ in done), max(at_s for _, at_s in done)
    print(json.dumps({"lines": lines, "done_s": last_s, "times_s": times}))


if __name__ == "__main__":
    asyncio.run(main())
