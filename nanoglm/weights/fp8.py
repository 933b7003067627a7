"""FP8 in blocks of 128 x 128, as GLM-5.2-FP8 is published (architecture spec 4.1).

W = e4m3 value * scale of its block. The scale lies beside the weight under ``..._scale_inv`` and is
multiplied, despite that name. The last block of a row or column may be partial: 576 rows have 5 scale rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of e4m3
DTYPE = torch.float8_e4m3fn


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., out, in]: [..., ceil(out / 128), ceil(in / 128)]."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def quantise(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] -> e4m3 of the same shape, and its scales.

    The scale of a block is amax / 448, for ``float8_e8m0fnu`` rounded up to a power of two; an all-zero
    block gets 1. Then |x - x'| <= max(|x| / 16, scale / 1024): half a step of a normal or subnormal e4m3.
    """
    rows, columns = weight.shape[-2:]
    blocks = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = blocks.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., out / 128, 128, in / 128, 128]
    largest = blocks.abs().amax((-3, -1))
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
    if scale_dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (blocks / scale[..., :, None, :, None]).clamp_(-LARGEST, LARGEST).to(DTYPE)
    return values.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous(), scale.to(scale_dtype)


def dequantise(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Fills ``out`` [..., out, in] (fp32, bf16 or fp16) with weight * scale, 128 rows at a time.

    Scales are fp32 or, as powers of two, one exponent byte (UE8M0, which some files call U8).

    Raises:
        ValueError: a scale that is not finite.
    """
    scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
    if not scale.isfinite().all():
        raise ValueError("a scale is not finite")
    for row in range(scale.shape[-2]):
        band = slice(row * BLOCK, (row + 1) * BLOCK)
        factors = scale[..., row, :].repeat_interleave(BLOCK, -1)[..., None, : weight.shape[-1]]
        out[..., band, :] = weight[..., band, :].float() * factors
    return out
