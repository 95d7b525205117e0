"""Completions that begin inside a word: the model splits it anew, the text is what stands behind the prompt."""

from pathlib import Path

import pytest
import torch

import puna
from puna.errors import PunaError, UsageError
from puna.generate import Sampling, complete
from puna.generate.engine import Engine
from puna.prompts import heal, infill_prompt
from puna.testing import ScriptedModel, tiny_model
from puna.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from puna.tokenizer.sentence_piece import BYTE, UNUSED, read_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary with the pieces `imp` and `import`, and both behind a space."""
    text = "import os\nimport re\nx = imp\ndef f(x):\n    return x\n\n    self.imp\n(imp)\n(import)\n"
    return train_tokenizer([text] * 50, tmp_path_factory.mktemp("words"), vocab_size=346)


def saying(tokenizer: Tokenizer, text: str, prompt: list[int]) -> ScriptedModel:
    """A model that says a text, split as the vocabulary splits it, behind a prompt."""
    ids = tokenizer.encode(text, leading_space=False)
    return ScriptedModel([*ids, tokenizer.eos_id], prompt_tokens=len(prompt))


def test_a_word_goes_on_in_the_models_own_split(tokenizer: Tokenizer) -> None:
    prompt, cut = heal(tokenizer, tokenizer.encode("x\nimp", bos=True))
    assert cut == b"imp"
    assert tokenizer.id_of("import") is not None
    model = saying(tokenizer, "import os", prompt)
    pieces: list[str] = []
    (completion,) = puna.generate(
        model, tokenizer, "x\nimp", healing=True, on_text=lambda _, piece: pieces.append(piece)
    )
    assert completion.text == "".join(pieces) == "ort os"
    assert completion.tokens[0] == tokenizer.id_of("import")
    assert completion.finish == "stop"
    assert complete(model, tokenizer, [prompt], Sampling(begins_with=cut)) == [completion]


def test_what_the_model_would_rather_say_gives_way_to_what_is_written(tokenizer: Tokenizer) -> None:
    prompt, _ = heal(tokenizer, tokenizer.encode("x\nimp", bos=True))
    model = saying(tokenizer, "zzzzzzzz", prompt)
    text = puna.generate(model, tokenizer, "x\nimp", healing=True, max_tokens=12)[0].text
    assert text == "zzzzzzzzz"[: len(text)]
    assert text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", ["x\nimp", "imp", "(impo", "x re", "    return "])
def test_prompt_and_text_are_what_all_tokens_spell(tokenizer: Tokenizer, prompt: str, temperature: float) -> None:
    model = tiny_model()
    kept, cut = heal(tokenizer, tokenizer.encode(prompt, bos=True))
    assert cut
    for seed in range(5):
        sampling = Sampling(begins_with=cut, temperature=temperature, seed=seed, max_tokens=20, logprobs=1)
        (plain,) = complete(model, tokenizer, [kept], sampling)
        spelled = tokenizer.decode_bytes([*kept, *plain.tokens])
        assert spelled.startswith(prompt.encode())
        assert plain.text == spelled[len(prompt.encode()) :].decode(errors="replace")
        (fast,) = Engine(model, tokenizer, lookup=True, cache_tokens=64).generate([kept], sampling)
        assert (fast.tokens, fast.text) == (plain.tokens, plain.text)
        likelihoods = model(torch.tensor([kept]))[0, -1, : tokenizer.vocab_size].log_softmax(0)
        assert plain.logprobs[0].chosen == pytest.approx(likelihoods[plain.tokens[0]].item(), abs=1e-4)


def test_a_stop_string_in_the_prompt_does_not_stop(tokenizer: Tokenizer) -> None:
    prompt, _ = heal(tokenizer, tokenizer.encode("x\nimp", bos=True))
    model = saying(tokenizer, "import imp", prompt)
    assert puna.generate(model, tokenizer, "x\nimp", healing=True, stop=("imp",))[0].text == "ort "


def test_infilling_heals_in_spm_order_alone(tokenizer: Tokenizer) -> None:
    ask = ("x\nimp", "\nos.getcwd()")
    spm, cut = heal(tokenizer, infill_prompt(tokenizer, *ask, order="spm"))
    healed = puna.infill(saying(tokenizer, "import os", spm), tokenizer, *ask, order="spm")
    assert (healed.text, healed.prompt_tokens, cut) == ("ort os", len(spm), b"imp")
    for order, healing in (("psm", True), ("psm", False), ("spm", False)):
        prompt = infill_prompt(tokenizer, *ask, order=order)  # type: ignore[arg-type]
        model = saying(tokenizer, "ort os", prompt)
        plain = puna.infill(model, tokenizer, *ask, order=order, healing=healing)
        assert (plain.text, plain.prompt_tokens) == ("ort os", len(prompt))


def test_what_cannot_be_spelled_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="begins_with needs a tokenizer"):
        complete(tiny_model(), None, [[1]], Sampling(begins_with=b"x"))
    with pytest.raises(UsageError, match="begins_with='x' must be bytes"):
        Sampling(begins_with="x")  # type: ignore[arg-type]
    (tmp_path / "tokenizer.model").write_bytes(_without_bytes(tokenizer))
    with pytest.raises(PunaError, match=r"vocabulary cannot spell b'\\xff', which prompt 0 asks for"):
        complete(tiny_model(), load_tokenizer(tmp_path), [[1]], Sampling(begins_with=b"\xff"))


def _without_bytes(tokenizer: Tokenizer) -> bytes:
    model = read_model(tokenizer.path)
    model.trainer_spec.byte_fallback = False
    for piece in model.pieces:
        piece.type = UNUSED if piece.type == BYTE else piece.type
    return model.SerializeToString()
