r"""Stanford Alpaca: one instruction, one answer.

    BOS "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n
         ### Instruction:\n{question}\n\n### Response:" "{answer}" EOS

The layout has no system message and no second turn. A question that is the result of `alpaca_prompt` is taken as it is.

Source: tatsu-lab/stanford_alpaca, `train.py`, `PROMPT_DICT`.
"""

import json
from collections.abc import Sequence

from puna.prompts.dialog import ChatTemplate, Encoded, Message, only_turn
from puna.tokenizer import Tokenizer

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

JINJA = (
    r"""
{%- if messages[0]['role'] != 'user' or messages | length > 2 -%}
{{ raise_exception('one question and one answer') }}
{%- endif -%}
{%- set asked = messages[0]['content'] -%}
{%- if asked.startswith('Below is an instruction that describes a task') and asked.endswith('\n\n### Response:') -%}
{{ bos_token + asked }}
{%- else -%}
{{ bos_token + BEFORE + asked + BEHIND }}
{%- endif -%}
{%- if messages | length == 2 -%}
{{ messages[1]['content'] + eos_token }}
{%- endif -%}
""".strip()
    .replace("BEFORE", json.dumps(_WITHOUT_INPUT.partition("{instruction}")[0]))
    .replace("BEHIND", json.dumps(_WITHOUT_INPUT.partition("{instruction}")[2]))
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of an Alpaca record, with its second paragraph where it has an input."""
    return (_WITH_INPUT if input else _WITHOUT_INPUT).format(instruction=instruction, input=input)


class Alpaca(ChatTemplate):
    name = "alpaca"
    jinja = JINJA

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        question, answer = only_turn(messages)
        encoded = Encoded()
        encoded.given(tokenizer.encode(question if _is_prompt(question) else alpaca_prompt(question), bos=True))
        if answer is not None:
            encoded.learned(tokenizer.encode(answer, eos=True, leading_space=False))
        return encoded


def _is_prompt(text: str) -> bool:
    return text.startswith("Below is an instruction that describes a task") and text.endswith("\n\n### Response:")


TEMPLATE = Alpaca()
