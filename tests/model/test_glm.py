"""IndexShare, forms of attention and the traps that need no other implementation to show."""

import pytest
import torch

from nanoglm.api import load
from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM, Attention, BatchStore, Tape
from nanoglm.model.indexer import Indexer
from nanoglm.ops import Batch

IDS = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(0))
BATCH = Batch.contiguous([60, 30])


@pytest.fixture(scope="module")
def model() -> GLM:
    return load("tiny").module


def test_shared_layers_own_no_indexer(model: GLM) -> None:
    owners = {name.split(".")[2] for name, _ in model.named_parameters() if ".indexer." in name}
    assert owners == {"0", "2", "4"}  # FSFS and the MTP layer


@torch.no_grad()
def test_shared_selection_is_the_same_object(model: GLM) -> None:
    selections = model(IDS, BATCH, BatchStore()).selections
    assert selections[1] is selections[0] and selections[3] is selections[2]
    assert not torch.equal(selections[0], selections[2])
    of_sequences = load("tiny").selections([[1, 2, 3], [4]])
    assert all(layers[1] is layers[0] for layers in of_sequences)


@torch.no_grad()
def test_selections_that_nobody_needs_are_let_go(model: GLM) -> None:
    kept, bare = (model(IDS, BATCH, BatchStore(), keep_selections=keep) for keep in (True, False))
    assert len(kept.selections) == model.config.num_hidden_layers and bare.selections == []
    assert torch.equal(bare.hidden, kept.hidden)


@torch.no_grad()
def test_shared_layer_without_a_selection_is_an_error(model: GLM) -> None:
    step = model(IDS, BATCH, BatchStore()).step
    with pytest.raises(RuntimeError, match="layer 1 is Shared"):
        model.layers[1](torch.randn(90, 64), step, None)


def test_glm_52_full_layers() -> None:
    full = GLMConfig.preset("glm-5.2").full_layers
    assert full == (0, 1, 2, *range(6, 75, 4)) and len(full) == 21


@torch.no_grad()
def test_absorbed_equals_expanded(model: GLM) -> None:
    sparse = model(IDS, BATCH, BatchStore())
    masked = model(IDS, BATCH, BatchStore(), attention="masked")
    torch.testing.assert_close(sparse.hidden, masked.hidden, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sparse_equals_dense_up_to_k_and_differs_beyond(model: GLM) -> None:
    """Below k everything visible is selected; beyond, an error in the indexer would show."""
    batch = Batch.contiguous([90])
    sparse = model(IDS, batch, BatchStore()).hidden
    dense = model(IDS, batch, BatchStore(), attention="dense").hidden
    k = model.config.index_topk
    torch.testing.assert_close(sparse[:k], dense[:k], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sparse[k:], dense[k:], atol=1e-3)


@pytest.mark.parametrize("attention", ["masked", "dense"])
def test_expanded_forms_refuse_a_paged_batch(model: GLM, attention: Attention) -> None:
    cache = PagedCache(model.config, 2)
    with pytest.raises(ValueError, match="paged batch"):
        model(IDS[:3], cache.extend([cache.open()], [3]), cache, attention=attention)


@torch.no_grad()
def test_replay_equals_recording(model: GLM) -> None:
    first = model(IDS, BATCH, BatchStore())
    again = model(IDS, BATCH, BatchStore(), selections=first.selections)
    assert torch.equal(first.hidden, again.hidden)
    other = [torch.where(s >= 0, s.clamp(max=0), s) for s in first.selections]  # everybody looks at token 0
    assert not torch.equal(first.hidden, model(IDS, BATCH, BatchStore(), selections=other).hidden)


@torch.no_grad()
def test_the_forward_pass_is_traced_as_one_graph(model: GLM) -> None:
    graphs = []

    def keep(graph, inputs):  # runs it as it is: a compiler needs a minute
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(lambda ids: model(ids, BATCH, BatchStore()).hidden, fullgraph=True, backend=keep)
    for _ in range(2):
        torch.testing.assert_close(traced(IDS), model(IDS, BATCH, BatchStore()).hidden, atol=1e-5, rtol=1e-5)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert len(graphs) == 1 and called.count("nanoglm.sparse_attention.default") == model.config.num_hidden_layers


@torch.no_grad()
def test_a_sequence_does_not_see_its_neighbour(model: GLM) -> None:
    together = model(IDS, BATCH, BatchStore()).hidden
    alone = model(IDS[60:], Batch.contiguous([30]), BatchStore()).hidden
    assert torch.equal(together[60:], alone)


def test_indexer_moves_no_backbone() -> None:
    """Gradient border: the indexer's inputs are detached."""
    indexer = Indexer(GLMConfig.preset("tiny"))
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter)
    x, cq = torch.randn(4, 64, requires_grad=True), torch.randn(4, 48, requires_grad=True)
    rotary = load("tiny").module.rotary(torch.arange(4))
    sum(t.sum() for t in (*indexer.queries(x, cq, rotary), indexer.keys(x, rotary).finished())).backward()
    assert x.grad is None and cq.grad is None
    assert all(parameter.grad is not None for parameter in indexer.parameters())


@torch.no_grad()
def test_rope_at_a_million_tokens() -> None:
    """Angles are taken in fp32 as every reference does, and stay finite and of norm one at 2^20."""
    rotary = load("tiny").module.rotary(torch.tensor([0, 1, 2**20 - 1]))
    assert torch.equal(rotary.cos[0], torch.ones(4)) and torch.equal(rotary.sin[0], torch.zeros(4))
    torch.testing.assert_close(rotary.cos**2 + rotary.sin**2, torch.ones(3, 4))
    x = torch.randn(3, 8)
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))


def test_router_bias_stays_fp32_in_bf16_models() -> None:
    model = load("tiny", dtype=torch.bfloat16).module
    assert model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.layers[0].self_attn.indexer.weights_proj.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_no_mtp_layer_is_one_sentence() -> None:
    model = GLM(GLMConfig.preset("tiny").replace(num_nextn_predict_layers=0)).initialise()
    output = model(IDS, BATCH, BatchStore())
    with pytest.raises(InputError, match=r"no MTP layer; expected tensors model\.layers\.4\.\*"):
        model.draft(IDS, output.hidden, output.step)


@torch.no_grad()
def test_mtp_selects_for_itself_after_a_replay(model: GLM) -> None:
    """Replaying Selections concerns the decoder layers; the MTP layer's step 0 runs its own indexer."""
    first = model(IDS, BATCH, BatchStore())
    again = model(IDS, BATCH, BatchStore(), selections=first.selections)
    drafted, replayed = (model.draft(IDS, output.hidden, output.step) for output in (first, again))
    assert torch.equal(drafted[0], replayed[0]) and torch.equal(drafted[1], replayed[1])


@torch.no_grad()
def test_mtp_routes_for_itself_after_a_replay(model: GLM) -> None:
    """Recorded routes concern the decoder layers; drafting goes on as without a replay."""
    tape = Tape(indexers=False)
    first = model(IDS, BATCH, BatchStore(), tape=tape)
    again = model(IDS, BATCH, BatchStore(), selections=first.selections, routes=dict(tape.experts))
    drafts = [model.draft(IDS, output.hidden, output.step)[0] for output in (first, again)]
    assert torch.equal(*drafts)
