"""Text <-> token ids: any ``tokenizer.json``, and a built-in tokenizer whose tokens are bytes.

GLM's tokenizers are byte-level BPE: a token is a string of bytes, written in the file with one
printable character per byte (GPT-2's alphabet), beside added tokens that stand for markup such as
``<|user|>``. Ids therefore decode to bytes first and to text second, which makes streaming exact:
a character leaves the stream when its last byte arrives, never as a replacement character before.

The byte tokenizer has no merges. Ids 0-255 are the byte values, 256-291 the 36 added tokens of
GLM-5.2 in its order, 292-319 are reserved. Checkpoints are trained on these ids: they never change.

Source: serving spec 1 and 1.1.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from nanoglm.errors import CheckpointError, InputError

# In GLM-5.2 these are ids 154820 to 154855, in this order (serving spec 1.1).
ADDED_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<|image|>",
    "<|video|>",
)

# Special means: decoding leaves it out. Only the first 18 are; think and tool tags are text that
# readers and parsers must see (serving spec 1.1, rule 3).
_SPECIAL = 18
_RESERVED = tuple(f"<|reserved_{i}|>" for i in range(28))
_ID_OF = {token: 256 + i for i, token in enumerate(ADDED_TOKENS + _RESERVED)}
_ADDED = re.compile("(" + "|".join(map(re.escape, _ID_OF)) + ")")


def byte_tokenizer() -> Tokenizer:
    """The built-in tokenizer of 320 ids: 256 bytes, 36 added tokens, 28 reserved ones."""
    return Tokenizer(_byte_backend())


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of ``size`` ids, the last 36 of them GLM's added tokens in their order.

    Raises:
        InputError: fewer ids than bytes and added tokens, or texts too short for so many.
    """
    least = len(_ALPHABET) + len(ADDED_TOKENS)
    if size < least:
        raise InputError(f"vocabulary of {size} ids; expected at least {least}, bytes and markup")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(ADDED_TOKENS), initial_alphabet=list(_ALPHABET), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if (found := backend.get_vocab_size() + len(ADDED_TOKENS)) != size:
        raise InputError(f"texts give a vocabulary of {found} ids; expected more text for {size}")
    backend.add_tokens([AddedToken(t, special=i < _SPECIAL, normalized=False) for i, t in enumerate(ADDED_TOKENS)])
    return Tokenizer(backend)


class Tokenizer:
    """What nanoglm needs of a tokenizer; wraps one of the ``tokenizers`` library.

    Attributes:
        backend: the wrapped tokenizer.
        vocab_size: number of ids with a name. A model may have more rows (GLM-5.2: 154,856 and
            154,880); ids without a name decode to nothing.
        is_bytes: whether this is the byte tokenizer, also when it was read from a file.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A file may ask to cut or pad what it encodes; a prompt must arrive as it was written.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.is_bytes = _is_byte_tokenizer(backend)
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def added(self) -> tuple[str, ...]:
        """The added tokens as they are spelled, the longest first."""
        names = (token.content for token in self.backend.get_added_tokens_decoder().values())
        return tuple(sorted(names, key=len, reverse=True))

    @cached_property
    def markup(self) -> re.Pattern[str]:
        """Finds added tokens in a text, where :meth:`encode` does."""
        return re.compile("|".join(map(re.escape, self.added)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Ids of the text and of nothing else: no prefix, no end. Added tokens spelled in it become their ids.

        Raises:
            InputError: the text holds half a surrogate pair, which no encoding can write.
        """
        _utf8(text)  # both ways below would fail on it, each in its own manner
        if not self.is_bytes:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
            return ids
        ids = []
        for i, part in enumerate(_ADDED.split(text)):  # text and added tokens in turn
            ids += [_ID_OF[part]] if i % 2 else part.encode()  # bytes are their own ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone: an added token spelled in it stays the text that it is. Raises as :meth:`encode`."""
        if self.is_bytes:
            return list(_utf8(text))
        ids, begin = list[int](), 0
        for match in self.markup.finditer(text):  # cut behind its first character: no part of it is a token
            ids += self.encode(text[begin : match.start() + 1])
            begin = match.start() + 1
        return ids + self.encode(text[begin:])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD.

        Args:
            skip_special: leave out tokens flagged special; think and tool tags are not.
        """
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode(errors="replace")

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder that takes one id at a time; its pieces joined are what :meth:`decode` gives."""
        return TextStream(self, skip_special)

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes one id stands for; none for a skipped special token or an id without a name."""
        if skip_special and token_id in self._special:
            return b""
        if token_id not in self._bytes:
            token = self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            if token is None:
                return b""  # and not kept: there are as many of them as a client likes
            self._bytes[token_id] = _spelled_bytes(token)
        return self._bytes[token_id]

    def save(self, path: str | Path) -> None:
        """Writes ``tokenizer.json``; an existing file is replaced whole or not at all.

        Raises:
            InputError: the path cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"tokenizer cannot be written to {path}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):  # gone after the renaming, never there if it could not be made
                temporary.unlink()

    @staticmethod
    def from_file(path: str | Path) -> Tokenizer:
        """Reads a ``tokenizer.json``.

        Raises:
            CheckpointError: no such file, or not a tokenizer of byte-level tokens.
        """
        try:
            backend = tokenizers.Tokenizer.from_buffer(Path(path).read_bytes())
        except OSError as error:
            raise CheckpointError(f"tokenizer {path} cannot be read: {error.strerror}; expected a file") from None
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"tokenizer {path} is damaged; expected a tokenizer.json: {error}") from None
        if not isinstance(backend.decoder, decoders.ByteLevel):
            found = type(backend.decoder).__name__ if backend.decoder else "none"
            raise CheckpointError(f"tokenizer {path} has decoder {found}; expected ByteLevel, as GLM's have")
        return Tokenizer(backend)


class TextStream:
    """Ids in, text out, only complete characters. One per sequence: it keeps unfinished bytes."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Takes one id and returns the text that is now complete, often none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def flush(self) -> str:
        """Ends the stream: an unfinished character becomes U+FFFD. The stream can then be used anew."""
        return self._utf8.decode(b"", final=True)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise InputError(f"text holds the {found}; expected Unicode text") from None


def _alphabet() -> tuple[str, ...]:
    """GPT-2's printable character for each byte: itself, or the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


_ALPHABET = _alphabet()
_BYTE_OF = {c: byte for byte, c in enumerate(_ALPHABET)}


def _spelled_bytes(token: str) -> bytes:
    """Bytes of a token as the file spells it; an added token outside the alphabet is plain text."""
    try:
        return bytes(_BYTE_OF[c] for c in token)
    except KeyError:
        return token.encode()


def _byte_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=_BYTE_OF, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # normalized=False, as in GLM's own file: all added tokens are then found in one pass over the
    # text, leftmost first, whether special or not.
    backend.add_tokens(
        [AddedToken(t, special=i < _SPECIAL, normalized=False) for i, t in enumerate(ADDED_TOKENS)]
        + [AddedToken(t, special=True, normalized=False) for t in _RESERVED]
    )
    return backend


def _is_byte_tokenizer(backend: tokenizers.Tokenizer) -> bool:
    """Whether it encodes as :func:`byte_tokenizer` does, whoever wrote its file."""

    def encoding(tokenizer: tokenizers.Tokenizer) -> list[object]:
        parts = json.loads(tokenizer.to_str())
        return [parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")]

    # The size first: writing out a large vocabulary takes a second.
    return backend.get_vocab_size() == 256 + len(_ID_OF) and encoding(backend) == encoding(_byte_backend())
