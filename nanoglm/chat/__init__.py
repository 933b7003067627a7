"""Text on one side, token ids on the other. Knows the configuration, never the model."""

from nanoglm.chat.parser import Call, Delta, Message, Parser, parse
from nanoglm.chat.template import ChatTemplate, normalise
from nanoglm.chat.tokenizer import ADDED_TOKENS, TextStream, Tokenizer, byte_tokenizer

__all__ = [
    "ADDED_TOKENS",
    "Call",
    "ChatTemplate",
    "Delta",
    "Message",
    "Parser",
    "TextStream",
    "Tokenizer",
    "byte_tokenizer",
    "normalise",
    "parse",
]
