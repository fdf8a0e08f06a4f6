"""A worker process without a model: leases lines over a real socket and answers each as it always would be answered.

Sometimes it vanishes with its lines, returns them, fails them, or says everything twice. For tests that kill it.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import grpc
from service_clients import body_of

from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc

FINAL = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}


class NullWorker:
    """One connection to a gateway, whichever of them answers."""

    def __init__(self, target: str, seed: int, most_lines: int, pause_s: float) -> None:
        self.dice, self.most_lines, self.pause_s = random.Random(seed), most_lines, pause_s
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(
            grpc.insecure_channel(target, [*options, ("grpc.max_receive_message_length", 64 << 20)])
        )
        self.name = f"null-{seed}"

    def forever(self) -> None:
        while True:
            leased = self.insist("Lease", self.lease_request())
            if leased is not None and leased.lines:
                self.work(leased)
            time.sleep(self.dice.uniform(0, self.pause_s))  # so that a run lasts long enough to be disturbed

    def lease_request(self) -> worker_pb2.LeaseRequest:
        count = self.dice.randint(1, self.most_lines)
        return worker_pb2.LeaseRequest(worker=self.name, model="m", max_lines=count, wait={"seconds": 1})

    def work(self, leased: worker_pb2.LeaseResponse) -> None:
        fate, job = self.dice.random(), leased.lines[0].job
        if fate < 0.03:
            return
        if fate < 0.06:
            self.insist("Return", worker_pb2.ReturnRequest(leases=[leased.lease]))
            return
        if fate < 0.08:
            failures = [{"index": line.index, "code": "internal_error", "retryable": True} for line in leased.lines]
            self.insist("Fail", worker_pb2.FailRequest(job=job, lease=leased.lease, failures=failures))
            return
        results = [worker_pb2.CompleteRequest.Result(index=line.index, body=body_of(line)) for line in leased.lines]
        done = worker_pb2.CompleteRequest(job=job, lease=leased.lease, results=results)
        self.insist("Complete", done)
        if fate < 0.15:
            self.insist("Complete", done)

    def insist(self, method: str, request: Any) -> Any:
        """Repeats a call while the gateway is away, as an agent does."""
        while True:
            try:
                return getattr(self.stub, method)(request, timeout=10)
            except grpc.RpcError as error:
                if error.code() in FINAL:
                    return None
                time.sleep(0.1)


if __name__ == "__main__":
    NullWorker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])).forever()
