"""Text ↔ ids: the SentencePiece tokenizer, its special pieces, the chat template, decoding as ids come.

Read in this order: vocabulary, model_file, tokenizer, streaming, template, response.
"""

from .model_file import KNOWN_RELEASES, TOKENIZER_FILE, ModelFile, complete, read_model_file
from .response import normalize_answer
from .streaming import StreamDecoder
from .tokenizer import Tokenizer

__all__ = [
    "KNOWN_RELEASES",
    "TOKENIZER_FILE",
    "ModelFile",
    "StreamDecoder",
    "Tokenizer",
    "complete",
    "normalize_answer",
    "read_model_file",
]
