r"""Code Llama 70B Instruct, which ends its messages with `<step>`, not EOS.

    BOS                                                    each text in quotes is encoded on its own
    " Source: system"    "\n\n {system}"   <step>          always there; without its text where there is none
    " Source: user"      "\n\n {question}" <step>
    " Source: assistant" "\n\n {answer}"   <step> …
    " Source: assistant\nDestination: user" "\n\n "        asks for an answer; "{answer}" <step> follow

Contents are stripped. An answer that ends the dialog follows the line that asks for it, as when the model gives it;
earlier ones are history, which the reference writes without `Destination`.

Source: facebookresearch/codellama, `llama/generation.py`, `dialog_prompt_tokens`.
"""

from collections.abc import Sequence

from puna.errors import PunaError
from puna.prompts.chat.codellama import refuse_tags
from puna.prompts.dialog import ChatTemplate, Encoded, Message, read_dialog
from puna.tokenizer import Tokenizer


class CodeLlama70B(ChatTemplate):
    name = "codellama-70b"

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        dialog = read_dialog(messages)
        refuse_tags(messages)
        step = [_step_id(tokenizer)]
        encoded = Encoded([tokenizer.bos_id], [False])
        encoded.given(tokenizer.encode(" Source: system"))
        if dialog.system:
            encoded.given(tokenizer.encode(f"\n\n {dialog.system.strip()}"))
        encoded.given(step)
        for question, answer in dialog.turns[:-1]:
            self._question(encoded, tokenizer, question)
            encoded.given(tokenizer.encode(" Source: assistant") + tokenizer.encode("\n\n"))
            encoded.learned(tokenizer.encode(f" {(answer or '').strip()}", leading_space=False) + step)
        question, answer = dialog.turns[-1]
        self._question(encoded, tokenizer, question)
        encoded.given(tokenizer.encode(" Source: assistant\nDestination: user") + tokenizer.encode("\n\n "))
        if answer is not None:
            encoded.learned(tokenizer.encode(answer.strip(), leading_space=False) + step)
        return encoded

    def stops(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """`<step>`; and EOS, which the model is not taught but may give."""
        return (_step_id(tokenizer), tokenizer.eos_id)

    def _question(self, encoded: Encoded, tokenizer: Tokenizer, question: str) -> None:
        encoded.given(tokenizer.encode(" Source: user") + tokenizer.encode(f"\n\n {question.strip()}"))
        encoded.given([_step_id(tokenizer)])


def _step_id(tokenizer: Tokenizer) -> int:
    if tokenizer.step_id is None:
        raise PunaError(
            f"the vocabulary of {tokenizer.path} has no <step>; the layout codellama-70b is for 70B Instruct"
        )
    return tokenizer.step_id


TEMPLATE = CodeLlama70B()
