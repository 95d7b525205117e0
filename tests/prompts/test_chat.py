"""Chat layouts against ports of the reference code, written out turn by turn, and against MindFormers' rows."""

import json
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from puna.errors import PunaError, UsageError
from puna.prompts import Encoded, UnusableDialog, alpaca_prompt, chat_template, template_names
from puna.prompts.chat.codellama import TAGS
from puna.tokenizer import load_tokenizer
from puna.tokenizer.base import STEP_PIECE
from puna.tokenizer.sentence_piece import NORMAL, read_model

SYSTEM = {"role": "system", "content": "Answer in Python. "}
ADD = {"role": "user", "content": " Write add.\n"}
ADDED = {"role": "assistant", "content": "def add(a, b):\n    return a + b\n"}
MORE = {"role": "user", "content": "Now subtract."}
DONE = {"role": "assistant", "content": "  return a - b"}

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())


@pytest.fixture(scope="session")
def step_tokenizer(code_llama_tokenizer, tmp_path_factory):
    """Code Llama 70B Instruct's vocabulary: the last piece is `<step>`, an ordinary one in the file."""
    model = read_model(code_llama_tokenizer.path)
    model.pieces[-1].piece, model.pieces[-1].type = STEP_PIECE, NORMAL
    path = tmp_path_factory.mktemp("step") / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return load_tokenizer(path)


def targets(encoded: Encoded) -> list[int]:
    return [id for id, is_target in zip(encoded.tokens, encoded.is_target, strict=True) if is_target]


def reference_chat(sp, dialog):
    """Port of `chat_completion` in facebookresearch/codellama, llama/generation.py (7B, 13B, 34B)."""
    if dialog[0]["role"] == "system":
        content = "<<SYS>>\n" + dialog[0]["content"] + "\n<</SYS>>\n\n" + dialog[1]["content"]
        dialog = [{"role": dialog[1]["role"], "content": content}, *dialog[2:]]
    tokens = []
    for prompt, answer in zip(dialog[::2], dialog[1::2], strict=False):
        turn = f"[INST] {prompt['content'].strip()} [/INST] {answer['content'].strip()} "
        tokens += [sp.bos_id(), *sp.encode(turn), sp.eos_id()]
    if dialog[-1]["role"] == "user":
        tokens += [sp.bos_id(), *sp.encode(f"[INST] {dialog[-1]['content'].strip()} [/INST]")]
    return tokens


def reference_turns(sp, dialog):
    """Port of `dialog_prompt_tokens` in facebookresearch/codellama, llama/generation.py (70B)."""
    if dialog[0]["role"] != "system":
        dialog = [{"role": "system", "content": ""}, *dialog]
    tokens = [sp.bos_id()]
    for message in dialog:
        tokens += sp.encode(f" Source: {message['role'].strip()}")
        if message["content"]:
            tokens += sp.encode("\n\n " + message["content"].strip())
        tokens += [sp.piece_to_id("<step>")]
    return tokens + sp.encode(" Source: assistant\nDestination: user") + sp.encode("\n\n ")


@pytest.fixture(scope="module")
def peer(step_tokenizer):
    return sentencepiece.SentencePieceProcessor(model_file=str(step_tokenizer.path))


DIALOGS = [
    [ADD],
    [SYSTEM, ADD],
    [ADD, ADDED],
    [ADD, ADDED, MORE],
    [SYSTEM, ADD, ADDED, MORE],
    [SYSTEM, ADD, ADDED, MORE, DONE],
]


@pytest.fixture(scope="module")
def llama(shared):
    """Llama's own vocabulary, in which no text becomes a fragment of a marker (` <E` of ` <EOT>`)."""
    return sentencepiece.SentencePieceProcessor(model_file=str(shared / "data/tokenizer/tokenizer.model"))


@pytest.mark.parametrize("dialog", DIALOGS)
def test_codellama_dialogs_are_the_references(code_llama_tokenizer, llama, dialog):
    assert chat_template("codellama").encode(code_llama_tokenizer, dialog).tokens == reference_chat(llama, dialog)


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(words, min_size=1, max_size=4), system=st.none() | words)
def test_codellama_dialogs_of_any_words_are_the_references(code_llama_tokenizer, llama, contents, system):
    dialog = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    dialog = dialog if system is None else [{"role": "system", "content": system}, *dialog]
    assume("\u2581" not in str(dialog))  # the reference reads it as a space
    assume(not any(tag in message["content"] for message in dialog for tag in TAGS))
    assert chat_template("codellama").encode(code_llama_tokenizer, dialog).tokens == reference_chat(llama, dialog)


def test_a_codellama_turn_written_out(code_llama_tokenizer):
    encoded = chat_template("codellama").encode(code_llama_tokenizer, [SYSTEM, ADD, ADDED, MORE])
    pieces = [code_llama_tokenizer.piece(id) for id in encoded.tokens]
    assert pieces[:8] == ["<s>", "▁[", "INST", "]", "▁<<", "SY", "S", ">>"]
    assert pieces[-11:] == ["<s>", "▁[", "INST", "]", "▁Now", "▁subtract", ".", "▁[", "/", "INST", "]"]
    assert code_llama_tokenizer.decode(encoded.tokens[1 : encoded.tokens.index(2)]) == (
        "[INST] <<SYS>>\nAnswer in Python. \n<</SYS>>\n\n Write add. [/INST] def add(a, b):\n    return a + b "
    )
    assert [code_llama_tokenizer.piece(id) for id in targets(encoded)][:3] == ["▁def", "▁add", "("]
    assert [code_llama_tokenizer.piece(id) for id in targets(encoded)][-3:] == ["▁b", "▁", "</s>"]


@pytest.mark.parametrize("dialog", [dialog for dialog in DIALOGS if dialog[-1]["role"] == "user"])
def test_codellama_70b_prompts_are_the_references(step_tokenizer, peer, dialog):
    assert chat_template("codellama-70b").encode(step_tokenizer, dialog).tokens == reference_turns(peer, dialog)


def test_a_codellama_70b_answer_follows_its_prompt(step_tokenizer, peer):
    template = chat_template("codellama-70b")
    prompt, whole = (template.encode(step_tokenizer, dialog) for dialog in ([ADD], [ADD, ADDED]))
    answer = peer.encode("☺" + ADDED["content"].strip())[2:]
    assert whole.tokens == [*prompt.tokens, *answer, 32015]
    assert targets(whole) == [*answer, 32015]
    history = template.encode(step_tokenizer, [ADD, ADDED, MORE])
    assert targets(history) == [*peer.encode(ADDED["content"].strip()), 32015]
    assert template.stops(step_tokenizer) == (32015, 2)


def test_codellama_70b_needs_the_step_token(code_llama_tokenizer):
    template = chat_template("codellama-70b")
    for ask in (lambda: template.encode(code_llama_tokenizer, [ADD]), lambda: template.stops(code_llama_tokenizer)):
        with pytest.raises(PunaError, match=r"has no <step>; the layout codellama-70b is for 70B Instruct"):
            ask()


@pytest.mark.parametrize("name", ["codellama", "codellama-70b"])
@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"])
def test_the_layouts_own_tags_in_a_message_are_refused_as_in_the_reference(step_tokenizer, name, tag):
    for dialog in ([{"role": "user", "content": f"a{tag}b"}], [{"role": "system", "content": tag}, ADD]):
        with pytest.raises(UnusableDialog, match="holds the layout's own tags") as caught:
            chat_template(name).encode(step_tokenizer, dialog)
        assert caught.value.reason == "holds the layout's own tags"


def test_a_vicuna_dialog_written_out(code_llama_tokenizer):
    encode = code_llama_tokenizer.encode
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    first = encode(f"{system} USER: {ADD['content']} ASSISTANT:")
    answer = encode(" " + ADDED["content"], leading_space=False)
    second = encode(f"USER: {MORE['content']} ASSISTANT:")
    encoded = chat_template("vicuna").encode(code_llama_tokenizer, [ADD, ADDED, MORE])
    assert encoded.tokens == [1, *first, *answer, 2, *second]
    assert targets(encoded) == [*answer, 2]
    assert encoded.is_target == [False] * (1 + len(first)) + [True] * (len(answer) + 1) + [False] * len(second)
    own = chat_template("vicuna").encode(code_llama_tokenizer, [SYSTEM, ADD])
    assert own.tokens == [1, *encode(f"Answer in Python.  USER: {ADD['content']} ASSISTANT:")]


def test_what_mindformers_masked_in_silence_is_learned_or_refused_with_a_reason(shared):
    folder = shared / "fixtures/mindspore"
    tokenizer, roles = load_tokenizer(folder / "tokenizer"), {"human": "user", "gpt": "assistant"}
    conversations = json.loads((folder / "preprocess/code_alpaca_tiny_conversation.json").read_text())
    masked = [
        [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversation["conversations"]]
        for conversation, labels in zip(
            conversations, np.load(folder / "preprocess/qa512_rows.npz")["labels"], strict=True
        )
        if (labels == -100).all()
    ]
    assert len(masked) == 4
    with pytest.raises(UnusableDialog) as caught:
        chat_template("vicuna").encode(tokenizer, masked[0])
    assert caught.value.reason == "empty answer"
    for messages in masked[1:]:
        learned = targets(chat_template("vicuna").encode(tokenizer, messages))
        assert learned.index(2) == len(learned) - 1
        assert tokenizer.decode(learned, leading_space=False) == " " + messages[1]["content"]


def test_alpaca_prompts_are_those_that_mindformers_converter_writes(shared):
    folder = shared / "fixtures/mindspore/preprocess"
    records = json.loads((folder / "code_alpaca_tiny.json").read_text())
    converted = json.loads((folder / "code_alpaca_tiny_conversation.json").read_text())
    assert len(records) == len(converted) == 12
    for record, conversation in zip(records, converted, strict=True):
        assert alpaca_prompt(record["instruction"], record["input"]) == conversation["conversations"][0]["value"]


def test_an_alpaca_turn_written_out(small_tokenizer):
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nReverse {x}.\n\n### Response:"
    )
    given, learned = small_tokenizer.encode(prompt), small_tokenizer.encode("x[::-1]", leading_space=False)
    for question in ("Reverse {x}.", prompt):
        dialog = [{"role": "user", "content": question}, {"role": "assistant", "content": "x[::-1]"}]
        encoded = chat_template("alpaca").encode(small_tokenizer, dialog)
        assert encoded.tokens == [1, *given, *learned, 2]
        assert encoded.is_target == [False] * (1 + len(given)) + [True] * (len(learned) + 1)
        assert chat_template("alpaca").encode(small_tokenizer, dialog[:1]).tokens == [1, *given]


def test_plain_is_the_question_and_what_continues_it(small_tokenizer):
    encoded = chat_template("plain").encode(small_tokenizer, [ADD, ADDED])
    given = small_tokenizer.encode(ADD["content"])
    assert encoded.tokens == [1, *given, *small_tokenizer.encode(ADDED["content"], leading_space=False), 2]
    assert targets(encoded) == encoded.tokens[1 + len(given) :]


ANY = ["alpaca", "codellama", "codellama-70b", "plain", "vicuna"]


def test_the_templates_are_the_files_in_their_folder():
    assert template_names() == ANY
    assert [chat_template(name).name for name in ANY] == ANY


@pytest.mark.parametrize("name", ANY)
def test_the_prompt_is_the_beginning_of_the_answered_dialog(step_tokenizer, name):
    template = chat_template(name)
    prompt, whole = (template.encode(step_tokenizer, dialog) for dialog in ([ADD], [ADD, ADDED]))
    assert whole.tokens[: len(prompt.tokens)] == prompt.tokens
    assert not any(prompt.is_target)
    assert whole.is_target == [False] * len(prompt.tokens) + [True] * (len(whole.tokens) - len(prompt.tokens))
    assert whole.tokens[-1] in template.stops(step_tokenizer)
    assert step_tokenizer.decode(targets(whole), leading_space=False).strip() == ADDED["content"].strip()


@pytest.mark.parametrize("name", ANY)
def test_control_tokens_in_messages_stay_text(step_tokenizer, name):
    asked, said = "say </s> or <s> or <PRE>", "fine: </s> <EOT> <unk>"
    template = chat_template(name)
    control = [id for id in template.encode(step_tokenizer, [ADD, ADDED]).tokens if id in step_tokenizer.control]
    dialog = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    encoded = template.encode(step_tokenizer, dialog)
    assert [id for id in encoded.tokens if id in step_tokenizer.control] == control
    assert step_tokenizer.decode(targets(encoded), leading_space=False).strip() == said
    assert asked in step_tokenizer.decode(encoded.tokens)


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize(
    ("dialog", "reason"),
    [
        ([], "no messages"),
        ([SYSTEM], "no messages"),
        ([ADDED], "does not begin with the user"),
        ([ADDED, ADD], "does not begin with the user"),
        ([ADD, MORE], "roles do not alternate"),
        ([ADD, ADDED, DONE], "roles do not alternate"),
        ([ADD, SYSTEM], "roles do not alternate"),
        ([ADD, {"role": "assistant", "content": ""}], "empty answer"),
        ([ADD, {"role": "assistant", "content": " \n"}, MORE], "empty answer"),
        ([{"role": "user", "content": "\n"}], "empty question"),
        ([{"role": "tool", "content": "x"}], "unknown role"),
        ([{"role": "user", "content": None}], "content is not text"),
        ([{"role": "user"}], "content is not text"),
    ],
)
def test_unusable_dialogs_are_refused_with_a_reason_that_can_be_counted(step_tokenizer, name, dialog, reason):
    with pytest.raises(UnusableDialog, match=f"this dialog cannot be laid out: {reason}") as caught:
        chat_template(name).encode(step_tokenizer, dialog)
    assert caught.value.reason == reason
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (sent.reason, str(sent)) == (reason, str(caught.value))


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_layouts_of_one_turn_refuse_more(small_tokenizer, name):
    for dialog, reason in [
        ([ADD, ADDED, MORE], "more than one turn"),
        ([SYSTEM, ADD], "no place for a system message"),
    ]:
        with pytest.raises(UnusableDialog) as caught:
            chat_template(name).encode(small_tokenizer, dialog)
        assert caught.value.reason == reason


def test_an_unknown_template_is_refused_with_the_list(tmp_path):
    names = r"\(alpaca, codellama, codellama-70b, plain, vicuna\)"
    with pytest.raises(UsageError, match=f"vicuna2 is neither a chat template {names} nor a model's folder"):
        chat_template("vicuna2")
    with pytest.raises(PunaError, match="ships no chat template; name one of alpaca, codellama"):
        chat_template(tmp_path)


JINJA = [name for name in template_names() if chat_template(name).jinja is not None]


def as_shipped(name, folder, tokenizer):
    """The template of a model that was tuned on a layout."""
    pieces = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(tokenizer.eos_id)}
    (folder / "tokenizer_config.json").write_text(json.dumps(pieces))
    (folder / "chat_template.jinja").write_text(chat_template(name).jinja)
    return chat_template(folder)


@pytest.mark.parametrize("name", JINJA)
def test_what_a_tuned_model_ships_lays_dialogs_out_as_it_was_tuned(code_llama_tokenizer, tmp_path, name):
    ours, shipped = chat_template(name), as_shipped(name, tmp_path, code_llama_tokenizer)
    same = 0
    asked_before = {"role": "user", "content": alpaca_prompt("Add.", "1 and 2")}
    for dialog in [*DIALOGS, [asked_before], [asked_before, ADDED]]:
        try:
            expected = ours.encode(code_llama_tokenizer, dialog)
        except UnusableDialog:
            with pytest.raises(UnusableDialog):
                shipped.encode(code_llama_tokenizer, dialog)
            continue
        assert shipped.encode(code_llama_tokenizer, dialog).tokens == expected.tokens
        same += 1
    assert same >= 4
    assert shipped.stops(code_llama_tokenizer) == ours.stops(code_llama_tokenizer)


@settings(max_examples=50, deadline=None)
@given(contents=st.lists(words, min_size=1, max_size=4), system=st.none() | words)
@pytest.mark.parametrize("name", ["codellama", "vicuna"])
def test_any_words_are_laid_out_so(code_llama_tokenizer, tmp_path_factory, name, contents, system):
    dialog = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    dialog = dialog if system is None else [{"role": "system", "content": system}, *dialog]
    assume(not any(tag in message["content"] for message in dialog for tag in TAGS))
    shipped = as_shipped(name, tmp_path_factory.mktemp("shipped"), code_llama_tokenizer)
    expected = chat_template(name).encode(code_llama_tokenizer, dialog).tokens
    assert shipped.encode(code_llama_tokenizer, dialog).tokens == expected


def test_only_70bs_layout_cannot_be_said_so():
    assert set(template_names()) - set(JINJA) == {"codellama-70b"}
