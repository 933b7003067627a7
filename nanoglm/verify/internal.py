"""Rows of the code against itself: forms of evaluation that must agree, ops against their specification."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from nanoglm import ops
from nanoglm.api import Model
from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch, cpu, reference
from nanoglm.verify.rows import LIMIT, Row, differing, error
from nanoglm.weights import Checkpoint, checkpoint_tensors, fp8, save
from nanoglm.weights.write import Layout

LENGTH = 200


@torch.no_grad()
def rows() -> Iterator[Row]:
    """All rows that need nothing but nanoglm."""
    config = GLMConfig.preset("tiny").replace(initializer_range=0.2)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _forms(GLM(config).initialise(1).eval().to(dtype), str(dtype).removeprefix("torch."))
    for name in ("torch", *cpu.SETS):
        library = None if name == "torch" else cpu.library(name)
        if not isinstance(library, str):
            with patch.object(cpu, "best", lambda chosen=library: chosen):
                yield from _ops(f"cpu {name}", "cpu")
    if torch.cuda.is_available():
        yield from _ops("cuda", "cuda")
    yield from _files(GLM(config).initialise(2))


def _forms(model: GLM, kind: str) -> Iterator[Row]:
    """Bit equality of everything that decoding does to a sequence, and the two forms of attention."""
    for module in model.modules():  # as loading keeps them
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.float())
    ids = torch.randint(0, 320, (LENGTH,), generator=torch.Generator().manual_seed(3))
    whole = model(ids, Batch.contiguous([LENGTH]), BatchStore())
    for name, chunks in (
        ("in one piece", [LENGTH]), ("in chunks of 64", [64, 64, 64, 8]), ("token by token", [1] * LENGTH),
    ):  # fmt: skip
        found = _paged(model, ids, chunks)
        yield Row(f"{kind}: paged cache, {name}: values unlike the contiguous whole", differing(found, whole.hidden), 0)
    other = torch.randint(0, 320, (70,), generator=torch.Generator().manual_seed(4))
    mixed = model(torch.cat([other, ids]), Batch.contiguous([70, LENGTH]), BatchStore()).hidden[70:]
    yield Row(f"{kind}: beside another sequence: values unlike alone", differing(mixed, whole.hidden), 0)
    if model.lm_head.weight.dtype == torch.float32:
        chosen = [s for s in whole.selections if s is not None]
        batch = Batch.contiguous([LENGTH])
        expanded = model(ids, batch, BatchStore(), attention="masked", selections=chosen).hidden
        yield Row("absorbed against expanded attention", error(whole.hidden, expanded), LIMIT)
        with tempfile.TemporaryDirectory() as folder:
            lm, path = Model(model, None), Path(folder) / "run"
            with lm.record(path):
                recorded = lm.logits([ids.tolist()])[0]
            with lm.replay(path):
                yield Row(
                    "replay of a recording: values that differ", differing(lm.logits([ids.tolist()])[0], recorded), 0
                )


def _paged(model: GLM, ids: Tensor, chunks: Sequence[int]) -> Tensor:
    cache = PagedCache(model.config, 4, dtype=model.lm_head.weight.dtype)
    request = cache.open()
    return torch.cat(
        [model(part, cache.extend([request], [len(part)]), cache).hidden for part in ids.split(list(chunks))]
    )


def _ops(name: str, device: str) -> Iterator[Row]:
    """Each op of one backend against ``ops.reference``."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    counts, k = (5, 90, 17), 8
    batch, total = Batch.contiguous(counts), sum(counts)
    q, weights, keys = draw(total, 4, 16), draw(total, 4), draw(total, 16)
    q_latent, q_rope, latent, rope = draw(total, 3, 24), draw(total, 3, 8), draw(total, 24), draw(total, 8)
    x, routing, gate_up, down = draw(50, 24), draw(50, 2).softmax(-1), draw(6, 32, 24), draw(6, 24, 16)
    ids = draw(50, 6).topk(2).indices
    there = Batch.contiguous(counts, device)
    chosen = reference.select(q, weights, keys, batch, k)
    found = ops.select(q.to(device), weights.to(device), keys.to(device), there, k).cpu()
    yield Row(f"op select on {name}: rows unlike the reference", int((found != chosen).any(-1).sum()), 0)
    wanted = reference.sparse_attention(q_latent, q_rope, latent, rope, chosen, batch, 0.2)
    a, b, c, d, e = (t.to(device) for t in (q_latent, q_rope, latent, rope, chosen))
    attended = ops.sparse_attention(a, b, c, d, e, there, 0.2).cpu()
    yield Row(f"op sparse_attention on {name}", error(attended, wanted), LIMIT)
    wanted = reference.experts(x, ids, routing, gate_up, down)
    a, b, c, d, e = (t.to(device) for t in (x, ids, routing, gate_up, down))
    yield Row(f"op experts on {name}", error(ops.experts(a, b, c, d, e).cpu(), wanted), LIMIT)


def _files(model: GLM) -> Iterator[Row]:
    """What is saved comes back."""
    tensors = {name: value.detach() for name, value in checkpoint_tensors(model).items()}
    forms: tuple[tuple[str, torch.dtype, Layout], ...] = (
        ("fp32", torch.float32, "per_expert"), ("fp32, experts stacked", torch.float32, "stacked"),
        ("bf16", torch.bfloat16, "per_expert"),
    )  # fmt: skip
    for name, dtype, layout in forms:
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder, dtype=dtype, layout=layout, shard_bytes=200_000)
            loaded = checkpoint_tensors(Checkpoint(folder).load()[0])
        wrong = 0.0
        for key, value in tensors.items():
            kept = value if key.endswith("e_score_correction_bias") else value.to(dtype).float()
            wrong += differing(loaded[key].float(), kept)
        yield Row(f"checkpoint round trip, {name}: values that differ", wrong, 0)
    for name, scale_dtype in (("F32", torch.float32), ("UE8M0", torch.float8_e8m0fnu)):
        x = torch.randn(576, 300, generator=torch.Generator().manual_seed(6))
        values, scale = fp8.quantise(x, scale_dtype)
        step = scale.float().repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :300]
        off = (fp8.dequantise(values, scale, torch.empty_like(x)) - x).abs() / torch.maximum(x.abs() / 16, step / 1024)
        yield Row(f"FP8 with {name} scales: error over half a step", float(off.max()), 1)
