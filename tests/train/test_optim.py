"""Muon against torch's on a plain matrix, pieces against matrices by themselves, groups by rule."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoglm.config import GLMConfig
from nanoglm.model import GLM
from nanoglm.train import optim
from nanoglm.train.optim import Cut, Muon


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_muon_is_torchs_on_a_plain_matrix(rows: int, columns: int, seed: int) -> None:
    """With torch's bf16 products: equal up to the roundings of these, three steps long."""
    torch.manual_seed(seed)
    start, grads = torch.randn(rows, columns), torch.randn(3, rows, columns)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    arguments = {"lr": 0.02, "weight_decay": 0.1}
    pairs = [
        (ours, Muon([ours], dtype=torch.bfloat16, **arguments)),
        (theirs, torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **arguments)),
    ]
    for grad in grads:
        for parameter, optimizer in pairs:
            parameter.grad = grad.clone()
            optimizer.step()
    step = 0.02 * optim.RMS * max(rows, columns) ** 0.5
    assert (
        float((ours - theirs).detach().abs().max()) < 0.02 * 3 * step
    )  # entries of an orthogonal matrix are at most 1


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_singular_values_come_near_one(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, rows, columns, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = torch.linalg.svdvals(u.mT @ optim.orthogonalise(x, torch.float64) @ v.mT)
    assert found.min() > 0.3 and found.max() < 1.3  # five steps do no more: 0.7 to 1.2, less for tiny ones
    assert not optim.orthogonalise(torch.zeros(1, rows, columns)).any()  # and no NaN


@pytest.mark.parametrize("cut", [Cut(), Cut(4), Cut(2, (5, 7)), Cut(3, (2, 2, 4))])
def test_a_piece_moves_as_if_it_were_alone(cut: Cut) -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(24, 9), torch.randn(24, 9)
    whole = torch.nn.Parameter(start.clone())
    whole.grad = grad.clone()
    Muon([{"params": [whole], "cut": cut}], lr=0.1).step()
    parts = [torch.nn.Parameter(x.clone()) for stack in cut.pieces(start) for x in stack]
    for part, g in zip(parts, [g for stack in cut.pieces(grad) for g in stack], strict=True):
        part.grad = g.clone()
    Muon(parts, lr=0.1).step()
    moved = [x for stack in cut.pieces(whole.detach()) for x in stack]
    for found, expected in zip(moved, parts, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.equal(whole, start)


@pytest.mark.parametrize("preset", ["tiny", "nano", "recall", "mini"])
def test_every_parameter_is_in_exactly_one_group(preset: str) -> None:
    with torch.device("meta"):
        model = GLM(GLMConfig.preset(preset))
    found = optim.groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(p)] for p in found.backbone + found.indexers]
    assert sorted(grouped) == sorted(names.values())
    assert all(".indexer." in names[id(p)] for p in found.indexers)
    assert {names[id(p)].split(".")[-2] for p in found.matrices} <= {"embed_tokens", "lm_head", "gate"}
    assert all(p.ndim == 1 for p in found.vectors)


def test_pieces_are_heads_experts_and_gate_or_up() -> None:
    """Muon Split: W_UQ, W_UK and W_UV per head; experts one by one, gate apart from up."""
    config = GLMConfig.preset("nano")
    with torch.device("meta"):
        model = GLM(config)
    layer = "model.layers.1."
    shapes = {
        "self_attn.q_b_proj.weight": [(4, 32, 96)],
        "self_attn.kv_b_proj.weight": [(4, 24, 64), (4, 32, 64)],
        "self_attn.o_proj.weight": [(1, 128, 128)],
        "mlp.experts.gate_up_proj": [(8, 64, 128), (8, 64, 128)],
        "mlp.experts.down_proj": [(8, 128, 64)],
        "mlp.shared_experts.gate_proj.weight": [(1, 64, 128)],
    }
    parameters = dict(model.named_parameters())
    for name, expected in shapes.items():
        pieces = optim.cut_of(layer + name, config).pieces(parameters[layer + name])
        assert [tuple(piece.shape) for piece in pieces] == expected, name
    heads = model.layers[1].self_attn._up()  # the model's own W_UK and W_UV are these pieces
    kv = optim.cut_of("kv_b_proj.weight", config).pieces(parameters[layer + "self_attn.kv_b_proj.weight"])
    assert [tuple(x.shape) for x in heads] == [tuple(x.shape) for x in kv]


def test_state_survives_saving() -> None:
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    first, second = Muon([{"params": [a], "cut": Cut(2)}]), Muon([{"params": [b], "cut": Cut(2)}])
    for _ in range(2):
        a.grad = torch.randn(4, 3)
        first.step()
    b.data.copy_(a.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    a.grad = torch.randn(4, 3)
    b.grad = a.grad.clone()
    first.step(), second.step()
    assert torch.equal(a, b)
