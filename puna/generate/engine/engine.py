"""Requests in, completions out: steps of the network over whatever the scheduler puts together."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Several
from typing import Any

import torch

from puna.devices import free_memory_bytes
from puna.errors import PunaError, UsageError
from puna.generate.engine.blocks import BlockPool
from puna.generate.engine.draft_model import DraftModel
from puna.generate.engine.drafts import Drafter, PromptLookup, check_one_source
from puna.generate.engine.drawing import draw
from puna.generate.engine.runner import Logits, Runner, activation_bytes, kept_bytes
from puna.generate.engine.scheduler import Chunk, Running, Scheduler
from puna.generate.sampling import Sampling
from puna.generate.sequence import Completion, OnCompletion, OnText, Sequence
from puna.model.llama import Llama
from puna.model.mark import mark_in_memory
from puna.parallel.collectives import all_min
from puna.parallel.inference import group_of
from puna.progress import still_at_work
from puna.tokenizer import Tokenizer

#: Tokens of a block of the cache.
BLOCK_TOKENS = 32

#: Most sequences that run at a time, where memory has room for so many.
MAX_ROWS = 256

#: Tokens of a step on a CPU, and elsewhere: enough for products at full speed, few enough that decoding does not wait.
STEP_TOKENS = {"cpu": 512}
STEP_TOKENS_ELSEWHERE = 4096

#: Share of the memory that is free behind the weights and a step which the cache takes.
CACHE_SHARE = {"cpu": 0.3}
CACHE_SHARE_ELSEWHERE = 0.85


class Engine:
    """Completes many prompts at once over one model.

    A completion depends on its prompt and its sampling alone, whatever else is in the batch, whenever it came, and
    whether the beginning of its prompt was known already (but for the rounding of sums).

    Several threads may ask at a time: their prompts share the steps, which one of them takes for all. The model may go
    on training between requests: what is known of prompts is then forgotten.

    Where ranks share the model (`puna.parallel.inference`), each has an engine of its own that one thread gives the
    same prompts; logits are equal to the last bit, so all take the same steps.

    Args:
        model: on its device.
        tokenizer: spells texts and knows EOS and EOT; None: ids alone.
        max_rows: most sequences that run at a time; fewer do where the cache has no blocks for them.
        cache_tokens: tokens that the cache holds; None: as many as memory allows.
        step_tokens: most tokens of a step; None: what suits the device.
        block_tokens: tokens of a block: what prompts that begin alike share, and a power of two of 16 or more on CUDA.
        lookup: guess what comes next where a text repeats itself, and check the guesses together.
        draft: a small model of the same vocabulary that guesses instead.
        cache_dtype: "int8" or "fp8": keep keys and values in 8 bits, about half of what bf16 takes; completions are
            then those of slightly other logits. None: as the model computes them.
        compile: on CUDA, compile the layers too: a minute at the start, and faster from then on.

    Raises:
        UsageError: options that do not go together, or that the device does not know.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = MAX_ROWS,
        cache_tokens: int | None = None,
        step_tokens: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
        lookup: bool = False,
        draft: Llama | None = None,
        cache_dtype: str | None = None,
        compile: bool = False,
    ) -> None:
        check_one_source(lookup=lookup, draft=draft)
        for name, number in (("max_rows", max_rows), ("block_tokens", block_tokens), ("cache_tokens", cache_tokens)):
            if number is not None and number < 1:
                raise UsageError(f"{name}={number} must be 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.device = model.lm_head.weight.device
        self._group = group_of(model)
        tokens = max(step_tokens or STEP_TOKENS.get(self.device.type, STEP_TOKENS_ELSEWHERE), max_rows)
        n_blocks = -(-(cache_tokens or self._room(max_rows, tokens, draft, cache_dtype)) // block_tokens)
        self.pool = BlockPool(n_blocks, block_tokens)
        self._mark = ""  # of the weights, from the first request on
        self._runner = Runner(
            model, n_blocks, block_tokens, choices=self._spelled, cache_dtype=cache_dtype, compile=compile
        )
        self._drafter: Drafter | None = PromptLookup() if lookup else None
        if draft is not None:
            self._drafter = DraftModel(draft, self._spelled, n_blocks, block_tokens, cache_dtype=cache_dtype)
        self.scheduler = Scheduler(self.pool, step_tokens=tokens, max_rows=max_rows, drafter=self._drafter)
        self._draws = self.device.type != "cpu"  # where sequences choose one by one as fast
        self._turns = threading.Condition()  # never held during a step: who comes does not wait for it
        self._stepping: int | None = None  # the thread that takes steps
        self._incoming: deque[list[Running]] = deque()  # what came together
        self._thread: threading.Thread | None = None  # takes steps for streams

    def generate(
        self,
        prompts: str | Several[Several[int] | str],
        sampling: Sampling | Several[Sampling],
        *,
        on_text: OnText | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Completes prompts, as `puna.generate.complete` does.

        Args:
            prompts: ids, BOS included where the model wants it; or texts, which get it; or one text.
            sampling: one for all prompts, or one for each.
            on_text: is given (number of the prompt, piece of text) while the texts grow, by whatever thread takes the
                step, which waits for it.
            on_completion: is given (number of the prompt, completion) once it is finished.

        Raises:
            PunaError: a prompt cannot be completed; none has been begun then.
            UsageError: not one sampling for each prompt, or texts without a tokenizer.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise UsageError(f"{len(samplings)} samplings for {len(prompts)} prompts; give one for all or one for each")
        numbered = enumerate(zip(prompts, samplings, strict=True))
        sequences = [self._sequence(index, prompt, each, on_text) for index, (prompt, each) in numbered]
        if not sequences:
            return []
        ended: deque[Running] = deque()

        def note(running: Running) -> None:
            with self._turns:
                ended.append(running)
                self._turns.notify_all()  # this thread may be waiting while another takes the steps

        added = [self._new(sequence, note) for sequence in sequences]
        try:
            self._enter(added)
            for _ in added:
                self._take_steps_until(lambda: bool(ended))
                running = ended.popleft()
                if running.error is not None:
                    raise running.error
                if on_completion:
                    on_completion(running.sequence.index, running.sequence.completion())
        finally:
            self._cancel(added)
        return [sequence.completion() for sequence in sequences]

    async def stream(
        self, prompt: Several[int] | str, *, on_completion: OnCompletion | None = None, **sampling: Any
    ) -> AsyncIterator[str]:
        """The text of a completion while it grows; leaving the loop cancels it and frees its blocks within a step.

        A loop that is left by `break` cancels it where nothing else keeps the stream; who does calls its `aclose`.

        Args:
            prompt: as for `generate`.
            on_completion: is given (0, completion), which says why it ended, behind the last piece of text.
            sampling: the fields of `Sampling`.

        Raises:
            UsageError: ranks share the model, which would have to begin and cancel in the same steps.
        """
        if self._group is not None:
            raise UsageError("a model that processes share cannot stream; use generate, with on_text in the first one")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | BaseException | None]()

        def tell(piece: str | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        sequence = self._sequence(0, prompt, Sampling.of(sampling), lambda _, text: tell(text))
        running = self._new(sequence, lambda ended: tell(ended.error))
        self._enter([running], is_stream=True)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
            if on_completion:
                on_completion(0, sequence.completion())
        finally:
            running.is_cancelled = True

    def _enter(self, those: list[Running], *, is_stream: bool = False) -> None:
        """Has sequences let in before the next step; for those of streams, a thread takes the steps."""
        with self._turns:
            self._incoming.append(those)
            if is_stream and self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="puna engine")
                self._thread.start()

    def _cancel(self, those: list[Running]) -> None:
        for running in those:
            running.is_cancelled = True
        with self._turns:
            if self._stepping is None:  # else that thread does it
                self.scheduler.drop_finished()

    def _serve(self) -> None:
        """Takes steps for `stream` while there is work."""
        while True:
            self._take_steps_until(self._is_idle)
            with self._turns:
                if self._is_idle():
                    self._thread = None
                    return

    def _is_idle(self) -> bool:
        """Whether nothing is to be done, as far as this thread can tell: not while another one takes a step."""
        is_seen = self._stepping in (None, threading.get_ident())
        return is_seen and self.scheduler.is_idle and not self._incoming

    def _take_steps_until(self, is_so: Callable[[], bool]) -> None:
        """Takes steps for all who asked until something is so; while another thread does, waits for it to be so.

        Raises:
            UsageError: this thread is in a step, in `on_text`.
        """
        this_thread = threading.get_ident()
        if self._stepping == this_thread:
            raise UsageError("on_text cannot ask the engine that calls it, and waits for it; on_completion can")
        try:
            with self._turns:
                self._turns.wait_for(lambda: is_so() or self._stepping is None)
                if is_so():
                    return
                self._stepping = this_thread
            while not is_so():
                self._let_in()
                self._step()
        finally:
            with self._turns:
                if self._stepping == this_thread:
                    self.scheduler.drop_finished()
                    self._stepping = None
                    self._turns.notify_all()

    def _look_at_weights(self) -> None:
        """Forgets what is known of prompts if it is not what the model would compute now."""
        if self.scheduler.is_idle and not all_min(int(self._mark == (mark := mark_in_memory(self.model))), self._group):
            self.pool.forget()
            self._mark = mark

    def _let_in(self) -> None:
        while self._incoming:
            those = self._incoming[0]
            try:
                self._look_at_weights()
                self.scheduler.add(*those)
            except Exception as error:  # they alone meet it
                for running in those:
                    running.end(error)
            self._incoming.popleft()

    def _step(self) -> None:
        """Computes the next step; sequences that meet an error end with it."""
        still_at_work()
        live = [*self.scheduler.running, *self.scheduler.waiting]
        try:
            self._compute_step()
        except Exception as error:
            for running in live:
                running.end(error)

    @torch.inference_mode()
    def _compute_step(self) -> None:
        chunks = self.scheduler.next_step()
        if not chunks:
            return
        try:
            asked = self._runner.compute(chunks)
            if self._draws:
                self._draw(chunks, asked)
        except torch.OutOfMemoryError as error:
            tokens, kept = sum(map(len, chunks)), self.pool.n_blocks * self.pool.size
            raise PunaError(
                f"the device's memory ran out in a step of {tokens} tokens, beside the weights and a cache of {kept}; "
                "run fewer at a time (batch_rows), keep keys and values in 8 bits (cache_dtype), or load weights of "
                "fewer bits (puna quantize)"
            ) from error
        if self._drafter is not None:
            self._drafter.read(chunks)
        try:
            for chunk, logits in zip(chunks, asked, strict=True):
                try:
                    if logits is not None:
                        self._take(chunk, logits)
                    self.scheduler.advance(chunk)
                except Exception as error:  # in its `on_text`, say: it alone meets it
                    chunk.running.end(error)
        finally:  # Ctrl-C leaves the others as they are
            self.scheduler.drop_finished()
            for chunk in chunks:
                if chunk.running.is_done:
                    chunk.running.end()

    def _draw(self, chunks: list[Chunk], asked: list[Logits | None]) -> None:
        """Draws the tokens of all sequences that can do without their logits."""
        pairs = [(chunk.running.sequence, logits) for chunk, logits in zip(chunks, asked, strict=True) if logits]
        those = [(one, logits) for one, logits in pairs if one.goes_by_logits and one.sampling.temperature > 0]
        if not those:
            return
        rows = torch.cat([logits.logits[:, : self._spelled] for _, logits in those])
        samplings = [one.sampling for one, logits in those for _ in range(len(logits))]
        ids = draw(rows, samplings, [share for one, logits in those for share in one.shares(len(logits))])
        for _, logits in those:
            logits.drawn, ids = ids[: len(logits)], ids[len(logits) :]

    def _take(self, chunk: Chunk, logits: Logits) -> None:
        """Lets a sequence choose, and go on with its guesses as long as they are what it chose."""
        running, sequence, drafts = chunk.running, chunk.running.sequence, chunk.running.drafts
        right = 0
        for row in range(len(logits)):
            if sequence.goes_by_logits and sequence.sampling.temperature == 0:
                sequence.take_id(logits.likeliest[row])
            elif logits.drawn is not None:
                sequence.take_id(logits.drawn[row])
            else:
                sequence.take(logits.row(row))
            if sequence.finish is not None or row == len(drafts) or sequence.tokens[-1] != drafts[row]:
                break
            right += 1
        if self._drafter is not None and drafts:
            running.n_drafts = self._drafter.next_length(running.n_drafts, len(drafts), right)

    def _sequence(self, index: int, prompt: Several[int] | str, sampling: Sampling, on_text: OnText | None) -> Sequence:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("texts need a tokenizer; give token ids instead")
            prompt = self.tokenizer.encode(prompt, bos=True)
        return Sequence(index, prompt, sampling, self.model.config, self.tokenizer, on_text)

    def _new(self, sequence: Sequence, on_end: Callable[[Running], None] | None = None) -> Running:
        return Running(sequence, 0 if self._drafter is None else self._drafter.first, on_end=on_end)

    @property
    def _spelled(self) -> int:
        return self.model.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size

    def _room(self, max_rows: int, step_tokens: int, draft: Llama | None, cache_dtype: str | None) -> int:
        """Tokens of cache that memory allows on every rank, and that so many rows could ever use."""
        token, drafted = (0 if model is None else kept_bytes(model, cache_dtype) for model in (self.model, draft))
        n_ranks = 1 if self._group is None else self._group.size()
        # Each rank has a share of the heads, and the whole of a draft model; on a CPU all share its memory.
        token = token + n_ranks * drafted if self.device.type == "cpu" else token // n_ranks + drafted
        share = CACHE_SHARE.get(self.device.type, CACHE_SHARE_ELSEWHERE)
        most = max_rows * self.model.config.max_position_embeddings
        free = free_memory_bytes(self.device) - step_tokens * activation_bytes(self.model)
        room = max(BLOCK_TOKENS, min(most, int(free * share / token)))
        return all_min(room, self._group)
