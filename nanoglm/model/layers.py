"""The small parts: Linear, norms, RoPE, SwiGLU.

``Linear`` and ``moe.Experts`` are the only modules that hold matrices: number formats and stores
replace their storage, never their callers.

Shape legend: T tokens of the ragged batch, D hidden, R rope.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanoglm import ops


class Linear(nn.Module):
    """y = x Wᵀ without bias; ``weight`` is [out, in] as in the checkpoint."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD, self.weight)

    def forward_fp32(self, x_TD: Tensor) -> Tensor:
        """The same product in fp32 whatever the weight's dtype (router, indexer head weights)."""
        return ops.linear_fp32(x_TD, self.weight)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x²) + eps); statistics and product in fp32, one cast (architecture spec 2.2)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias in fp32: the indexer's k_norm, whose eps is 1e-6 (spec 2.6, trap 2)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.layer_norm(x_TD, self.weight, self.bias, self.eps)


@dataclass(frozen=True, eq=False)  # tensors compare element by element; compilers hash what they see
class Rotary:
    """Interleaved RoPE at given positions: pair i is (x_{2i}, x_{2i+1}) (architecture spec 2.3).

    cos and sin are fp32 [T, R/2]. The result is written in place of its pair, as vLLM does;
    transformers writes it de-interleaved, which changes cached bytes but no dot product.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, dim: int, theta: float) -> Rotary:
        """positions int64 [T]; plain RoPE of base ``theta`` over ``dim`` dims, angles in fp32."""
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles = positions[:, None].float() * (1.0 / theta**exponents)
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, R] or [T, H, R] -> the same shape and dtype, rotated."""
        return ops.rotate(x, self.cos, self.sin)

    def first(self, x: Tensor) -> Tensor:
        """x [T, I] or [T, J, I] -> its first R dims rotated, the others as they are, as indexers want it. Without
        gradients x itself may become the result: who else keeps it must copy it."""
        return ops.rotate(x, self.cos, self.sin, reuse=True)


class MLP(nn.Module):
    """SwiGLU: (silu(x W_gateᵀ) * (x W_upᵀ)) W_downᵀ; dense layers and the shared expert (spec 2.8)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.mlp(x_TD, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
