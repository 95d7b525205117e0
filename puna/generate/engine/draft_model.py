"""Guesses by a small model of the same vocabulary, e.g. 7B for 34B: what it finds likeliest, some tokens ahead.

    the text           a b c d            the sequence's, of the large model
    what it has read   a b c x y          from its last guesses: x was wrong
    catches up         a b c d            computes d in the place of x
    guesses            a b c d | e f g    a step of the small model each; the large one checks all in one

All sequences guess together, so that a step of the small model reads its weights once for all of them. Its keys and
values lie in the blocks that the sequences hold of the large model's: what is known of a prompt, and what was given up,
is so for both.
"""

import torch

from puna.generate.engine.runner import Runner
from puna.generate.engine.scheduler import Chunk, Running
from puna.model.llama import Llama


class DraftModel:
    """Guesses what `model` would say, greedily; as `puna.generate.engine.drafts.Drafter`.

    A text that holds an id which the model does not know, or is longer than its context, is not guessed.

    Args:
        model: the small one, on any device.
        vocab_size: ids from here on the large model never chooses; they are not guessed.
        n_blocks, block_tokens: the blocks of the large model's sequences.
        cache_dtype: as for `Runner`.
    """

    first, _most = 5, 16

    def __init__(
        self, model: Llama, vocab_size: int, n_blocks: int, block_tokens: int, *, cache_dtype: str | None = None
    ) -> None:
        self._config = model.config
        choices = min(vocab_size, model.config.vocab_size)
        self._runner = Runner(model, n_blocks, block_tokens, choices=choices, cache_dtype=cache_dtype)
        self._runner.cache.zero()  # of a known block that it never read, all ranks see the same, and guess alike

    @torch.inference_mode()
    def read(self, chunks: list[Chunk]) -> None:
        """As `Drafter`: computes what the large model did where nothing was guessed, prompts above all."""
        chunks = [chunk for chunk in chunks if not chunk.running.drafts and self._can_read(chunk)]
        if chunks:
            self._runner.compute(chunks)
        for chunk in chunks:
            chunk.running.drafted = chunk.stop

    @torch.inference_mode()
    def guess(self, wanted: list[tuple[Running, int]]) -> None:
        """As `Drafter`: one more token of all sequences a step, until each has what it wants."""
        context = self._config.max_position_embeddings
        left = {running: min(most, context - len(running.tokens)) for running, most in wanted}
        chunks = [Chunk(running, running.drafted, len(running.tokens)) for running, most in left.items() if most > 0]
        chunks = sorted(filter(self._can_read, chunks), key=lambda chunk: len(chunk) > 1)
        while chunks:
            for chunk, logits in zip(chunks, self._runner.compute(chunks), strict=True):
                assert logits is not None
                chunk.running.drafts.append(logits.likeliest[-1])
                chunk.running.drafted = chunk.stop
            chunks = [
                Chunk(chunk.running, chunk.stop, chunk.stop + 1)
                for chunk in chunks
                if len(chunk.running.drafts) < left[chunk.running]
            ]

    def next_length(self, length: int, guessed: int, right: int) -> int:
        """As `Drafter`: two more where all were right, one fewer otherwise.

        Source: the heuristic schedule of transformers' assisted generation.
        """
        return min(self._most, length + 2) if right == guessed else max(1, length - 1)

    def _can_read(self, chunk: Chunk) -> bool:
        """Whether it knows what stands before a chunk and in it."""
        return (
            chunk.start == chunk.running.drafted
            and chunk.stop <= self._config.max_position_embeddings
            and max(chunk.ids) < self._config.vocab_size
        )
