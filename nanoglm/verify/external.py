"""Rows whose expectation comes from transformers, or for MTP from a composition of its parts.

:class:`Oracle` computes every expectation once. :meth:`Oracle.rows` builds our model anew from the raw
configuration and the same weights and compares; it is run again under every planted fault.

Importing this module needs transformers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.engine import SamplingParams, generate
from nanoglm.errors import NanoglmError
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch
from nanoglm.verify.oracle import (
    FIELDS,
    ComposedMTP,
    Trace,
    first_flips,
    hf,
    our_tie_rule,
    randomise,
    run_ours,
    run_theirs,
    transformers,
)  # fmt: skip
from nanoglm.verify.rows import LIMIT, Row, differing, error
from nanoglm.weights import Checkpoint, checkpoint_tensors, fp8, save
from nanoglm.weights.names import SCALE

quantisation: Any = import_module("transformers.integrations.finegrained_fp8")
NEAR_TIE = 1e-5  # scores this close may be told apart differently by two correct sums
K, LENGTH, NEW_TOKENS, DRAFTS = 16, 96, 24, 3
CHUNKS = (10, 30, 7, *[1] * 33, 16)  # prefill below and beyond k, token by token, a chunk again: LENGTH in all

# GLM-5.2 in small: its schedule (freq 4, offset 3: FFFSSSFS), dense first layers, biased router, one MTP
# layer. The schedule is given as the rule alone, so that both sides must work it out.
GLM_52: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 8,
    "first_k_dense_replace": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 48,
    "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32, "index_n_heads": 8,
    "index_head_dim": 16, "index_topk": K, "index_topk_freq": 4, "index_skip_topk_offset": 3,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "intermediate_size": 128, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 1,
    "rope_parameters": {"rope_theta": 8_000_000, "rope_type": "default"}, "max_position_embeddings": 1_048_576,
    "head_dim": 192, "eos_token_id": [95], "pad_token_id": 95,
}  # fmt: skip
# The same family with kv_a_proj_with_mqa of 576 rows, as published: five FP8 scale rows.
ROWS_576 = GLM_52 | {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 64, "num_hidden_layers": 4, "hidden_size": 144,
}  # fmt: skip


def theirs_of(raw: dict[str, Any], seed: int) -> Any:
    """transformers' model of a raw configuration, with random weights."""
    plain = {k: v for k, v in raw.items() if k not in FIELDS}
    config = transformers.GlmMoeDsaConfig(**plain, attn_implementation="eager", experts_implementation="eager")
    model = hf.GlmMoeDsaForCausalLM(config).eval()
    randomise(model, seed)
    return model


def ours_of(raw: dict[str, Any], state: dict[str, Tensor]) -> GLM:
    """Our model of it with these weights; where names do not fit (a row counts them) its own stay random."""
    model = GLM(GLMConfig.from_dict(raw, latent_norm_eps=1e-6)).initialise(99).eval()
    model.load_state_dict(state, strict=False)
    return model


@dataclass
class Case:
    """A model of transformers', its weights, and what it made of some sequences."""

    raw: dict[str, Any]
    seed: int
    lengths: tuple[int, ...]
    change: Callable[[Any], None] = lambda model: None

    def __post_init__(self) -> None:
        self.theirs = theirs_of(self.raw, self.seed)
        self.change(self.theirs)
        self.state: dict[str, Tensor] = dict(self.theirs.state_dict())
        generator = torch.Generator().manual_seed(self.seed)
        self.sequences = [torch.randint(0, 95, (n,), generator=generator).tolist() for n in self.lengths]
        self.config = GLMConfig.from_dict(self.raw)
        self.expected = [run_theirs(self.theirs, self.config, ids) for ids in self.sequences]


def quiet(model: Any) -> None:
    """Small latents and index keys, in which a norm's eps counts."""
    for name, value in model.named_parameters():
        if "_a_proj" in name or name.endswith("indexer.wk.weight"):
            value.data.mul_(1e-2)


class Oracle:
    """Expectations of transformers, computed once, and the rows that compare ours with them."""

    @torch.no_grad()
    def __init__(self) -> None:
        self.main = Case(GLM_52, 11, (LENGTH, K - 1, K, K + 1))
        self.quiet = Case(GLM_52 | {"num_hidden_layers": 4}, 12, (LENGTH,), quiet)
        self.mtp = ComposedMTP(self.main.config, 13)
        ids, m = torch.tensor(self.main.sequences[0]), self.main.expected[0].final[:-DRAFTS]
        self.drafts = []
        for depth in range(DRAFTS):
            following = ids[1 + depth : 1 + depth + len(m)]
            m = self.mtp.step(self.main.theirs.model.embed_tokens(following), m, depth)
            self.drafts.append(m)
        self.main.state |= self.mtp.checkpoint()
        self.greedy = self._greedy()
        self.positions = torch.tensor([0, 1, 2047, 131_071, 1_048_575])
        rotary = hf.GlmMoeDsaRotaryEmbedding(self.main.theirs.config)
        self.angles = [t[0] for t in rotary(torch.zeros(1), self.positions[None])]
        self.fp8 = Case(ROWS_576, 14, (40,))

    def _greedy(self) -> list[int]:
        """transformers' continuation on its own cache, up to the first logit tie."""
        ids, cache, found = torch.tensor([self.main.sequences[0]]), None, []
        for _ in range(NEW_TOKENS):
            with our_tie_rule():
                out = self.main.theirs(ids, past_key_values=cache, use_cache=True)
            cache, best = out.past_key_values, out.logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < 1e-3:
                break
            ids = best.indices[None, :1]
            found.append(int(ids))
        return found

    def rows(self) -> Iterator[Row]:
        """All external rows, over models built now."""
        for group in (self._layers, self._decoding, self._eps, self._drafts, self._exchange, self._fp8):
            try:
                with torch.no_grad():
                    yield from group()
            except NanoglmError as refusal:
                yield Row(f"refused: {refusal}", float("nan"), 0)

    # ---------------------------------------------------------------- the model
    def _layers(self) -> Iterator[Row]:
        case = self.main
        model = ours_of(case.raw, case.state)
        wanted = case.theirs.config.indexer_types
        misfits = len(model.state_dict().keys() ^ case.state.keys())
        yield Row("parameter names, MTP layer included: names that one side lacks", misfits, 0)
        wrong = sum(a != b for a, b in zip(model.config.indexer_types, wanted, strict=True))
        yield Row("schedule of freq 4, offset 3: layers of another kind", wrong, 0)
        rotary = model.rotary(self.positions)
        pairs = zip((rotary.cos, rotary.sin), self.angles, strict=True)  # theirs repeat each half
        angles = torch.tensor([error(torch.cat([mine, mine], -1), wanted) for mine, wanted in pairs])
        yield Row("RoPE angles up to position 1,048,575", float(angles.max()), 0)  # NaN if any is
        found, flips = compared(model, case.sequences, case.expected)
        kinds = [
            f"{'Full' if kind == 'full' else 'Shared'} {'MoE' if model.config.is_moe(i) else 'dense'}"
            for i, kind in enumerate(wanted)
        ]
        yield Row("indexer scores, all Full layers", scores_error(found[0], case.expected[0]), LIMIT)
        yield Row("Selections: rows that differ, near ties apart", flips, 0)
        hidden = zip(kinds, found[0].hidden, case.expected[0].hidden, strict=True)
        for i, (kind, mine, theirs) in enumerate(hidden):
            yield Row(f"hidden state after layer {i} ({kind})", error(mine, theirs), LIMIT)
        for n, trace, expected in zip(case.lengths, found, case.expected, strict=True):
            yield Row(f"logits at {n} tokens (k is {K})", error(trace.logits, expected.logits), LIMIT)

    def _decoding(self) -> Iterator[Row]:
        case = self.main
        model, expected = ours_of(case.raw, case.state), case.expected[0]
        cache, begin, logits = PagedCache(model.config, 4), 0, []
        request = cache.open()
        ids = torch.tensor(case.sequences[0])
        for count in CHUNKS:
            part = ids[begin : begin + count]
            logits.append(model.logits(model(part, cache.extend([request], [count]), cache).hidden))
            begin += count
        yield Row("logits, prefill and decoding on the paged cache", error(torch.cat(logits), expected.logits), LIMIT)
        found = list(generate(model, case.sequences[0], SamplingParams(max_tokens=max(1, len(self.greedy)))))
        wrong = sum(a != b for a, b in zip(found, self.greedy, strict=False)) + abs(len(found) - len(self.greedy))
        yield Row("greedy continuation: tokens that differ", wrong, 0)

    def _eps(self) -> Iterator[Row]:
        model = ours_of(self.quiet.raw, self.quiet.state)
        found, flips = compared(model, self.quiet.sequences, self.quiet.expected)
        yield Row("small latents and index keys: Selections that differ", flips, 0)
        yield Row("small latents and index keys: scores", scores_error(found[0], self.quiet.expected[0]), LIMIT)
        yield Row("small latents and index keys: logits", error(found[0].logits, self.quiet.expected[0].logits), LIMIT)

    def _drafts(self) -> Iterator[Row]:
        case = self.main
        model = ours_of(case.raw, case.state)
        ids = torch.tensor(case.sequences[0])
        count = LENGTH - DRAFTS
        output = model(ids[:count], Batch.contiguous([count]), BatchStore())
        m, selection = output.hidden, None
        for depth, expected in enumerate(self.drafts):
            following = ids[1 + depth : 1 + depth + count]
            m, selection = model.draft(following, m, output.step, depth=depth, selection=selection)
            yield Row(f"MTP draft step {depth}", error(m, expected), LIMIT)
        few = K // 2  # below k tokens a dense shortcut would let a draft attend to itself
        output = model(ids[:few], Batch.contiguous([few]), BatchStore())
        m, selection = model.draft(ids[1 : 1 + few], output.hidden, output.step)
        m, _ = model.draft(ids[2 : 2 + few], m, output.step, depth=1, selection=selection)
        yield Row("MTP draft step 1 below k tokens", error(m, self.drafts[1][:few]), LIMIT)

    # ---------------------------------------------------------------- files
    def _exchange(self) -> Iterator[Row]:
        case = self.main
        ids = torch.tensor([case.sequences[0]])
        with tempfile.TemporaryDirectory() as folder:
            save(ours_of(case.raw, case.state), folder, dtype=torch.float32, mtp=False, shard_bytes=300_000)
            theirs, report = hf.GlmMoeDsaForCausalLM.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
            )
            kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
            yield Row("our checkpoint in transformers: names that do not fit", sum(len(report[k]) for k in kinds), 0)
            with our_tie_rule():
                logits = theirs.eval()(ids).logits[0]
            yield Row("our checkpoint in transformers: logits", error(logits, case.expected[0].logits), LIMIT)
        with tempfile.TemporaryDirectory() as folder:
            case.theirs.save_pretrained(folder)
            model, _ = Checkpoint(folder, latent_norm_eps=1e-6).load()
            logits = model.logits(model(ids[0], Batch.contiguous([LENGTH]), BatchStore()).hidden)
            yield Row("transformers' checkpoint here: logits", error(logits, case.expected[0].logits), LIMIT)

    def _fp8(self) -> Iterator[Row]:
        """Our FP8 files against transformers' own dequantisation, and its quantised blocks read here."""
        case = self.fp8
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(ours_of(case.raw, case.state), folder, dtype=fp8.DTYPE, mtp=False)
            stored = load_file(folder / "model.safetensors")
            model, _ = Checkpoint(folder, latent_norm_eps=1e-6).load()
            meant = {n: their_dequantisation(t, stored[n + SCALE]) if n + SCALE in stored else t.float()
                     for n, t in stored.items() if not n.endswith(SCALE)}  # fmt: skip
            (folder / "config.json").write_text(json.dumps(case.raw | {"architectures": ["GlmMoeDsaForCausalLM"]}))
            save_file(meant, folder / "model.safetensors", metadata={"format": "pt"})
            theirs = hf.GlmMoeDsaForCausalLM.from_pretrained(
                folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
            )
        ours = checkpoint_tensors(model)
        wrong = sum(differing(ours[n], t) for n, t in meant.items())
        yield Row("FP8 checkpoint, kv_a of 576 rows: values unlike transformers' dequantisation", wrong, 0)
        expected = run_theirs(theirs.eval(), case.config, case.sequences[0])
        found, _ = compared(model, case.sequences, [expected])
        yield Row("FP8 checkpoint, kv_a of 576 rows: logits", error(found[0].logits, expected.logits), LIMIT)
        block = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
        values, scale = their_quantisation(block)
        found_block = fp8.dequantise(values, scale, torch.empty_like(block))
        wrong = differing(found_block, their_dequantisation(values, scale))
        yield Row("FP8 blocks of transformers' quantiser: values read differently", wrong, 0)


def compared(model: GLM, sequences: list[list[int]], expected: list[Trace]) -> tuple[list[Trace], int]:
    """Ours, near ties resolved as transformers did; and how many rows of the first such layer flipped beyond."""
    forced: dict[tuple[int, int], Tensor] = {}
    while True:
        found = run_ours(model, sequences, forced)
        flips = first_flips(found, expected)
        beyond = sum(flip.gap > NEAR_TIE for flip in flips)
        if beyond or not flips or all((f.layer, f.row) in forced for f in flips):
            return found, beyond
        forced |= {(flip.layer, flip.row): flip.wanted for flip in flips}


def scores_error(found: Trace, expected: Trace) -> float:
    """Over all Full layers and visible pairs."""
    worst = []
    for layer, wanted in expected.scores.items():
        visible = torch.ones_like(wanted).tril().bool()
        scores = found.scores.get(layer)
        worst.append(float("nan") if scores is None else error(scores[visible], wanted[visible]))
    return float(torch.tensor(worst).max())  # NaN if any is


def their_dequantisation(weight: Tensor, scale: Tensor) -> Tensor:
    """By transformers' fine-grained FP8 reader. It derives the block from the shapes and so refuses partial
    blocks: it is given whole ones, padded with zeros, and the padding is cut off again."""
    rows, columns = weight.shape
    padded = F.pad(weight.view(torch.uint8), (0, -columns % 128, 0, -rows % 128)).view(weight.dtype)
    return quantisation.Fp8Dequantize(None)._dequantize_one(padded, scale, torch.float32)[:rows, :columns].contiguous()


def their_quantisation(weight: Tensor) -> tuple[Tensor, Tensor]:
    """By transformers' fine-grained FP8 writer."""
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantised = quantisation.Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("x.weight", weight)
    return quantised["x.weight"], quantised["x.weight_scale_inv"]
