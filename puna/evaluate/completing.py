"""Texts completed by a model, for benchmarks: greedy, in batches, whatever the length of the prompts."""

from typing import Any


class Completer:
    """Completes texts; where a prompt is longer than the model's context allows, its beginning is cut off.

    Args:
        model: to complete with.
        tokenizer: the model's.
        max_tokens: most tokens of a completion.
        stop: a completion ends before the first of these.
        batch_rows: prompts that are completed together.

    Attributes:
        cut_prompts: how many prompts were cut so far.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int, stop: tuple[str, ...], batch_rows: int) -> None:
        from puna.generate import Sampling

        context = model.config.max_position_embeddings
        self.model, self.tokenizer, self.batch_rows = model, tokenizer, batch_rows
        self.sampling = Sampling(max_tokens=max_tokens, stop=stop)
        self.longest_prompt = max(1, context - max_tokens, context // 2)
        self.cut_prompts = 0

    def __call__(self, prompts: list[str]) -> list[str]:
        """The completions of texts."""
        from puna.generate import complete

        tokens = [self._encoded(prompt) for prompt in prompts]
        completions = complete(self.model, self.tokenizer, tokens, self.sampling, batch_rows=self.batch_rows)
        return [completion.text for completion in completions]

    def _encoded(self, prompt: str) -> list[int]:
        first, *tokens = self.tokenizer.encode(prompt, bos=True)
        room = self.longest_prompt - 1
        if len(tokens) <= room:
            return [first, *tokens]
        self.cut_prompts += 1
        return [first, *tokens[len(tokens) - room :]]
