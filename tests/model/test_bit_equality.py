"""Whole, chunked, token by token, on shuffled pages, after rollback: the same bits (design idea 2)."""

import pytest
import torch

from nanoglm import ops
from nanoglm.api import load
from nanoglm.cache import PAGE, PagedCache
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch

LENGTH = 520
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=DTYPES, ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> GLM:
    return load("tiny", dtype=request.param).module


@pytest.fixture(scope="module")
def ids(model: GLM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (LENGTH,), generator=generator)


@pytest.fixture(scope="module")
def whole(model: GLM, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with torch.no_grad():
        output = model(ids, Batch.contiguous([LENGTH]), BatchStore())
        return model.logits(output.hidden), output.selections


def shuffled_cache(model: GLM, pages: int = 40) -> PagedCache:
    """A cache whose next pages come in random order and already hold rubbish."""
    cache = PagedCache(model.config, pages, dtype=model.lm_head.weight.dtype)
    cache._free = torch.randperm(pages, generator=torch.Generator().manual_seed(5)).tolist()
    for pool in [*cache._keys, *cache._index_keys.values()]:
        pool.fill_(torch.nan)  # a row read before it is written shows up
    return cache


@torch.no_grad()
def run(model: GLM, cache: PagedCache, request: int, ids: torch.Tensor, chunk: int):
    logits, selections = [], []
    for part in ids.split(chunk):
        output = model(part, cache.extend([request], [len(part)]), cache)
        logits.append(model.logits(output.hidden))
        selections.append(output.selections)
    return torch.cat(logits), [torch.cat(layer) for layer in zip(*selections, strict=True)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 500, LENGTH])
def test_chunked_equals_whole(model: GLM, ids: torch.Tensor, whole, chunk: int) -> None:
    cache = shuffled_cache(model)
    logits, selections = run(model, cache, cache.open(), ids, chunk)
    assert torch.equal(logits, whole[0])
    assert all(torch.equal(a, b) for a, b in zip(selections, whole[1], strict=True))


@torch.no_grad()
def test_every_row_count_from_1_to_64(model: GLM, ids: torch.Tensor, whole) -> None:
    """The last M rows as one batch, for every M, on a cache that holds the rest."""
    cache = shuffled_cache(model)
    request = cache.open()
    run(model, cache, request, ids, 100)
    for count in range(1, 65):
        cache.rollback(request, count)
        logits, _ = run(model, cache, request, ids[-count:], count)
        assert torch.equal(logits, whole[0][-count:]), count


@torch.no_grad()
def test_rollback_restores_the_state_exactly(model: GLM, ids: torch.Tensor, whole) -> None:
    """Wrong tokens come, are taken back (1 to 70 of them, across pages), and the right ones follow."""
    cache = shuffled_cache(model)
    request = cache.open()
    run(model, cache, request, ids[:450], 450)
    for count in (1, 2, 5, 63, 64, 65, 70):
        free = cache.free_pages
        run(model, cache, request, ids.flip(0)[:count], 16)
        cache.rollback(request, count)
        assert cache.free_pages == free and cache.length(request) == 450
        logits, _ = run(model, cache, request, ids[450:], 70)
        assert torch.equal(logits, whole[0][450:]), count
        cache.rollback(request, LENGTH - 450)


@torch.no_grad()
def test_company_changes_nothing(model: GLM, ids: torch.Tensor, whole) -> None:
    """Other requests in the batch, of other lengths and phases, leave a request's bits alone."""
    cache = shuffled_cache(model)
    mine, other, third = cache.open(), cache.open(), cache.open()
    seen = []
    for begin in range(0, LENGTH, 65):
        part = ids[begin : begin + 65]
        batch = cache.extend([other, mine, third], [3, len(part), 17])
        output = model(torch.cat([ids[:3], part, ids[20:37]]), batch, cache)
        seen.append(model.logits(output.hidden)[3 : 3 + len(part)])
    assert torch.equal(torch.cat(seen), whole[0])


@torch.no_grad()
def test_nano_shape_token_by_token() -> None:
    """The default model's shape (four heads, three-quarters Shared), 200 tokens one at a time."""
    model = GLM(GLMConfig.preset("nano")).initialise(1)
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1))
    output = model(ids, Batch.contiguous([200]), BatchStore())
    cache = shuffled_cache(model)
    logits, _ = run(model, cache, cache.open(), ids, 1)
    assert torch.equal(logits, model.logits(output.hidden))


def test_gemm_rows_are_independent_of_their_number() -> None:
    """The claim ops.linear makes; without the padding fp32 breaks it (1, 2, 10 and 11 rows)."""
    torch.manual_seed(0)
    for inputs, outputs in ((64, 320), (33, 70), (17, 9), (512, 96)):
        x, weight = torch.randn(300, inputs), torch.randn(outputs, inputs)
        heads = torch.randn(2, inputs, outputs)
        expected, headwise = ops.linear(x, weight), ops.headwise(x[:, None].repeat(1, 2, 1), heads)
        for rows in [*range(1, 65), 200]:
            assert torch.equal(ops.linear(x[:rows], weight), expected[:rows]), rows
            found = ops.headwise(x[:rows, None].repeat(1, 2, 1), heads)
            assert torch.equal(found, headwise[:rows]), rows


def test_page_holds_64_tokens() -> None:
    assert PAGE == 64


@pytest.mark.parametrize("counts", [[4, 1], [0, -1]])
def test_a_tail_is_part_of_its_request(counts: list[int]) -> None:
    with pytest.raises(InputError, match="tail of request"):
        Batch.contiguous([3, 2]).tail(counts)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 64, 500])
def test_a_tail_equals_the_whole(model: GLM, ids: torch.Tensor, whole, chunk: int) -> None:
    """The last layer at no row, at one and at several gives what the whole pass gives, and writes the same keys."""
    cache = shuffled_cache(model)
    mine, other = cache.open(), cache.open()
    for begin in range(0, LENGTH, chunk):
        part = ids[begin : begin + chunk]
        batch = cache.extend([other, mine], [1, len(part)])
        wanted = [(begin // chunk) % 2, min(len(part), begin // chunk % 3)]
        output = model(torch.cat([ids[:1], part]), batch, cache, tail=wanted)
        assert output.hidden.shape[0] == sum(wanted)
        end = begin + len(part)
        logits = model.logits(output.hidden)[wanted[0] :]
        assert torch.equal(logits, whole[0][end - wanted[1] : end])
        last = output.selections[-1]
        assert last is not None and torch.equal(last[wanted[0] :], whole[1][-1][end - wanted[1] : end])
