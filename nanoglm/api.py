"""The small stable surface: load, logits, selections, generate, save.

>>> model = nanoglm.load()                      # the bundled default model
>>> model = nanoglm.load("path/to/checkpoint")  # any GLM-5-family checkpoint directory
>>> model = nanoglm.load("tiny")                # a preset with random weights
>>> print(model.generate("It was")[0])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.cache import PAGE
from nanoglm.chat.files import TOKENIZER_FILE, write_text_files
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer
from nanoglm.config import PRESETS, GLMConfig
from nanoglm.engine import Engine, Request, SamplingParams, generate
from nanoglm.engine.record import Recording, Trace
from nanoglm.engine.request import check_prompt
from nanoglm.errors import CheckpointError, InputError
from nanoglm.model import GLM, Attention, BatchStore, Output, Tape
from nanoglm.ops import Batch
from nanoglm.weights import Checkpoint, Report, checkpoint_tensors, copy_companions, materialise, save

DEFAULT_MODEL = Path(__file__).parent / "assets" / "nano"
ASSISTANT = DEFAULT_MODEL.with_name("assistant")  # of the commands that converse
TOGETHER = 64  # prompts that are continued at once


class Model:
    """A loaded model: configuration, module, tokenizer and what one does with them.

    Attributes:
        config: the :class:`GLMConfig`. module: the ``nn.Module``. report: what loading found.
        tokenizer: the checkpoint's, or None for a preset whose vocabulary is not the byte tokenizer's.
        directory: where it was loaded from, or None.
    """

    def __init__(
        self, module: GLM, tokenizer: Tokenizer | None, report: Report | None = None, directory: Path | None = None
    ) -> None:
        self.module, self.config, self.directory = module.eval(), module.config, directory
        self._tokenizer, self.report = tokenizer, report or Report()
        self._recording: Recording | None = None
        self._replayed: Iterator[Trace] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InputError if this checkpoint came without one."""
        if self._tokenizer is None:
            raise InputError(f"model has no {TOKENIZER_FILE}; expected token ids instead of text")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one."""
        return self._tokenizer is not None

    @cached_property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat template, else GLM-5.2's. Raises CheckpointError if its file holds none."""
        return ChatTemplate() if self.directory is None else ChatTemplate.from_directory(self.directory)

    @torch.no_grad()
    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        selections: Sequence[Sequence[Tensor]] | None = None,
        *,
        attention: Attention = "sparse",
    ) -> list[Tensor]:
        """Next-token logits at every position.

        Args:
            sequences: token ids, one list a sequence; they may differ in length.
            selections: replayed instead of the indexers' own; as :meth:`selections` returns them.
            attention: "sparse", or "dense" to compare with attention to every earlier token.

        Returns:
            One tensor [T, vocab] a sequence.

        Raises:
            InputError: an empty, too long or out-of-vocabulary sequence; selections of a wrong shape.
        """
        replay = None if selections is None else self._packed(sequences, selections)
        output, counts = self._forward(sequences, replay, attention)
        return list(self.module.logits(output.hidden).split(counts))

    @torch.no_grad()
    def selections(self, sequences: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Which positions each token attends to, per sequence and layer.

        Returns:
            Per sequence a list of num_hidden_layers tensors, int32 [T, index_topk]: logical positions
            ascending, -1 after the valid ones. A Shared layer's is the same object as its source's.
        """
        output, counts = self._forward(sequences, None, "sparse")
        split = {id(s): s.split(counts) for s in output.selections if s is not None}
        return [[split[id(s)][b] for s in output.selections] for b in range(len(counts))]

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        drafts: int | Literal["auto"] | None = None,
    ) -> list[str]:
        """Continues prompts, all at once; returns the continuations. Each ends at the config's end tokens.

        Args:
            stop: texts that end a continuation and are not in it.
            drafts: of the MTP layer, verified together; None for as many as pay, if there is such a layer.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if self._recording is not None or self._replayed is not None:
            return ["".join(self.stream(prompt, params, stop=stop)) for prompt in prompts]
        texts = [""] * len(prompts)
        for which, piece in self.start(prompts, params, stop=stop, drafts=drafts):
            texts[which] += piece
        return texts

    def stream(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        drafts: int | Literal["auto"] | None = None,
    ) -> Iterator[str]:
        """Continues one prompt, yielding complete pieces of text as they are decided.

        Text that may be the beginning of a stop string is held back until it is known not to be. What is recorded or
        replayed goes through the plain loop, without drafts.
        """
        if self._recording is None and self._replayed is None:
            return (piece for _, piece in self.start([prompt], params, stop=stop, drafts=drafts))
        params, text = self._ending(params), TextUntil(self.tokenizer, stop)
        ids = self.tokenizer.encode(prompt)
        check_prompt(self.module, ids, params.max_tokens)
        replay = self._next_replayed()
        record = None if self._recording is None else self._recording.begin()
        return text.pieces(generate(self.module, ids, params, record=record, replay=replay))

    def start(
        self,
        prompts: Sequence[str],
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        drafts: int | Literal["auto"] | None = None,
    ) -> Generation:
        """Begins to continue prompts in an engine of their own; iterate over it to go on.

        Raises:
            InputError: a stop text is empty, a prompt cannot be one, or drafts are asked of a model without MTP layer.
        """
        if drafts is None:
            drafts = "auto" if self.config.num_nextn_predict_layers else 0
        return Generation(self, prompts, self._ending(params), stop, drafts)

    def _ending(self, params: SamplingParams | None) -> SamplingParams:
        params = params or SamplingParams()
        return replace(params, stop_ids=params.stop_ids or self.config.eos_token_id)

    @contextmanager
    def record(self, path: str | Path) -> Iterator[Recording]:
        """Within: what :meth:`logits`, :meth:`selections`, :meth:`generate` and :meth:`stream` run is recorded.

        Per token the Selections of the Full layers and the experts of the MoE layers, as safetensors with
        hashes of configuration and tokens. The file is written when the block ends well.

        >>> with model.record("run.safetensors"):
        ...     model.generate("It was")

        Raises:
            InputError: a recording is running already, or the file cannot be written.
        """
        if self._recording is not None:
            raise InputError("record is running already; expected one recording at a time")
        self._recording = recording = Recording(self.config)
        try:
            yield recording
        finally:
            self._recording = None
        recording.save(path)

    @contextmanager
    def replay(self, path: str | Path) -> Iterator[None]:
        """Within: each sequence takes the Selections and routes of the next one recorded, not its own.

        The weights may be others, the shape may not. Only routing is replayed: expert weights and all else
        are computed anew. A sequence may be a beginning of the recorded one; decoding recorded token by
        token replays as a whole and the other way round.

        Raises:
            InputError: the file is damaged or of another model's shape, a token differs, or there are more
                sequences than were recorded.
        """
        if self._replayed is not None:
            raise InputError("replay is running already; expected one replay at a time")
        self._replayed = iter(Recording.load(path, self.config).traces)
        try:
            yield
        finally:
            self._replayed = None

    def save(self, directory: str | Path, dtype: torch.dtype = torch.bfloat16, mtp: bool = True) -> None:
        """Writes a checkpoint that transformers, vLLM and SGLang read, with tokenizer, chat template and defaults.

        What lay beside the weights that the model was loaded from, and still does, is copied as it is.

        Args:
            dtype: fp32, bf16, fp16, or float8_e4m3fn (blocks of 128 x 128, the rest bf16).
            mtp: False leaves the MTP layer out (transformers has none).
        """

        def beside(folder: Path) -> None:
            if self.directory is not None:
                copy_companions(self.directory, folder)
            if self._tokenizer is not None:
                write_text_files(folder, self.config, self._tokenizer)

        save(self.module, directory, dtype=dtype, mtp=mtp, beside=beside)

    def checkpoint_tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the checkpoint's tensors; works on the meta device."""
        return {name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(self.module).items()}

    # ---------------------------------------------------------------- inside
    def _forward(
        self, sequences: Sequence[Sequence[int]], replay: list[Tensor] | None, attention: Attention
    ) -> tuple[Output, list[int]]:
        for ids in sequences:
            check_prompt(self.module, ids)
        counts = [len(ids) for ids in sequences]
        device = self.module.lm_head.weight.device
        packed = torch.tensor([i for ids in sequences for i in ids], device=device)
        batch = Batch.contiguous(counts, device)
        given: dict[str, Any] = {"selections": replay}
        if self._replayed is not None:
            if replay is not None:
                raise InputError("selections are given within a replay; expected one of the two")
            given = self._replay_rows(sequences)
        tape = None if self._recording is None else Tape(indexers=False)
        output = self.module(packed, batch, BatchStore(), attention=attention, tape=tape, **given)
        if self._recording is not None and tape is not None:
            for b, ids in enumerate(sequences):
                rows = slice(*batch.borders[b : b + 2])
                chosen = [None if s is None else s[rows] for s in output.selections]
                routes = {layer: experts[rows] for layer, experts in tape.experts.items()}
                self._recording.begin().append(ids, chosen, routes)
        return output, counts

    def _next_replayed(self) -> Trace | None:
        if self._replayed is None:
            return None
        trace = next(self._replayed, None)
        if trace is None:
            raise InputError("replay has no sequence left; expected as many as were recorded")
        return trace

    def _replay_rows(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The next traces' Selections and routes, packed as the batch is."""
        device = self.module.lm_head.weight.device
        traces = [self._next_replayed() for _ in sequences]
        rows = [trace.rows(0, ids, device) for trace, ids in zip(traces, sequences, strict=True) if trace is not None]
        packed: list[Tensor] = []
        for layer in range(self.config.num_hidden_layers):
            full = self.config.has_indexer(layer)
            packed.append(torch.cat([r["selections"][layer] for r in rows]) if full else packed[-1])
        routes = {layer: torch.cat([r["routes"][layer] for r in rows]) for layer in rows[0]["routes"]}
        return {"selections": packed, "routes": routes}

    def _packed(self, sequences: Sequence[Sequence[int]], selections: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Selections per layer over the packed rows, checked: a wrong one would be answered, not noticed."""
        layers = self.config.num_hidden_layers
        if len(selections) != len(sequences) or any(len(given) != layers for given in selections):
            raise InputError(f"selections do not fit; expected {len(sequences)} lists of {layers} tensors")
        width = max((t.shape[-1] for given in selections for t in given if t.ndim == 2), default=0)
        packed: list[list[Tensor]] = [[] for _ in range(layers)]
        for b, (ids, given) in enumerate(zip(sequences, selections, strict=True)):
            newest = torch.arange(len(ids))[:, None]
            for layer, tensor in enumerate(given):
                name = f"selections[{b}][{layer}]"
                if tensor.ndim != 2 or tensor.shape[0] != len(ids) or tensor.shape[1] == 0:
                    raise InputError(f"{name} has shape {list(tensor.shape)}; expected [{len(ids)}, k]")
                tensor = tensor.cpu().long()
                if ((tensor > newest) | (tensor < -1)).any() or (tensor[:, 0] < 0).any():
                    raise InputError(f"{name} holds a position no row may see; expected 0 to the row's own, then -1")
                packed[layer].append(F.pad(tensor, (0, width - tensor.shape[1]), value=-1))
        device = self.module.lm_head.weight.device
        return [torch.cat(parts).int().to(device) for parts in packed]


class Generation:
    """Prompts on their way to continuations: iterating yields (number of the prompt, next piece of its text).

    Attributes:
        engine: what runs them. requests: one a prompt, with its tokens, why it ended, and its drafts.
    """

    def __init__(
        self, model: Model, prompts: Sequence[str], params: SamplingParams, stop: Sequence[str],
        drafts: int | Literal["auto"],
    ) -> None:  # fmt: skip
        self._texts = [TextUntil(model.tokenizer, stop) for _ in prompts]
        ids = [model.tokenizer.encode(prompt) for prompt in prompts]
        for prompt in ids:
            check_prompt(model.module, prompt, params.max_tokens)
        needs = sorted(-(-(len(prompt) + params.max_tokens) // PAGE) for prompt in ids)
        pages = sum(needs[-TOGETHER:]) or 1
        self.engine = Engine(model.module, pages=pages, most=TOGETHER, drafts=drafts, prefix=len(ids) > 1)
        self.requests = [self.engine.add(prompt, params) for prompt in ids]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        numbers = {request: i for i, request in enumerate(self.requests)}
        for request, piece in pieces(self.engine, dict(zip(self.requests, self._texts, strict=True))):
            yield numbers[request], piece


def pieces(engine: Engine, texts: Mapping[Request, TextUntil]) -> Iterator[tuple[Request, str]]:
    """Steps an engine until these requests have ended, by a stop text too; yields their text as it comes."""
    while any(request.finish is None for request in texts):
        for request, tokens in engine.step():
            if (text := texts.get(request)) is None:
                continue
            piece = "".join(map(text.push, tokens))
            if request.finish is not None:
                piece += text.flush()
            if piece:
                yield request, piece
            if text.ended:
                engine.abort(request)


class Until:
    """Text up to the first of the stop texts; what may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise InputError("stop holds an empty text; expected at least one character")
        self._stop, self._held = tuple(stop), ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that this piece makes certain."""
        if self.found is not None:
            return ""
        held = self._held + piece
        ends = [(at, s) for s in self._stop if (at := held.find(s)) >= 0]
        if ends:
            at, self.found = min(ends, key=lambda end: end[0])
            return held[:at]
        lengths = ((n, s) for s in self._stop for n in range(1, min(len(s), len(held) + 1)))
        keep = max((n for n, s in lengths if held.endswith(s[:n])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return "" if self.found is not None else held


class TextUntil:
    """A continuation's text, up to the first of the stop texts.

    Without a tokenizer it is empty.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = None if tokenizer is None else tokenizer.stream()
        self._until = Until(stop)

    @property
    def ended(self) -> bool:
        """Whether a stop text has come."""
        return self._until.found is not None

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return "" if self._decoder is None else self._until.push(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, when no token follows."""
        return "" if self._decoder is None else self._until.push(self._decoder.flush()) + self._until.flush()

    def pieces(self, ids: Iterator[int]) -> Iterator[str]:
        """The text of tokens as they come."""
        for token in ids:
            if piece := self.push(token):
                yield piece
            if self.ended:
                return
        if piece := self.flush():
            yield piece


def load(
    path_or_preset: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    latent_norm_eps: float | None = None,
) -> Model:
    """Loads a checkpoint directory, a preset with random weights, or (None) the bundled default model.

    Args:
        dtype: of the weights in memory; the router bias and the indexers' head weights stay fp32.
        device: "meta" builds shapes only.
        latent_norm_eps: eps of the two latent norms; else the config's, else its rms_norm_eps.
            Pass 1e-6 to compare with transformers, which hard-codes it.

    Raises:
        InputError: neither a directory nor a preset. ConfigError, CheckpointError: see the message.
    """
    directory = checkpoint_directory(path_or_preset)
    if directory is None:
        return _preset(str(path_or_preset), dtype, device, latent_norm_eps)
    module, report = Checkpoint(directory, latent_norm_eps=latent_norm_eps).load(dtype=dtype, device=device)
    file = directory / TOKENIZER_FILE
    return Model(module, Tokenizer.from_file(file) if file.is_file() else None, report, directory.absolute())


def checkpoint_directory(path_or_preset: str | Path | None) -> Path | None:
    """The directory that a user's name for a model means; None if it is a preset's.

    Raises:
        InputError, CheckpointError: neither a directory nor a preset.
    """
    name = str(DEFAULT_MODEL if path_or_preset is None else path_or_preset)
    directory = Path(name)
    if directory.is_dir():
        return directory
    if name in PRESETS:
        return None
    if directory.exists():
        raise CheckpointError(f"model {name!r} is a file; expected the directory that holds config.json")
    raise InputError(f"model {name!r} is neither a checkpoint directory nor a preset ({', '.join(PRESETS)})")


def _preset(name: str, dtype: torch.dtype, device: torch.device | str, latent_norm_eps: float | None) -> Model:
    config = GLMConfig.preset(name)
    if latent_norm_eps is not None:
        config = config.replace(latent_norm_eps=latent_norm_eps)
    with torch.device("meta"):
        module = GLM(config)
    if torch.device(device).type != "meta":
        materialise(module, dtype, device)
        module.initialise()
    tokenizer = byte_tokenizer()
    return Model(module, tokenizer if config.vocab_size == tokenizer.vocab_size else None)
