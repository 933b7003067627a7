"""What only a GPU can show: GLM-5.2's shapes, the model against the CPU's, determinism, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from nanoglm import ops
from nanoglm.bench.gpu import attention_inputs, drawn_selection, paged
from nanoglm.bench.shapes import random_ids
from nanoglm.config import GLMConfig
from nanoglm.engine import Engine, Request
from nanoglm.engine.generate import generate
from nanoglm.engine.graphs import Graphs
from nanoglm.engine.params import SamplingParams
from nanoglm.model import GLM
from nanoglm.model.store import BatchStore
from nanoglm.ops import Batch, torch_tiled
from nanoglm.ops.batch import storage_rows
from nanoglm.train.data import Sample
from nanoglm.train.objective import backward
from nanoglm.train.recipe import Recipe, long

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LENGTH, PAGE = 20_480, 64


@pytest.fixture(autouse=True)
def on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ops get their inputs there; what models do must not depend on PyTorch's default device."""
    torch.manual_seed(0)
    with nullcontext() if "models" in request.fixturenames else torch.device("cuda"):
        yield


def index_inputs(rows: int, exact: bool) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """The last rows of a long request at GLM-5.2's shape; small integers, whose sums are exact, or normal numbers."""
    batch = paged(rows, LENGTH)
    q, weights, keys = torch.randn(rows, 32, 128), torch.randn(rows, 32), torch.randn(LENGTH // PAGE, PAGE, 128)
    if exact:
        q, weights, keys = q.round(), weights.round(), keys.round()
    return q.bfloat16(), weights, keys.bfloat16(), batch


@pytest.mark.parametrize("rows", [1, 100])
def test_scores_that_are_equal_select_the_same_on_every_device(rows: int) -> None:
    q, weights, keys, batch = index_inputs(rows, exact=True)
    found = ops.select(q, weights, keys, batch, 2048)
    with torch.device("cpu"):
        host = Batch.build([rows], [LENGTH], batch.table.cpu(), PAGE)
        expected = ops.select(q.cpu().float(), weights.cpu(), keys.cpu().float(), host, 2048)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("fp8", [False, True])
def test_selections_differ_at_the_boundary_only(rows: int, fp8: bool) -> None:
    q, weights, keys, batch = index_inputs(rows, exact=False)
    at = torch.arange(LENGTH)
    slots = storage_rows(at, torch.zeros_like(at), batch.table, PAGE)
    seen = keys.flatten(0, 1)[slots]
    if fp8:
        keys = ops.index_pool(LENGTH // PAGE, PAGE, 128, torch.float8_e4m3fn, "cuda")
        ops.index_append(keys, seen, slots)
    found = ops.select(q, weights, keys, batch, 2048).long()
    if fp8:  # against what FP8 stands for
        from nanoglm.ops.triton.select import quantise

        (q, q_scale), (seen, scale) = quantise(q), quantise(seen)
        q, seen = q.double() * q_scale[..., None], seen.double() * scale[:, None]
    seen = seen.double()
    for row in range(rows):
        pairs = (q[row].double() @ seen.T).relu()
        scores = weights[row].double() @ pairs
        scores[int(batch.positions[row]) + 1 :] = -torch.inf
        least = scores.topk(2048).values[-1]
        margin = 1e-4 * abs(least)
        if fp8:  # Hopper adds FP8 products up in some 14 bits, and heads may cancel
            margin = 5e-4 * (weights[row].double().abs() @ pairs).max()
        assert int((scores > least + margin).sum()) == int((scores[found[row]] > least + margin).sum())
        assert bool((scores[found[row]] >= least - margin).all())
        assert bool((found[row].diff() > 0).all())


def error(found: Tensor, expected: Tensor) -> float:
    """Of the norm, relative; NaN if there is one."""
    return float((found.double() - expected).norm() / expected.norm())


def written_keys(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Of drawn inputs at GLM-5.2's shape the pools of latents, of index keys and of index keys in FP8."""
    keys = torch.randn(rows, 576).bfloat16().to(dtype), torch.randn(rows, 128).bfloat16().to(dtype)
    weight, scale, bias = (torch.randn(n).bfloat16().to(dtype) for n in (512, 128, 128))
    angles, slots = torch.randn(rows, 32), torch.randperm(LENGTH)[:rows]
    turn = angles.cos(), angles.sin(), slots
    pools = [torch.zeros(LENGTH // PAGE, PAGE, n, dtype=dtype) for n in (576, 128)]
    pools.append(ops.index_pool(LENGTH // PAGE, PAGE, 128, torch.float8_e4m3fn, "cuda"))
    ops.write_latent(pools[0], keys[0], weight, 1e-5, *turn)
    for pool in pools[1:]:
        ops.write_index_keys(pool, keys[1], scale, bias, 1e-6, *turn)
    return pools[0], pools[1], pools[2]


@pytest.mark.parametrize("rows", [1, 300])
def test_keys_are_written_as_in_fp64(rows: int) -> None:
    """Elsewhere pools stay as they were; FP8 keys have the bits of those of the plain pool, quantised."""
    latents, keys, eight = written_keys(rows)
    torch.manual_seed(0)
    exact = written_keys(rows, torch.float64)
    for found, expected in zip((latents, keys), exact, strict=False):
        assert error(found, expected) < 5e-3
        assert torch.equal(found.any(-1), expected.any(-1)) and int(found.any(-1).sum()) == rows
    from nanoglm.ops.triton.select import append_fp8

    again, slots = torch.zeros_like(eight), keys.any(-1).flatten().nonzero().flatten()
    append_fp8(again, keys.flatten(0, 1)[slots], slots)
    assert torch.equal(eight, again)


@pytest.mark.parametrize("rows", [1, 32, 300])
def test_sparse_attention_at_the_real_shape(rows: int) -> None:
    """Split over the Selection, and whole; against fp64."""
    batch, inputs = paged(rows, LENGTH), attention_inputs(rows, LENGTH)
    selection = drawn_selection(batch, 2048)
    selection[0, 700:] = -1
    found = ops.sparse_attention(*inputs, selection, batch, 0.0625)
    last = slice(-8, None)
    doubles = [x[last].double() for x in inputs[:2]] + [x.double() for x in inputs[2:]]
    expected = torch_tiled.sparse_attention(
        *doubles, selection[last], batch.requests[last], batch.table, PAGE, 0.0625
    )  # fmt: skip
    assert error(found[last], expected) < 5e-3
    first = torch_tiled.sparse_attention(
        *[x[:1].double() for x in inputs[:2]],
        *doubles[2:],
        selection[:1],
        batch.requests[:1],
        batch.table,
        PAGE,
        0.0625,
    )
    assert error(found[:1], first) < 5e-3


def gradient_inputs(rows: int = 40, stored: int = 4096) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    batch, _ = Batch.contiguous([stored], "cuda").tail([rows])
    inputs = attention_inputs(rows, stored)
    places = drawn_selection(batch, 2048), batch.requests, batch.table, 1, 0.0625
    return (torch.randn_like(inputs[0]), *inputs), places


def attention_gradients() -> tuple[Tensor, ...]:
    floats, places = gradient_inputs()
    return torch.ops.nanoglm.sparse_attention_backward.default(*floats, *places)


def test_gradients_at_the_real_shape() -> None:
    floats, places = gradient_inputs()
    found = torch.ops.nanoglm.sparse_attention_backward.default(*floats, *places)
    expected = torch_tiled.sparse_attention_backward(*(x.double() for x in floats), *places)
    for ours, exact in zip(found, expected, strict=True):
        assert error(ours, exact) < 1e-2


def expert_inputs(rows: int) -> tuple[Tensor, ...]:
    gate_up, down = torch.randn(16, 2 * 512, 1024) * 0.03, torch.randn(16, 1024, 512) * 0.04
    ids = torch.rand(rows, 16).topk(4).indices
    return torch.randn(rows, 1024).bfloat16(), ids, torch.rand(rows, 4), gate_up.bfloat16(), down.bfloat16()


@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_experts_at_a_wide_shape(rows: int) -> None:
    x, ids, weights, gate_up, down = expert_inputs(rows)
    doubles = x.double(), ids, weights.double(), gate_up.double(), down.double()
    assert error(ops.experts(x, ids, weights, gate_up, down), torch_tiled.experts(*doubles)) < 1e-2
    grad = torch.randn_like(x)
    found = torch.ops.nanoglm.experts_backward.default(grad, x, ids, weights, gate_up, down)
    for ours, exact in zip(found, torch_tiled.experts_backward(grad.double(), *doubles), strict=True):
        assert error(ours, exact) < 1.5e-2


CASES: dict[str, Callable[[], object]] = {
    "select": lambda: ops.select(*index_inputs(64, exact=False)[:3], index_inputs(64, exact=False)[3], 2048),
    "attention": lambda: ops.sparse_attention(
        *attention_inputs(64, LENGTH), drawn_selection(paged(64, LENGTH), 2048), paged(64, LENGTH), 0.0625
    ),
    "decoding": lambda: ops.sparse_attention(
        *attention_inputs(1, LENGTH), drawn_selection(paged(1, LENGTH), 2048), paged(1, LENGTH), 0.0625
    ),
    "experts": lambda: ops.experts(*expert_inputs(500)),
    "experts backward": lambda: torch.ops.nanoglm.experts_backward.default(
        torch.ones(500, 1024).bfloat16(), *expert_inputs(500)
    ),
    "attention backward": attention_gradients,
    "writing": lambda: written_keys(64),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_runs_give_the_same_bits(name: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(10):
            torch.manual_seed(1)
            found = CASES[name]()
            runs.append([x.clone() for x in (found if isinstance(found, tuple) else (found,))])
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.fixture(scope="module")
def models() -> tuple[GLM, GLM]:
    """The same on the CPU and on the GPU."""
    config = GLMConfig.preset("tiny")
    host = GLM(config).initialise(0, shared=0.1)
    device = GLM(config)
    device.load_state_dict(host.state_dict())
    return host.eval(), device.cuda().eval()


def whole(model: GLM, ids: list[int], **options: str) -> Tensor:
    device = model.lm_head.weight.device
    batch = Batch.contiguous([len(ids)], device)
    return model.logits(model(torch.tensor(ids, device=device), batch, BatchStore(), **options).hidden)


@pytest.mark.parametrize("attention", ["sparse", "masked", "dense"])
def test_the_model_gives_the_cpus_logits(models: tuple[GLM, GLM], attention: str) -> None:
    ids = random_ids(models[0].config, 150)
    with torch.no_grad():
        expected, found = (whole(model, ids, attention=attention) for model in models)
    torch.testing.assert_close(found.cpu(), expected, atol=2e-4, rtol=1e-4)


def test_generation_says_the_same_words(models: tuple[GLM, GLM]) -> None:
    prompt, params = random_ids(models[0].config, 100), SamplingParams(max_tokens=24, temperature=0.0)
    said = [list(generate(model, prompt, params)) for model in models]
    assert said[0] == said[1]


@pytest.mark.parametrize("drafts", [0, 3])
def test_an_engine_whose_steps_are_graphs_says_the_same_words(models: tuple[GLM, GLM], drafts: int) -> None:
    """Requests that come and go, over pages in any order; each like the slow loop's."""
    config, device = models[1].config, models[1]
    engine = Engine(device, pages=40, drafts=drafts, budget=128)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    prompts = [random_ids(config, 30 + 45 * i)[7 * i :] for i in range(4)]
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.busy:
        engine.step()
    captured = {name for name, *_ in engine.runner.graphs.captured}
    assert captured >= ({"step", "draft"} if drafts else {"step"})
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.outputs == list(generate(device, prompt, params))


def test_drafts_of_graphs_are_those_of_calls(models: tuple[GLM, GLM]) -> None:
    """Step by step: chains of all depths by one graph, entries by graphs of their shapes, requests that leave."""
    both: list[tuple[Engine, list[Request]]] = []
    for graphs in (True, False):
        engine = Engine(models[1], pages=60, drafts=5)
        if not graphs:
            engine.runner.graphs = Graphs()
        params = [SamplingParams(max_tokens=n) for n in (40, 12, 30)]
        both.append((engine, [engine.add(random_ids(models[1].config, 55 + n.max_tokens), n) for n in params]))
    captured, called = both
    while captured[0].busy:
        for engine, _ in both:
            engine.step()
        for request, other in zip(captured[1], called[1], strict=True):
            assert (request.outputs, request.drafts) == (other.outputs, other.drafts)
    assert {name for name, *_ in captured[0].runner.graphs.captured} == {"step", "entries", "draft"}
    assert not called[0].busy and not called[0].runner.graphs.captured


def test_layers_that_share_a_selection_locate_its_rows_once(
    models: tuple[GLM, GLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanoglm.ops.triton import attention

    rows_of, located = attention.rows_of, []
    monkeypatch.setattr(attention, "rows_of", lambda *places: located.append(places) or rows_of(*places))
    with torch.no_grad():
        whole(models[1], random_ids(models[1].config, 70))
    assert len(located) == len(models[1].config.full_layers) < models[1].config.num_hidden_layers


def test_gradients_of_training_equal_the_cpus(models: tuple[GLM, GLM]) -> None:
    recipe = Recipe(steps=1, tokens=128, stages=(long(1.0, 128),))
    ids = torch.tensor(random_ids(models[0].config, 129))[None]
    for model in models:
        backward(model.train(), Sample.of(ids.to(model.lm_head.weight.device)), recipe, 0)
    for (name, host), device in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (host.grad is None) == (device.grad is None), name
        if host.grad is not None:
            assert float((device.grad.cpu() - host.grad).norm()) <= 1e-3 * float(host.grad.norm()) + 1e-7, name
        host.grad = device.grad = None


def test_the_forward_pass_compiles_to_one_graph(models: tuple[GLM, GLM]) -> None:
    ids = random_ids(models[1].config, 150)
    batch = Batch.contiguous([150], "cuda")
    compiled = torch.compile(
        lambda ids: models[1].logits(models[1](ids, batch, BatchStore()).hidden), fullgraph=True, dynamic=False
    )
    with torch.no_grad():
        found = compiled(torch.tensor(ids, device="cuda"))
        torch.testing.assert_close(found, whole(models[1], ids), atol=1e-4, rtol=1e-4)
