"""What runs in the next step: continuous batching with a token budget, prefix reuse, and preemption by spilling.

The scheduler decides everything and touches no bytes. ``schedule`` turns the waiting and running sequences into a
``Step`` (a pure ``StepPlan`` and which sequence each piece of work belongs to); ``apply`` enters what came of it.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import takewhile

from spillway.kvstore import BlockHash, BlockStore, block_hash
from spillway.node_agent.blocks import BlockManager
from spillway.node_agent.plan import StepPlan, StepResult, Work
from spillway.node_agent.request import Sequence

WRITE_BEHIND_FREE_SHARE = 0.25
"""Below this share of free blocks, sealed blocks are written behind: eviction and preemption then find them clean."""
WRITE_BEHIND_BLOCKS = 32
"""At most this many write-behinds a step: a step is tens of milliseconds, a block well under one."""
GROWTH_TOKENS = 64
"""How far ahead admission leaves room for running sequences to grow, so that it does not cause their preemption."""
DEFERRED_SCAN = 512
"""How many waiting sequences may be passed over, for a prefix that is being computed, in one step."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """``max_batch_tokens``: tokens the model runs over in a step. ``max_sequences``: sequences running at once."""

    max_batch_tokens: int
    max_sequences: int


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start. Tokens unless named otherwise."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    resumed_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0
    peak_sequences: int = 0
    peak_blocks: int = 0
    slots_filled: int = 0
    slots_held: int = 0

    @property
    def waste_share(self) -> float:
        """Share of the held pool slots that no token fills (the open ends of last blocks), over all steps."""
        return 1.0 - self.slots_filled / self.slots_held if self.slots_held else 0.0


@dataclass(slots=True)
class Admission:
    """A sequence whose blocks ``first … first + len(hashes)`` are fetched in this step."""

    sequence: Sequence
    first: int
    hashes: list[BlockHash]
    partial_tokens: int
    resumed: bool


@dataclass(frozen=True, slots=True)
class Found:
    """Where the KV of a waiting sequence is: device blocks, then blocks of the store, then tokens of a partial one."""

    device: list[int]
    stored: list[BlockHash]
    partial_tokens: int = 0


@dataclass(slots=True)
class Step:
    """A plan and whose work it is. ``decodes`` and ``prefills`` run parallel to the plan's lists."""

    plan: StepPlan = field(default_factory=StepPlan)
    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[Sequence] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    spilled: set[BlockHash] = field(default_factory=set)
    """Names of what the plan spills."""
    held: list[int] = field(default_factory=list)
    """Blocks of preempted sequences that a copy of this step still reads; let go once the step has run."""
    preempted: bool = False

    def spill(self, block: int, name: BlockHash) -> None:
        """Put a block into the store before anything else is done."""
        self.plan.spills.append((block, name))
        self.spilled.add(name)

    def add(self, sequence: Sequence, count: int) -> None:
        """Run the next ``count`` tokens of the sequence. Its blocks are in place."""
        start, end = sequence.computed, sequence.computed + count
        work = Work(sequence.tokens[start:end], start, sequence.blocks, sample=end == len(sequence.tokens))
        # Generated tokens take the decode kernel and prompt tokens the prefill kernel, however the prompt was cut into
        # chunks: the route of a token must not depend on what else is in the batch.
        if count == 1 and start >= sequence.prompt_length:
            self.decodes.append(sequence)
            self.plan.decodes.append(work)
        else:
            self.prefills.append(sequence)
            self.plan.prefills.append(work)


class Scheduler:
    """Owner of the waiting and running sequences, and through ``BlockManager`` of the device pool.

    Without a store there is nothing below the device: nothing is spilled, and preemption computes again.
    """

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, store: BlockStore | None, root: BlockHash
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.stats = SchedulerStats()
        self._store = store
        self._root = root
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._computing: set[BlockHash] = set()

    @property
    def num_waiting(self) -> int:
        """Sequences not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its order. The caller made sure that it fits the pool alone."""
        if self._store is not None:
            chain = self._hashes(sequence, len(sequence.tokens) // self.blocks.block_tokens)
            sequence.line = self._store.following.lines
            self._store.following.announce(chain)
            self.blocks.bring_back(chain)
        insort(self._waiting, sequence, key=lambda each: each.order)

    # ── schedule ──────────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Step:
        """The next step. Every sequence in it has the blocks that it writes to."""
        step = Step()
        self._plan_decodes(step)
        self._plan_prefills(step)
        if not step.preempted:
            self._admit(step)
        self._write_behind(step)
        return step

    def _plan_decodes(self, step: Step) -> None:
        for sequence in list(self._running):
            decoding = sequence.computed == len(sequence.tokens) - 1 and sequence.computed >= sequence.prompt_length
            if decoding and self._make_tail_writable(sequence, step):
                step.add(sequence, 1)

    def _plan_prefills(self, step: Step) -> None:
        for sequence in self._running:
            room = self.config.max_batch_tokens - step.plan.num_tokens
            left = len(sequence.tokens) - sequence.computed
            if room <= 0:
                return
            if left > 1 or sequence.computed < sequence.prompt_length:
                step.add(sequence, min(left, room))

    def _make_tail_writable(self, sequence: Sequence, step: Step) -> bool:
        """Give the sequence a block of its own for its next token; False when it had to be preempted itself."""
        index = sequence.computed // self.blocks.block_tokens
        while index == len(sequence.blocks) or self.blocks.refs(sequence.blocks[index]) > 1:
            if not self.blocks.available:
                victim = self._running[-1]
                self._preempt(victim, step)
                if victim is sequence:
                    return False
                continue
            block = self._allocate(step)
            if index == len(sequence.blocks):
                sequence.blocks.append(block)
            else:
                shared = sequence.blocks[index]
                step.plan.copies.append((shared, block))
                self.blocks.release([shared])
                sequence.blocks[index] = block
        return True

    def _allocate(self, step: Step) -> int:
        block, evicted = self.blocks.allocate()
        if evicted is not None and self._store is not None and self._store.following.lets_go(evicted):
            step.spill(block, evicted)
        return block

    def _spill(self, block: int, name: BlockHash, step: Step) -> None:
        if self._store is not None and not self._store.contains(name):
            step.spill(block, name)

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Take all blocks from a sequence: full ones stay cached until they make room, a partial one is spilled."""
        step.preempted = True
        self.stats.preemptions += 1
        full, partial = divmod(sequence.computed, self.blocks.block_tokens)
        if self._store is not None:
            sequence.expected = self._hashes(sequence, full)
            if partial and sequence.computed == len(sequence.tokens) - 1:
                name = self._partial_hash(sequence, sequence.computed)
                self._spill(sequence.blocks[full], name, step)
                sequence.expected.append(name)
            self._store.following.expect(sequence.expected)
        sources = {source for source, _ in step.plan.copies}
        for block in sources.intersection(sequence.blocks):
            self.blocks.acquire(block)
            step.held.append(block)
        self._leave(sequence)
        insort(self._waiting, sequence, key=lambda each: each.order)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._computing.difference_update(sequence.hashes)
        self.blocks.release(sequence.blocks)
        if self._store is not None:
            needs = self._store.following.needs  # whoever needs a block needs all before it
            self.blocks.set_aside(list(takewhile(lambda name: not needs(name), reversed(sequence.hashes))))
        sequence.blocks = []
        sequence.computed = 0

    def _admit(self, step: Step) -> None:
        index = deferred = 0
        while (
            index < len(self._waiting)
            and deferred < DEFERRED_SCAN
            and len(self._running) < self.config.max_sequences
            and step.plan.num_tokens < self.config.max_batch_tokens
        ):
            sequence = self._waiting[index]
            found = self._find(sequence, step)
            if found is None:
                index += 1
                deferred += 1
                continue
            if not self._fits(sequence, found):
                break
            del self._waiting[index]
            self._start(sequence, found, step)

    def _find(self, sequence: Sequence, step: Step) -> Found | None:
        """Where KV of the sequence is; None when a running sequence is just computing or fetching its next block.

        Waiting a step beats computing a block twice. One token is always left to compute: its logits are wanted.
        """
        if sequence.waits_for in self._computing:
            return None
        known = len(sequence.tokens) - 1
        hashes = self._hashes(sequence, known // self.blocks.block_tokens)
        device = self.blocks.match(hashes)
        rest = hashes[len(device) :]
        stored = self._match_stored(rest, step)
        sequence.waits_for = next((name for name in rest[: len(stored) + 1] if name in self._computing), None)
        if sequence.waits_for is not None:
            return None
        tail = known % self.blocks.block_tokens
        if self._store is not None and len(stored) == len(rest) and sequence.started and tail:
            partial = tail if self._store.contains(self._partial_hash(sequence, known)) else 0
            return Found(device, stored, partial)
        return Found(device, stored)

    def _match_stored(self, names: list[BlockHash], step: Step) -> list[BlockHash]:
        """The longest prefix that the store has, or will have before this step fetches: it spills first."""
        if self._store is None:
            return []
        count = 0
        while count < len(names):
            if names[count] in step.spilled:
                count += 1
                continue
            more = self._store.match(names[count:])
            count += more
            if not more or step.spilled.isdisjoint(names[count : count + 1]):
                break
        return names[:count]

    def _fits(self, sequence: Sequence, found: Found) -> bool:
        needed = self._blocks_for(len(sequence.tokens)) - len(found.device)
        growth = sum(self._blocks_for(min(each.remaining_tokens, GROWTH_TOKENS)) for each in self._running)
        return self.blocks.available_besides(found.device) >= needed + growth

    def _start(self, sequence: Sequence, found: Found, step: Step) -> None:
        first = len(found.device)
        for block in found.device:
            self.blocks.acquire(block)
        needed = self._blocks_for(len(sequence.tokens)) - first
        sequence.blocks = found.device + [self._allocate(step) for _ in range(needed)]
        sequence.computed = first * self.blocks.block_tokens
        self._computing.update(sequence.hashes[first:])
        insort(self._running, sequence, key=lambda each: each.order)
        self.stats.peak_sequences = max(self.stats.peak_sequences, len(self._running))
        resumed, sequence.started = sequence.started, True
        if not resumed:
            self.stats.prompt_tokens += sequence.prompt_length
        self._count_reuse(sequence.computed, resumed=resumed)
        names = list(found.stored)
        if found.partial_tokens:
            names.append(self._partial_hash(sequence, len(sequence.tokens) - 1))
        if names:
            step.admissions.append(Admission(sequence, first, names, found.partial_tokens, resumed))
            step.plan.fetches.extend(zip(names, sequence.blocks[first:], strict=False))
            return
        self._met(sequence)
        room = self.config.max_batch_tokens - step.plan.num_tokens
        step.add(sequence, min(len(sequence.tokens) - sequence.computed, room))

    def _count_reuse(self, tokens: int, *, resumed: bool) -> None:
        if resumed:
            self.stats.resumed_tokens += tokens
        else:
            self.stats.reused_tokens += tokens

    def _write_behind(self, step: Step) -> None:
        if self._store is None or self._store.following.whole:  # then what is needed goes when it has to
            return
        if self.blocks.free > self.blocks.num_blocks * WRITE_BEHIND_FREE_SHARE:
            return
        for block, name in self.blocks.take_unspilled(WRITE_BEHIND_BLOCKS):
            self._spill(block, name, step)

    # ── apply ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, step: Step, result: StepResult) -> None:
        """Enter what the ranks did: which fetches were answered, and that the planned tokens have their KV."""
        self.blocks.release(step.held)
        answers = iter(result.fetched)
        for admission in step.admissions:
            self._apply_fetches(admission, [next(answers) for _ in admission.hashes])
        for sequence, work in [
            *zip(step.decodes, step.plan.decodes, strict=True),
            *zip(step.prefills, step.plan.prefills, strict=True),
        ]:
            before = sequence.computed
            sequence.computed += len(work.tokens)
            self._seal(sequence, before // self.blocks.block_tokens, spilled=False)
        self._advance()
        self.stats.steps += 1
        self.stats.peak_blocks = max(self.stats.peak_blocks, self.blocks.num_blocks - self.blocks.free)
        self.stats.step_tokens += step.plan.num_tokens
        for sequence in self._running:
            self.stats.slots_held += len(sequence.blocks) * self.blocks.block_tokens
            self.stats.slots_filled += min(len(sequence.tokens), len(sequence.blocks) * self.blocks.block_tokens)

    def _advance(self) -> None:
        """Tell the store which lines are to come. A line that was passed over holds back those behind it.

        Not before the step has run: until then the store must not take what it is about to fetch for spent.
        """
        if self._store is not None:
            following = self._store.following
            following.advance(next((each.line for each in self._waiting if not each.started), following.lines))

    def _apply_fetches(self, admission: Admission, answers: list[bool]) -> None:
        """Blocks up to the first miss hold their KV; from there on the sequence computes into the blocks it has."""
        good = answers.index(False) if False in answers else len(answers)
        sequence, size = admission.sequence, self.blocks.block_tokens
        partial = admission.partial_tokens if good == len(answers) else 0
        full = good - 1 if partial else good
        sequence.computed = (admission.first + full) * size
        self._seal(sequence, admission.first, spilled=True)
        sequence.computed += partial
        self._met(sequence)
        self._count_reuse(full * size + partial, resumed=admission.resumed)

    def _seal(self, sequence: Sequence, first: int, *, spilled: bool) -> None:
        full = sequence.computed // self.blocks.block_tokens
        hashes = self._hashes(sequence, full)
        for index in range(first, full):
            self._computing.discard(hashes[index])
            sequence.blocks[index] = self.blocks.seal(sequence.blocks[index], hashes[index], spilled=spilled)
        if self._store is not None and full > first:
            self._store.following.took(hashes[first:])

    def _met(self, sequence: Sequence) -> None:
        """What a preempted sequence was waiting for is back, or not wanted any more."""
        if sequence.expected and self._store is not None:
            self._store.following.met(sequence.expected)
            sequence.expected = []

    def fork(self, sequence: Sequence, choices: int) -> list[Sequence]:
        """Children ``1 … choices - 1`` of a sequence whose prompt is computed; all blocks are shared until written."""
        children = []
        for choice in range(1, choices):
            child = Sequence(sequence.request, choice, list(sequence.tokens), started=True)
            child.blocks = list(sequence.blocks)
            child.hashes = list(sequence.hashes)
            child.computed = sequence.computed
            for block in child.blocks:
                self.blocks.acquire(block)
            insort(self._running, child, key=lambda each: each.order)
            children.append(child)
        return children

    def finish(self, sequence: Sequence) -> None:
        """The sequence is done: its full blocks stay cached for others."""
        self._leave(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """The sequence will not go on, wherever it stands."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            self._met(sequence)
        else:
            self._leave(sequence)

    # ── names and counts ──────────────────────────────────────────────────────────────────────────────────────────

    def _hashes(self, sequence: Sequence, count: int) -> list[BlockHash]:
        size = self.blocks.block_tokens
        while len(sequence.hashes) < count:
            index = len(sequence.hashes)
            parent = sequence.hashes[-1] if sequence.hashes else self._root
            sequence.hashes.append(block_hash(parent, sequence.tokens[index * size : (index + 1) * size]))
        return sequence.hashes[:count]

    def _partial_hash(self, sequence: Sequence, length: int) -> BlockHash:
        """The name of the last, partial block of the first ``length`` tokens."""
        full = length // self.blocks.block_tokens
        hashes = self._hashes(sequence, full)
        parent = hashes[-1] if hashes else self._root
        return block_hash(parent, sequence.tokens[full * self.blocks.block_tokens : length])

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.blocks.block_tokens)
