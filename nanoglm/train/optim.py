"""Optimisers: Muon for matrices, AdamW for the rest, every parameter in exactly one group (training spec 1.1, 1.2).

Muon moves a matrix along its orthogonalised momentum. What is orthogonalised is a *piece*: a whole matrix or, where one
parameter holds several, each of them alone: heads of the up-projections (Muon Split: without it MLA loses to GQA),
experts, gate and up.

Shape legend: N pieces of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nanoglm.config import GLMConfig
from nanoglm.model import GLM

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # the quintic that grows small singular values fastest (K. Jordan's Muon)
STEPS, EPS = 5, 1e-7
RMS = 0.2  # of an update, so that AdamW's rates and decay carry over (Moonlight; GLM-4.5 section 2.4)


@dataclass(frozen=True)
class Cut:
    """How a parameter falls into pieces: its rows in equal blocks, each block in runs of ``sizes`` rows.

    ``sizes`` () means that a block is one piece.
    """

    blocks: int = 1
    sizes: tuple[int, ...] = ()

    def pieces(self, x: Tensor) -> list[Tensor]:
        """Views [blocks, R, C] of x, one for each run."""
        stack = x.reshape(self.blocks, -1, x.shape[-1])
        return list(stack.split(list(self.sizes or stack.shape[1:2]), 1))


def orthogonalise(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """U Vᵀ of each matrix of x [N, R, C] = U S Vᵀ, with singular values near 1 rather than 1: five Newton-Schulz steps.

    Args:
        dtype: of the products; if left out bf16 on CUDA and elsewhere fp32, or that of x if it is wider.
    """
    a, b, c = NEWTON_SCHULZ
    y = x.to(dtype or (torch.bfloat16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32)))
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by piece and scaled to an RMS of 0.2, with decoupled weight decay.

    Equals ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` on a plain matrix but for the dtype of the products. A
    group of parameters may carry ``cut`` (a :class:`Cut`). Pieces of one shape, of whatever parameters, go in a batch.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "cut": Cut()})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor, float]]] = {}
        sharded: list[tuple[DTensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                cut: Cut = group["cut"]
                whole: Tensor = parameter
                if isinstance(update, DTensor):  # a piece may lie on several ranks: each moves all, keeps its shard
                    update = update.full_tensor()
                    whole = torch.zeros_like(update)
                    sharded.append((parameter, whole))
                for target, piece in zip(cut.pieces(whole), cut.pieces(update), strict=True):
                    by_shape.setdefault(tuple(piece.shape[1:]), []).append((target, piece, group["lr"]))
        for shape, found in by_shape.items():
            moved = orthogonalise(torch.cat([piece for _, piece, _ in found]), self.dtype)
            for (target, _, rate), y in zip(found, moved.split([len(t) for t, _, _ in found]), strict=True):
                target.add_(y, alpha=-rate * RMS * max(shape) ** 0.5)
        for parameter, whole in sharded:
            parameter.add_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
        return loss


@dataclass
class Groups:
    """Parameters by what moves them. ``cut``: of Muon's, by what a piece is."""

    cut: dict[Cut, list[Tensor]] = field(default_factory=dict)
    matrices: list[Tensor] = field(default_factory=list)  # AdamW with decay: embedding, head, routers
    vectors: list[Tensor] = field(default_factory=list)  # AdamW without: norms, biases
    indexers: list[Tensor] = field(default_factory=list)  # AdamW, their own rate and clipping

    @property
    def backbone(self) -> list[Tensor]:
        """All but the indexers."""
        return [p for group in self.cut.values() for p in group] + self.matrices + self.vectors


def cut_of(name: str, config: GLMConfig) -> Cut:
    """What a piece of this matrix is, by the checkpoint's name."""
    if name.endswith("q_b_proj.weight"):
        return Cut(config.num_attention_heads)
    if name.endswith("kv_b_proj.weight"):
        return Cut(config.num_attention_heads, (config.qk_nope_head_dim, config.v_head_dim))
    if name.endswith("experts.gate_up_proj"):
        return Cut(config.n_routed_experts, (config.moe_intermediate_size,) * 2)
    if name.endswith("experts.down_proj"):
        return Cut(config.n_routed_experts)
    return Cut()


def groups(model: GLM) -> Groups:
    """Every parameter in exactly one group, by rule: indexers apart; of matrices all but embedding, head and routers to
    Muon."""
    found = Groups()
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            found.indexers.append(parameter)
        elif parameter.ndim < 2:
            found.vectors.append(parameter)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")):
            found.matrices.append(parameter)
        else:
            found.cut.setdefault(cut_of(name, model.config), []).append(parameter)
    return found
