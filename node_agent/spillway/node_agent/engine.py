"""The engine: requests in, finished requests out, one step at a time. ``schedule → run → postprocess``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from spillway.kvstore import BlockStore, JobPlan, StoreStats
from spillway.node_agent.detokenize import TextTail
from spillway.node_agent.graphs import GraphStats
from spillway.node_agent.rank import Rank
from spillway.node_agent.request import Finish, Request, RequestOutput, Sequence
from spillway.node_agent.sampler import Sampled, Sampler
from spillway.node_agent.scheduler import Scheduler, SchedulerStats, Step
from spillway.node_agent.tokenizer import Tokenizer

WINDOW_TOKENS = 1 << 17, 1 << 19
"""How many tokens of prompts the engine wants to know ahead, at least and at most: what the tiers keep is planned over
them. Enough to see which lines share a prefix; not more than some tens of MiB of tokens and names, however large the
tiers are."""
CLOSE_BLOCKS = 64
"""Handed to the store at a time when it closes: it has some time for each batch to make room."""


class Phase(Enum):
    """How far a request has come."""

    WAITING = "nothing was run of it"
    PREFILL = "its prompt is run"
    DECODE = "it has a token, or is done"


class FailureKind(Enum):
    """Why a request that began can have no answer."""

    NOT_FINITE = "the model gave logits that are not finite numbers"
    KV_CAPACITY = "the sequence grew beyond what the device pool holds"


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request that ended without an answer."""

    request: Request
    kind: FailureKind


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot: the scheduler's counters, the store's, how the device pool is used now, and CUDA graphs if any."""

    scheduler: SchedulerStats
    store: StoreStats | None
    generated_tokens: int
    pool_blocks: int
    pool_used: int
    pool_cached: int
    graphs: GraphStats | None = None


@dataclass(slots=True)
class _Pending:
    """The sequences of one request, and the open ends of their texts where stop strings are watched for."""

    sequences: list[Sequence]
    tails: list[TextTail | None] = field(default_factory=list)
    done: int = 0


class Engine:
    """One shard group of one rank. Not thread-safe: one thread calls ``add`` and ``step``."""

    def __init__(self, scheduler: Scheduler, rank: Rank, tokenizer: Tokenizer, store: BlockStore | None) -> None:
        self.tokenizer = tokenizer
        self._scheduler = scheduler
        self._rank = rank
        self._store = store
        self._sampler = Sampler(tokenizer.eos_ids)
        self._pending: dict[int, _Pending] = {}
        self._generated_tokens = 0
        self._whole = store is not None and store.following.whole

    @property
    def pool_tokens(self) -> int:
        """How many tokens the device pool holds."""
        return self._scheduler.blocks.num_blocks * self._scheduler.blocks.block_tokens

    @property
    def window_tokens(self) -> int:
        """How many tokens of prompts to add ahead: about what all tiers together hold, within `WINDOW_TOKENS`."""
        held = self.pool_tokens
        if self._store is not None:
            config = self._store.config
            blocks = (config.host_bytes + config.disk_bytes) // config.block_bytes
            held += blocks * self._scheduler.blocks.block_tokens
        least, most = WINDOW_TOKENS
        return min(max(held, least), most)

    def lines_scatter(self) -> None:
        """Lines that share a prefix may come far apart: what the known ones do not need may be needed all the same."""
        if self._store is not None:
            self._store.following.whole = False

    def lines_end(self) -> None:
        """All lines are known."""
        if self._store is not None:
            self._store.following.whole = self._whole

    @property
    def num_requests(self) -> int:
        """Requests that were added and have not come out yet."""
        return len(self._pending)

    @property
    def model_tokens(self) -> int:
        """Tokens the model ran over so far: prompt tokens that were not found, and generated ones."""
        return self._scheduler.stats.step_tokens

    def add(self, request: Request) -> None:
        """Queue a request. The caller made sure that the prompt fits ``pool_tokens``, and all of it the context."""
        sequence = Sequence(request, 0, list(request.prompt))
        self._pending[request.id] = _Pending([sequence], [self._tail(request)])
        self._scheduler.add(sequence)

    def cancel(self, request: Request) -> None:
        """Take a request out between two steps; its blocks are free, full ones stay cached. No error if it is done."""
        pending = self._pending.pop(request.id, None)
        for sequence in [] if pending is None else pending.sequences:
            if sequence.finish is None:
                self._scheduler.cancel(sequence)

    def phase(self, request: Request) -> Phase:
        """How far a request has come that was added."""
        pending = self._pending.get(request.id)
        first = None if pending is None else pending.sequences[0]
        if first is None or len(first.tokens) > first.prompt_length:
            return Phase.DECODE
        return Phase.PREFILL if first.started else Phase.WAITING

    def step(self) -> list[RequestOutput | RequestFailure]:
        """Run one step; the requests that finished in it."""
        step = self._scheduler.schedule()
        result = self._rank.run(step.plan)
        self._scheduler.apply(step, result)
        if result.logits is None:
            return []
        sequences = self._sampled_sequences(step)
        rows = [row for row, (sequence, forks) in enumerate(sequences) for _ in range(1 + len(forks))]
        flat = [each for sequence, forks in sequences for each in (sequence, *forks)]
        logits = result.logits if len(rows) == len(result.logits) else result.logits[rows]
        finished: list[RequestOutput | RequestFailure] = []
        for sequence, sampled in zip(flat, self._sampler.sample(logits, flat), strict=True):
            outcome = self._take(sequence, sampled)
            if outcome is not None:
                finished.append(outcome)
        return finished

    def _sampled_sequences(self, step: Step) -> list[tuple[Sequence, list[Sequence]]]:
        """The sequences that get a token in this step, each with the siblings that fork off it now."""
        works = [
            *zip(step.decodes, step.plan.decodes, strict=True),
            *zip(step.prefills, step.plan.prefills, strict=True),
        ]
        return [(sequence, self._fork(sequence)) for sequence, work in works if work.sample]

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        request = sequence.request
        if request.params.n == 1 or sequence.choice or len(sequence.tokens) > sequence.prompt_length:
            return []
        children = self._scheduler.fork(sequence, request.params.n)
        pending = self._pending[request.id]
        pending.sequences.extend(children)
        pending.tails.extend(self._tail(request) for _ in children)
        return children

    def _tail(self, request: Request) -> TextTail | None:
        params = request.params
        return TextTail(self.tokenizer, params.stop, params.skip_special_tokens) if params.stop else None

    def _take(self, sequence: Sequence, sampled: Sampled) -> RequestOutput | RequestFailure | None:
        """Append a token to a sequence; the request's outcome if that was its last."""
        pending = self._pending.get(sequence.request.id)
        if pending is None:  # a sibling failed in this very step
            return None
        if sampled.token is None:
            return self._fail(sequence.request, FailureKind.NOT_FINITE)
        sequence.tokens.append(sampled.token)
        self._generated_tokens += 1
        if sampled.logprob is not None:
            sequence.logprobs.append(sampled.logprob)
        sequence.finish = self._finish(sequence, sampled.token, pending.tails[sequence.choice])
        if sequence.finish is None:
            if len(sequence.tokens) > self.pool_tokens:
                return self._fail(sequence.request, FailureKind.KV_CAPACITY)
            return None
        self._scheduler.finish(sequence)
        pending.done += 1
        if pending.done < len(pending.sequences):
            return None
        del self._pending[sequence.request.id]
        return RequestOutput(sequence.request, tuple(pending.sequences))

    def _finish(self, sequence: Sequence, token: int, tail: TextTail | None) -> Finish | None:
        params = sequence.request.params
        if (token in self.tokenizer.eos_ids and not params.ignore_eos) or token in params.stop_token_ids:
            sequence.stop_token = token
            return Finish.STOP
        if tail is not None:
            text = tail.push(token)
            if text is not None and len(sequence.generated) >= params.min_tokens:
                sequence.text = text
                return Finish.STOP
        return Finish.LENGTH if sequence.remaining_tokens <= 0 else None

    def _fail(self, request: Request, kind: FailureKind) -> RequestFailure:
        self.cancel(request)
        return RequestFailure(request, kind)

    def stats(self) -> EngineStats:
        """What happened so far."""
        blocks = self._scheduler.blocks
        return EngineStats(
            scheduler=self._scheduler.stats,
            store=self._store.stats() if self._store is not None else None,
            generated_tokens=self._generated_tokens,
            pool_blocks=blocks.num_blocks,
            pool_used=blocks.used,
            pool_cached=blocks.cached,
            graphs=self._rank.graph_stats(),
        )

    def close(self, *, keep: bool) -> None:
        """Close the store. With ``keep``, it first gets the pool's blocks that it does not have, for the next start.

        Else nothing is written any more.
        """
        if self._store is None:
            return
        self._store.follow(None if keep else JobPlan(whole=True))
        if keep:
            contents = self._scheduler.blocks.contents()
            for start in range(0, len(contents), CLOSE_BLOCKS):
                batch = contents[start : start + CLOSE_BLOCKS]
                self._rank.save([(block, name) for block, name in batch if not self._store.contains(name)])
        self._store.close()
