"""The cache's books: pages, lengths, refusals that change nothing."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanoglm.cache import PAGE, PagedCache
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError

CONFIG = GLMConfig.preset("tiny")


def test_shared_layers_own_no_index_cache() -> None:
    """Full layers (0 and 2 of tiny) and the MTP layer have index keys, Shared layers none."""
    assert sorted(PagedCache(CONFIG, 1)._index_keys) == [0, 2, 4]


def test_bytes_per_token() -> None:
    """5 layers of 32 latent + 8 rope values, 3 of 16 index values, 4 bytes each."""
    assert PagedCache(CONFIG, 1).bytes_per_token == 4 * (5 * 40 + 3 * 16)


def test_glm_52_cache_sizes() -> None:
    """Architecture spec 7: 89,856 + 5,376 bytes in bf16, and 1,152 + 256 for the MTP layer."""
    config = GLMConfig.preset("glm-5.2")
    layers = [(config.kv_lora_rank + config.qk_rope_head_dim) * 2] * 78
    index = [config.index_head_dim * 2 for i in range(78) if config.has_indexer(i)]
    assert (sum(layers), sum(index)) == (89_856, 5_376)


def test_too_few_pages_is_refused_and_changes_nothing() -> None:
    cache = PagedCache(CONFIG, 2)
    a, b = cache.open(), cache.open()
    cache.extend([a], [60])
    with pytest.raises(InputError, match="1 free pages"):
        cache.extend([a, b], [10, 1])
    assert (cache.length(a), cache.length(b), cache.free_pages) == (60, 0, 1)


def test_rollback_beyond_the_request_is_refused() -> None:
    cache = PagedCache(CONFIG, 2)
    request = cache.open()
    cache.extend([request], [5])
    with pytest.raises(InputError, match="expected 0 to 5"):
        cache.rollback(request, 6)
    assert cache.length(request) == 5


class Books(RuleBasedStateMachine):
    """Drawn opens, extends, rollbacks and closes: no page is lost, held twice or held needlessly."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.held = PagedCache(CONFIG, 12), {}

    @rule()
    def open(self) -> None:
        self.held[self.cache.open()] = 0

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 200))
    def extend(self, data, count: int) -> None:
        request = data.draw(st.sampled_from(sorted(self.held)))
        try:
            batch = self.cache.extend([request], [count])
        except InputError:
            return
        self.held[request] += count
        assert batch.lengths == (self.held[request],)
        assert batch.positions.tolist() == list(range(self.held[request] - count, self.held[request]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def rollback(self, data) -> None:
        request = data.draw(st.sampled_from(sorted(self.held)))
        count = data.draw(st.integers(0, self.held[request]))
        self.cache.rollback(request, count)
        self.held[request] -= count

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def close(self, data) -> None:
        request = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.close(request)
        del self.held[request]

    @invariant()
    def books_balance(self) -> None:
        tables = [page for table in self.cache._tables.values() for page in table]
        assert sorted(tables + self.cache._free) == list(range(12))
        for request, length in self.held.items():
            assert len(self.cache._tables[request]) == -(-length // PAGE)
            assert self.cache.length(request) == length


TestBooks = Books.TestCase
TestBooks.settings = settings(deadline=None, max_examples=30, derandomize=True)
