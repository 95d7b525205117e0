"""Requests in, completions out: steps of the network over whatever the scheduler puts together."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.devices import free_memory_bytes, takes_cuda_kernels
from puna.errors import PunaError, UsageError
from puna.generate.engine.blocks import BlockPool
from puna.generate.engine.cache import PagedCache, Step
from puna.generate.engine.draft_model import DraftModel, draft_token_bytes
from puna.generate.engine.drafts import Drafter, PromptLookup
from puna.generate.engine.scheduler import Chunk, Running, Scheduler
from puna.generate.sampling import Sampling, check_numbers
from puna.generate.sequence import Completion, OnCompletion, OnText, Sequence
from puna.model.cache import token_bytes
from puna.model.llama import Llama
from puna.parallel.collectives import all_min
from puna.parallel.inference import group_of
from puna.tokenizer import Tokenizer

if TYPE_CHECKING:
    from puna.generate.engine.graphs import DecodeGraphs

#: Tokens of a block of the cache.
BLOCK_TOKENS = 32

#: Tokens of a step on a CPU, and elsewhere: enough for products at full speed, few enough that decoding does not wait.
STEP_TOKENS = {"cpu": 512}
STEP_TOKENS_ELSEWHERE = 4096

#: Share of the memory that is free behind the weights which the cache takes.
CACHE_SHARE = {"cpu": 0.3}
CACHE_SHARE_ELSEWHERE = 0.85


class Engine:
    """Completes many prompts at once over one model.

    A completion depends on its prompt and its sampling alone, whatever else is in the batch, whenever it came, and
    whether the beginning of its prompt was known already (but for the rounding of sums).

    Where ranks share the model (`puna.parallel.inference`), each has an engine of its own that is given the same
    prompts; logits are equal to the last bit, so all take the same steps.

    Args:
        model: on its device.
        tokenizer: spells texts and knows EOS and EOT; None: ids alone.
        max_rows: most sequences that run at a time.
        cache_tokens: tokens that the cache holds; None: as many as memory allows.
        step_tokens: most tokens of a step; None: what suits the device.
        block_tokens: tokens of a block: what prompts that begin alike share, and a power of two of 16 or more on CUDA.
        lookup: guess what comes next where a text repeats itself, and check the guesses together.
        draft: a small model of the same vocabulary that guesses instead.
        compile: on CUDA, compile the layers too: a minute at the start, and faster from then on.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = 64,
        cache_tokens: int | None = None,
        step_tokens: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
        lookup: bool = False,
        draft: Llama | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = model.lm_head.weight.device
        self._dtype = model.compute_dtype or model.lm_head.weight.dtype
        self._group = group_of(model)
        tp_size = 1 if self._group is None else self._group.size()
        n_blocks = -(-(cache_tokens or self._room(max_rows, draft)) // block_tokens)
        self.pool = BlockPool(n_blocks, block_tokens)
        self.cache = PagedCache(
            model.config, n_blocks, block_tokens, dtype=self._dtype, device=self.device, tp_size=tp_size
        )
        tokens = step_tokens or STEP_TOKENS.get(self.device.type, STEP_TOKENS_ELSEWHERE)
        self.scheduler = Scheduler(self.pool, step_tokens=max(tokens, max_rows), max_rows=max_rows)
        if lookup and draft is not None:
            raise UsageError("a step tries one set of guesses; give lookup or a draft model, not both")
        self._new_drafter: Callable[[], Drafter | None] = PromptLookup if lookup else lambda: None
        if draft is not None:
            self._new_drafter = lambda: DraftModel(draft, self._spelled)
        self._graphs = _graphs(model, self.cache, is_compiled=compile)
        self._lock = threading.Lock()
        self._door = threading.Lock()
        self._incoming: deque[Running] = deque()
        self._thread: threading.Thread | None = None

    def generate(
        self,
        prompts: Several[Several[int] | str],
        sampling: Sampling | Several[Sampling],
        *,
        on_text: OnText | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Completes prompts, as `puna.generate.complete` does.

        Args:
            prompts: ids, BOS included where the model wants it; or texts, which get it.
            sampling: one for all prompts, or one for each.
            on_text: is given (number of the prompt, piece of text) while the texts grow.
            on_completion: is given (number of the prompt, completion) once it is finished.

        Raises:
            PunaError: a prompt cannot be completed; none has been begun then.
            UsageError: not one sampling for each prompt, or texts without a tokenizer.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise UsageError(f"{len(samplings)} samplings for {len(prompts)} prompts; give one for all or one for each")
        numbered = enumerate(zip(prompts, samplings, strict=True))
        sequences = [self._sequence(index, prompt, each, on_text) for index, (prompt, each) in numbered]
        added = [self._new(sequence) for sequence in sequences]
        try:
            with self._lock:
                for running in added:
                    self.scheduler.add(running)
                pending = set(added)
                while pending:
                    for running in pending.intersection(self._step()):
                        pending.remove(running)
                        if on_completion:
                            on_completion(running.sequence.index, running.sequence.completion())
        finally:
            for running in added:
                running.is_cancelled = True
            with self._lock:
                self.scheduler.drop_finished()
        return [sequence.completion() for sequence in sequences]

    async def stream(self, prompt: Several[int] | str, **sampling: Any) -> AsyncIterator[str]:
        """The text of a completion while it grows; leaving the loop cancels it and frees its blocks within a step.

        Args:
            prompt: as for `generate`.
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
        running = self._new(sequence, tell)
        self._begin(running)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            running.is_cancelled = True

    def _begin(self, running: Running) -> None:
        with self._door:  # never held during a step: who comes does not wait for it
            self._incoming.append(running)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="puna engine")
                self._thread.start()

    def _serve(self) -> None:
        """Takes steps for `stream` while there is work."""
        while True:
            with self._lock:
                self._let_in()
                self.scheduler.drop_finished()
                with self._door:
                    if self.scheduler.is_idle and not self._incoming:
                        self._thread = None
                        return
                live = [*self.scheduler.running, *self.scheduler.waiting]
                failure: Exception | None = None
                try:
                    self._step()
                except Exception as error:  # all that were in meet it
                    failure = error
                    for running in live:
                        running.is_cancelled = True
                for running in live:
                    if running.is_done and running.on_end is not None:
                        running.on_end(failure)

    def _let_in(self) -> None:
        while self._incoming:
            running = self._incoming.popleft()
            try:
                self.scheduler.add(running)
            except PunaError as error:
                assert running.on_end is not None
                running.on_end(error)

    @torch.inference_mode()
    def _step(self) -> list[Running]:
        """Computes the next step; returns the sequences that ended in it."""
        chunks = self.scheduler.next_step()
        if not chunks:
            return []
        asked = self._compute(chunks)
        for chunk, logits in zip(chunks, asked, strict=True):
            if logits is not None:
                self._take(chunk, logits)
            self.scheduler.advance(chunk)
        self.scheduler.drop_finished()
        return [chunk.running for chunk in chunks if chunk.running.is_done]

    def _compute(self, chunks: list[Chunk]) -> "list[_Logits | None]":
        """What stands behind each chunk's last tokens, as many as it may take; None where its prompt goes on."""
        if self._graphs is not None and self._graphs.takes(chunks):
            logits = _Logits.of(self._graphs.logits(chunks), self._spelled)
            return [logits.part(row, 1) for row in range(len(chunks))]
        self.cache.step = Step.of(chunks, self.cache)
        ids = torch.tensor([id for chunk in chunks for id in chunk.ids])
        positions = torch.tensor([place for chunk in chunks for place in range(chunk.start, chunk.stop)])
        hidden = self.model.hidden(
            ids.to(self.device)[None], positions=positions.to(self.device)[None], cache=self.cache
        )[0]
        rows: list[int] = []
        parts: list[tuple[int, int]] = []  # of `rows`: where a chunk's begin, and how many they are
        end = 0
        for chunk in chunks:
            size = chunk.stop - chunk.start
            count = min(1 + len(chunk.running.drafts), size) if chunk.is_last else 0
            end += size
            parts.append((len(rows), count))
            rows += range(end - count, end)
        if not rows:
            return [None] * len(chunks)
        logits = _Logits.of(self.model.lm_head(hidden[torch.tensor(rows, device=self.device)]), self._spelled)
        return [logits.part(start, count) if count else None for start, count in parts]

    def _take(self, chunk: Chunk, logits: "_Logits") -> None:
        """Lets a sequence choose, and go on with its guesses as long as they are what it chose."""
        sequence, drafts = chunk.running.sequence, chunk.running.drafts
        right = 0
        for row in range(len(logits)):
            if sequence.takes_likeliest:
                sequence.take_id(logits.likeliest[row])
            else:
                sequence.take(logits.row(row))
            if sequence.finish is not None or row == len(drafts) or sequence.tokens[-1] != drafts[row]:
                break
            right += 1
        if chunk.running.drafter is not None:
            chunk.running.drafter.learn(min(len(drafts), len(logits) - 1), right)

    def _sequence(self, index: int, prompt: Several[int] | str, sampling: Sampling, on_text: OnText | None) -> Sequence:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("texts need a tokenizer; give token ids instead")
            prompt = self.tokenizer.encode(prompt, bos=True)
        return Sequence(index, prompt, sampling, self.model.config, self.tokenizer, on_text)

    def _new(self, sequence: Sequence, on_end: Callable[[BaseException | None], None] | None = None) -> Running:
        return Running(sequence, self._new_drafter(), on_end=on_end)

    @property
    def _spelled(self) -> int:
        return self.model.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size

    def _room(self, max_rows: int, draft: Llama | None) -> int:
        """Tokens of cache that memory allows on every rank, and that so many rows could ever use."""
        config = self.model.config
        token = token_bytes(config, self._dtype)
        share = CACHE_SHARE.get(self.device.type, CACHE_SHARE_ELSEWHERE)
        if self._group is not None and self.device.type != "cpu":  # ranks on a CPU share its memory as well
            token //= self._group.size()
        token += 0 if draft is None else draft_token_bytes(draft)
        most = max_rows * config.max_position_embeddings
        room = max(BLOCK_TOKENS, min(most, int(free_memory_bytes(self.device) * share / token)))
        return all_min(room, self._group)


def _graphs(model: Llama, cache: PagedCache, *, is_compiled: bool) -> "DecodeGraphs | None":
    """Recorded decoding steps, where the device has them."""
    if not takes_cuda_kernels(cache.device.type):
        return None
    from puna.generate.engine.graphs import DecodeGraphs

    return DecodeGraphs(model, cache, is_compiled=is_compiled)


@dataclass
class _Logits:
    """Logits (n, V) on the device, and the likeliest id of each row, which is asked for once for all."""

    logits: Tensor
    likeliest: list[int]

    @classmethod
    def of(cls, logits: Tensor, spelled: int) -> "_Logits":
        """Of ids below `spelled`; refuses what is no number."""
        best, ids = logits[:, :spelled].max(-1)
        check_numbers(best)
        return cls(logits, ids.tolist())

    def part(self, start: int, count: int) -> "_Logits":
        """Some of the rows."""
        return _Logits(self.logits[start : start + count], self.likeliest[start : start + count])

    def row(self, number: int) -> Tensor:
        """One row on the CPU, in fp32."""
        return self.logits[number].float().cpu()

    def __len__(self) -> int:
        return len(self.likeliest)
