"""Text to token ids and back, without loss, whichever files a model ships.

One interface, `Tokenizer`, over two backends: SentencePiece for `tokenizer.model` (the truth for Code Llama) and
Hugging Face `tokenizers` for `tokenizer.json`. Three promises hold for both:

- text never becomes a control token: `</s>`, ` <PRE>` or `<|eot_id|>` in a file are letters like any others;
- decoding what was encoded gives the same text, byte for byte (where the vocabulary can spell every byte and does
  not normalise);
- an id that the vocabulary does not have is an error, never a guess.

The way of `"def f"` through Code Llama's vocabulary:

    encode("def f")                       [822, 285]      ▁def ▁f     SentencePiece puts a space in front
    encode("def f", leading_space=False)  [1753, 285]     def ▁f      inside a line: what infilling needs
    decode([822, 285])                    "def f"                     the space that encode put in is taken out
    decode([822, 285], leading_space=False)  " def f"                 a continuation: the space is the model's own
"""

from pathlib import Path

from puna.errors import PunaError
from puna.tokenizer.base import Infilling, StreamDecoder, Tokenizer
from puna.tokenizer.bulk import BulkEncoder
from puna.tokenizer.train import train_tokenizer

__all__ = ["BulkEncoder", "Infilling", "StreamDecoder", "Tokenizer", "load_tokenizer", "train_tokenizer"]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Opens a tokenizer: a `tokenizer.model` or `tokenizer.json`, or a folder that holds one of them.

    In a folder `tokenizer.model` is preferred: SentencePiece's scores are lost in many a converted `tokenizer.json`.

    Raises:
        PunaError: nothing there, or the file is not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise PunaError(f"{path} holds neither tokenizer.model nor tokenizer.json; name a folder that does")
        path = found[0]
    elif not path.is_file():
        raise PunaError(f"{path} does not exist; a tokenizer is a tokenizer.model, a tokenizer.json or a folder of one")
    if path.suffix == ".json":
        from puna.tokenizer.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path)
    from puna.tokenizer.sentence_piece import SentencePieceTokenizer

    return SentencePieceTokenizer(path)
