"""Who computes what in the next step.

    running   [a: decodes 1 + 4 guesses] [b: decodes 1] [c: chunk of its prompt, 300 of 900]    at most `step_tokens`
    waiting   d, e, …        taken in, first come first served, while blocks, rows and tokens of the step last

Sequences that decode come first and never wait for a prompt, nor for another one's guesses; what is left of a step's
tokens goes to prompts, in chunks. When blocks run out, the youngest running sequence gives all of its own up and waits
again, first in line; its tokens are computed again later, so nothing of the text is lost.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from puna.errors import PunaError
from puna.generate.engine.blocks import ROOT, BlockPool, OutOfBlocks, key_of
from puna.generate.engine.drafts import Drafter
from puna.generate.sequence import Sequence


class OutgrowsCache(PunaError):
    """Sequences could need more blocks than there are.

    Attributes:
        reasons: number of a prompt -> what the message says of it.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        index, reason = next(iter(self.reasons.items()))
        return f"prompt {index} {reason}"


@dataclass(eq=False)
class Running:
    """A sequence in the engine.

    Attributes:
        sequence: its tokens, and how they go on.
        n_drafts: guesses to try in a step.
        blocks: hold its keys and values, in order.
        computed: tokens whose keys and values are there.
        drafted: tokens whose keys and values are there of a draft model.
        drafts: guesses that are tried in this step, behind the newest token.
        notes: what a drafter remembers of the text.
        is_cancelled: nobody wants more of it.
        on_end: is given it, once, when it has ended.
        error: why it ended, if that was an error.
    """

    sequence: Sequence
    n_drafts: int = 0
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    drafted: int = 0
    drafts: list[int] = field(default_factory=list)
    notes: Any = None
    is_cancelled: bool = False
    on_end: Callable[["Running"], None] | None = None
    error: Exception | None = None
    #: Of its full blocks that were made known, the number and the last key.
    _known: int = 0
    _key: bytes = ROOT

    @property
    def tokens(self) -> list[int]:
        """Prompt and completion so far."""
        return self.sequence.tokens

    @property
    def is_done(self) -> bool:
        """Whether nothing more is to be computed."""
        return self.is_cancelled or self.sequence.finish is not None

    def end(self, error: Exception | None = None) -> None:
        """Tells who waits for it that it has ended, and takes no part in any further step."""
        self.is_cancelled = True
        if self.on_end is not None:
            self.error, on_end, self.on_end = error, self.on_end, None
            on_end(self)


@dataclass
class Chunk:
    """What one sequence computes in a step: tokens `start` to `stop`, those beyond its own are drafts."""

    running: Running
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        """Whether its last token says what comes next."""
        return self.stop >= len(self.running.tokens)

    @property
    def ids(self) -> list[int]:
        """The ids to compute."""
        tokens, n = self.running.tokens, len(self.running.tokens)
        return tokens[self.start : self.stop] + self.running.drafts[max(0, self.start - n) : max(0, self.stop - n)]

    def slots(self, size: int) -> list[int]:
        """Where in the pool of blocks of `size` tokens each of them is kept."""
        blocks = self.running.blocks
        return [blocks[place // size] * size + place % size for place in range(self.start, self.stop)]


class Scheduler:
    """Chooses the chunks of each step.

    Args:
        pool: of blocks.
        step_tokens: most tokens of a step.
        max_rows: most sequences that run at a time.
        drafter: guesses what comes next; None: nothing is guessed.
    """

    def __init__(self, pool: BlockPool, *, step_tokens: int, max_rows: int, drafter: Drafter | None = None) -> None:
        self.pool, self.step_tokens, self.max_rows, self.drafter = pool, step_tokens, max_rows, drafter
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, *those: Running) -> None:
        """Takes sequences in, all of them or none.

        Raises:
            OutgrowsCache: some could outgrow the whole pool.
        """
        room = self.pool.n_blocks * self.pool.size
        reasons = {
            running.sequence.index: f"may grow to {running.sequence.most_tokens} tokens, and the cache holds {room}; "
            "lower max_tokens, give the engine more memory, or keep keys and values in 8 bits (cache_dtype)"
            for running in those
            if running.sequence.most_tokens > room
        }
        if reasons:
            raise OutgrowsCache(reasons)
        self.waiting.extend(those)

    def next_step(self) -> list[Chunk]:
        """The chunks of the next step, decoding ones first; empty where nothing is to be done."""
        self.drop_finished()
        for running in self.running:  # what a step guessed that an error ended
            running.drafts, running.drafted = [], min(running.drafted, running.computed)
        is_decoding = {running: len(running.tokens) - running.computed == 1 for running in self.running}
        chunks = self._go_on((running for running, decodes in is_decoding.items() if decodes), self.step_tokens)
        self._guess([chunk for chunk in chunks if chunk.running in self.running], self.step_tokens - _size(chunks))
        reading = (running for running, decodes in is_decoding.items() if not decodes)
        chunks += self._go_on(reading, self.step_tokens - _size(chunks))
        left = self.step_tokens - _size(chunks)
        while self.waiting and left > 0 and len(self.running) < self.max_rows:
            if self.waiting[0].is_done:
                self.waiting.popleft()
                continue
            being_read = {self._beginning_of(each) for each in self.running if not each._known}
            if self._beginning_of(self.waiting[0]) in being_read:
                break  # in the next step it finds there what is being computed in this one
            chunk = self._admit(self.waiting[0], left)
            if chunk is None:
                break
            chunks.append(chunk)
            left -= len(chunk)
        chunks = [chunk for chunk in chunks if chunk.running in self.running]
        return sorted(chunks, key=lambda chunk: len(chunk) > 1)

    def advance(self, chunk: Chunk) -> None:
        """Counts what a step has computed; call it when the sequence has taken its new tokens."""
        running = chunk.running
        running.computed = min(chunk.stop, len(running.tokens) - 1) if chunk.is_last else chunk.stop
        running.drafted = min(running.drafted, len(running.tokens) - 1)
        running.drafts = []
        self._make_known(running)

    def drop_finished(self) -> None:
        """Takes the blocks of those that ended or were cancelled."""
        for running in [each for each in self.running if each.is_done]:
            self.running.remove(running)
            self._give_up(running)
            running.notes = None
        while self.waiting and self.waiting[0].is_done:  # those behind are met when their turn comes
            self.waiting.popleft()

    def _go_on(self, those: Iterable[Running], left: int) -> list[Chunk]:
        """What running sequences compute next, `left` tokens at most."""
        chunks = []
        for running in those:  # the oldest first: the youngest give way
            if running in self.running and left > 0 and (chunk := self._chunk_of(running, left)):
                chunks.append(chunk)
                left -= len(chunk)
        return chunks

    def _chunk_of(self, running: Running, left: int) -> Chunk | None:
        """What a running sequence computes next; None: it had to give way."""
        stop = min(len(running.tokens), running.computed + left)
        while True:
            try:
                self._reach(running, stop)
                return Chunk(running, running.computed, stop)
            except OutOfBlocks:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is running:
                    return None

    def _guess(self, chunks: list[Chunk], left: int) -> None:
        """Lets sequences that decode try guesses: half of the tokens that are left at most, shared alike.

        They take blocks that are free, and none of another sequence's.
        """
        if self.drafter is None or not chunks:
            return
        wanted = []
        for running in (chunk.running for chunk in chunks):
            length = len(running.tokens)
            most = min(left // 2 // len(chunks), running.n_drafts, running.sequence.most_tokens - length - 1)
            with contextlib.suppress(OutOfBlocks):
                self._reach(running, length + most)
            most = min(most, len(running.blocks) * self.pool.size - length)
            if most > 0:
                wanted.append((running, most))
        self.drafter.guess(wanted)
        for chunk in chunks:
            chunk.stop += len(chunk.running.drafts)

    def _admit(self, running: Running, left: int) -> Chunk | None:
        """Lets the first of those waiting in, with what is known of its beginning; None: blocks do not suffice."""
        running.blocks = self.pool.find(
            running.tokens[:-1]
        )  # the last token is computed anyway: it says what comes next
        n_known = len(running.blocks)
        running.computed = running.drafted = n_known * self.pool.size
        stop = min(len(running.tokens), running.computed + left)
        needed = -(-(len(running.tokens) + 1) // self.pool.size) - n_known
        if needed > self.pool.n_free and self.running:
            self._give_up(running)
            return None
        try:
            self._reach(running, stop)
        except OutOfBlocks:
            self._give_up(running)
            return None
        self.waiting.popleft()
        self.running.append(running)
        running._known, running._key = n_known, ROOT
        for number in range(n_known):
            running._key = key_of(running._key, self._tokens_of_block(running, number))
        return Chunk(running, running.computed, stop)

    def _reach(self, running: Running, stop: int) -> None:
        """Gives a sequence blocks for its first `stop` tokens."""
        while len(running.blocks) * self.pool.size < stop:
            running.blocks.append(self.pool.take(running.blocks[-1] if running.blocks else None))

    def _beginning_of(self, running: Running) -> tuple[int, ...] | Running:
        """The first block of a prompt, or the sequence itself where its prompt is shorter."""
        block = running.tokens[: self.pool.size]
        return tuple(block) if running.sequence.prompt_tokens > len(block) == self.pool.size else running

    def _make_known(self, running: Running) -> None:
        for number in range(running._known, running.computed // self.pool.size):
            running._key = key_of(running._key, self._tokens_of_block(running, number))
            self.pool.remember(running.blocks[number], running._key)
            running._known = number + 1

    def _tokens_of_block(self, running: Running, number: int) -> list[int]:
        return running.tokens[number * self.pool.size : (number + 1) * self.pool.size]

    def _preempt(self, running: Running) -> None:
        self.running.remove(running)
        self._give_up(running)
        self.waiting.appendleft(running)

    def _give_up(self, running: Running) -> None:
        for block in reversed(running.blocks):  # the end of a text is forgotten before its beginning
            self.pool.release(block)
        running.blocks, running.computed, running.drafted, running.drafts = [], 0, 0, []
        running._known, running._key = 0, ROOT


def _size(chunks: list[Chunk]) -> int:
    return sum(map(len, chunks))
