r"""Token healing: a prompt that stops inside a word is cut back, so that the model may split the word as it learned to.

    typed                   import numpy as np\nimp
    split by itself         … \n imp          the model has seen `import` as one token, hardly ever `imp` before `ort`
    healed                  … \n              and the completion must begin with "imp": import | os

Source: "token healing" in guidance (Lundberg, 2023); Code Llama's paper names its lack as the reason why infilling in
spm order does worse where the prefix ends inside a token (arXiv:2308.12950, table 14).
"""

from collections.abc import Sequence

from puna.tokenizer import Tokenizer

#: The most tokens that are cut off; no beginning of a piece of Llama's vocabulary is split into more.
MOST_TOKENS = 8


def heal(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[list[int], bytes]:
    """Cuts off the longest end of a prompt that one token could spell, and more after it.

    Args:
        tokenizer: knows what tokens spell.
        prompt: ids; control ids stay.

    Returns:
        What stays of the prompt, and the bytes that were cut off: the completion must begin with them
        (`Sampling.begins_with`). Nothing is cut where no token goes beyond the end.
    """
    for start in range(max(1, len(prompt) - MOST_TOKENS), len(prompt)):
        end = prompt[start:]
        if tokenizer.control.isdisjoint(end) and tokenizer.unk_id not in end:
            text = tokenizer.decode_bytes(end, leading_space=False)
            if tokenizer.has_piece_beyond(text):
                return list(prompt[:start]), text
    return list(prompt), b""
