"""How text is laid out for a model: infilling and chat, each layout spelled once.

Training, generation, evaluation and serving all call this, so a model is asked in exactly the tokens that it was
trained on. A layout is a sequence of token ids, never one string that is encoded as a whole: text from users is encoded
by itself and cannot become a control token.
"""

from puna.prompts.chat.alpaca import alpaca_prompt
from puna.prompts.dialog import ChatTemplate, Encoded, Message, UnusableDialog
from puna.prompts.healing import heal
from puna.prompts.infilling import check_order, cut_around_gap, infill_document, infill_prompt, infill_stops
from puna.prompts.templates import chat_template, ships_template, template_names

__all__ = [
    "ChatTemplate",
    "Encoded",
    "Message",
    "UnusableDialog",
    "alpaca_prompt",
    "chat_template",
    "check_order",
    "cut_around_gap",
    "heal",
    "infill_document",
    "infill_prompt",
    "infill_stops",
    "ships_template",
    "template_names",
]
