"""No layout at all: the answer continues the question. For base models.

BOS "{question}" "{answer}" EOS
"""

from collections.abc import Sequence

from puna.prompts.dialog import ChatTemplate, Encoded, Message, only_turn
from puna.tokenizer import Tokenizer

JINJA = r"""
{%- if messages[0]['role'] != 'user' or messages | length > 2 -%}
{{ raise_exception('one question and one answer') }}
{%- endif -%}
{{ bos_token + messages[0]['content'] }}
{%- if messages | length == 2 -%}
{{ messages[1]['content'] + eos_token }}
{%- endif -%}
""".strip()


class Plain(ChatTemplate):
    name = "plain"
    jinja = JINJA

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        question, answer = only_turn(messages)
        encoded = Encoded()
        encoded.given(tokenizer.encode(question, bos=True))
        if answer is not None:
            encoded.learned(tokenizer.encode(answer, eos=True, leading_space=False))
        return encoded


TEMPLATE = Plain()
