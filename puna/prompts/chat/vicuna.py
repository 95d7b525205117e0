r"""Vicuna v1.1.

    BOS "{system} USER: {question} ASSISTANT:" " {answer}" EOS
        "USER: {question} ASSISTANT:" " {answer}" EOS …

One BOS; each round is encoded on its own, so the first word of every round takes the implicit leading space.

Source: lm-sys/FastChat, `conversation.py`, `vicuna_v1.1`; rounds as in MindFormers r1.5 `llama_preprocess.py`.
"""

import json
from collections.abc import Sequence

from puna.prompts.dialog import ChatTemplate, Encoded, Message, read_dialog
from puna.tokenizer import Tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

JINJA = r"""
{%- set has_system = messages[0]['role'] == 'system' -%}
{{ bos_token + (messages[0]['content'] if has_system else 'SYSTEM') + ' ' }}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant must take turns') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
""".strip().replace("'SYSTEM'", json.dumps(SYSTEM))


class Vicuna(ChatTemplate):
    name = "vicuna"
    jinja = JINJA

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        dialog = read_dialog(messages)
        encoded = Encoded([tokenizer.bos_id], [False])
        before = f"{SYSTEM if dialog.system is None else dialog.system} "
        for question, answer in dialog.turns:
            encoded.given(tokenizer.encode(f"{before}USER: {question} ASSISTANT:"))
            before = ""
            if answer is not None:
                encoded.learned(tokenizer.encode(f" {answer}", eos=True, leading_space=False))
        return encoded


TEMPLATE = Vicuna()
