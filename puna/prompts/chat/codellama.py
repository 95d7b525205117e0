r"""Code Llama 7B, 13B and 34B Instruct (and Llama 2 chat).

    BOS "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]" " {answer} " EOS
    BOS "[INST] {question} [/INST]" " {answer} " EOS …

Contents are stripped; each turn has a BOS of its own. The blank between answer and EOS is a target too: the model
learns EOS after it, and would not come to it otherwise.

Source: facebookresearch/codellama, `llama/generation.py`, `chat_completion`.
"""

from collections.abc import Sequence

from puna.prompts.dialog import ChatTemplate, Encoded, Message, UnusableDialog, read_dialog
from puna.tokenizer import Tokenizer

JINJA = r"""
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant must take turns') }}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- else -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' if has_system and loop.first else '' -%}
{{ bos_token + '[INST] ' + (system + message['content']) | trim + ' [/INST]' }}
{%- endif -%}
{%- endfor -%}
""".strip()

#: Texts that a message may not hold, as in the reference: the model could not tell them from the layout's own.
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")


class CodeLlama(ChatTemplate):
    name = "codellama"
    jinja = JINJA

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        dialog = read_dialog(messages)
        refuse_tags(messages)
        encoded = Encoded()
        for i, (question, answer) in enumerate(dialog.turns):
            if i == 0 and dialog.system is not None:
                question = f"<<SYS>>\n{dialog.system}\n<</SYS>>\n\n{question}"
            encoded.given(tokenizer.encode(f"[INST] {question.strip()} [/INST]", bos=True))
            if answer is not None:
                encoded.learned(tokenizer.encode(f" {answer.strip()} ", eos=True, leading_space=False))
        return encoded


def refuse_tags(messages: Sequence[Message]) -> None:
    """Raises `UnusableDialog` if a message holds one of the layout's own tags."""
    for tag in TAGS:
        if any(tag in message["content"] for message in messages):
            raise UnusableDialog("holds the layout's own tags", tag)


TEMPLATE = CodeLlama()
