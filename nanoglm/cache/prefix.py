"""The prefix tree: pages that later requests may begin with.

A page of 64 tokens means something only behind the pages before it, so pages form a tree. What names a page is its 64
tokens *and the one behind them*: the MTP layer's entry of position t is computed from token t + 1, so the last entry
of a page belongs to one continuation and is not shared with another. (A request that goes on differently right at the
border of a page computes that page anew.) Index keys and latents need no such care.

The root is named by all else that decides what a page holds: model revision, Full/Shared pattern, dtypes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from nanoglm.cache.paged import PAGE, PagedCache


@dataclass(eq=False)
class Node:
    """A page of a prefix. The root has none."""

    page: int
    parent: Node | None = None
    key: Hashable = None
    children: dict[Hashable, Node] = field(default_factory=dict)


class PrefixCache:
    """The tree over the pages of one :class:`PagedCache`, of which it is a holder.

    Attributes:
        hits: tokens that :meth:`match` found.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._roots: dict[Hashable, Node] = {}
        # Least recently used first; a page is used with those before it, and counts as older than they.
        self._used: OrderedDict[Node, None] = OrderedDict()
        self.hits = 0

    def __len__(self) -> int:
        return len(self._used)

    def match(self, ids: Sequence[int], meaning: Hashable = None) -> list[int]:
        """The pages of the longest known beginning of ``ids``; at least the last token is not in them."""
        path = list(self._walk(ids, meaning))
        for node in reversed(path):
            self._used.move_to_end(node)
        self.hits += PAGE * len(path)
        return [node.page for node in path]

    def insert(self, ids: Sequence[int], pages: Sequence[int], meaning: Hashable = None) -> None:
        """Keeps the full pages of ``ids`` behind each of which another token of ``ids`` stands.

        Args:
            ids: tokens whose entries are written, that of the MTP layer included, but for the last one's.
            pages: the request's, in order. A page whose tokens are known already stays the request's alone.
        """
        node = self._roots.setdefault(meaning, Node(-1))
        path = []
        for key, page in zip(_keys(ids), pages, strict=False):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(page, node, key)
                self.cache.hold(page)
                self._used[child] = None
            path.append(node := child)
        for child in reversed(path):
            self._used.move_to_end(child)

    def evict(self, pages: int) -> int:
        """Lets go of pages that nobody else holds, least recently used first, until so many are free; how many were."""
        freed = 0
        for node in list(self._used):
            if freed >= pages:
                break
            if not node.children and self.cache.holders(node.page) == 1:
                assert node.parent is not None
                del node.parent.children[node.key], self._used[node]
                self.cache.release(node.page)
                freed += 1
        return freed

    def check(self, requests: Iterable[int]) -> None:
        """Asserts that every page is held exactly by ``requests`` and the tree, and free otherwise.

        Raises:
            AssertionError: with the page and what is wrong.
        """
        expected = Counter(page for request in requests for page in self.cache.table(request))
        nodes = [node for root in self._roots.values() for node in _below(root)]
        assert set(nodes) == set(self._used), "the tree and its order of use hold different pages"
        expected.update(node.page for node in nodes)
        for page in range(self.cache.pages):
            assert self.cache.holders(page) == expected[page], (
                f"page {page} has {self.cache.holders(page)} holders; expected {expected[page]}"
            )
        free = sum(1 for page in range(self.cache.pages) if not expected[page])
        assert self.cache.free_pages == free, f"{self.cache.free_pages} pages are free; expected {free}"

    def _walk(self, ids: Sequence[int], meaning: Hashable) -> Iterator[Node]:
        node = self._roots.get(meaning)
        for key in _keys(ids):
            node = None if node is None else node.children.get(key)
            if node is None:
                return
            yield node


def _keys(ids: Sequence[int]) -> Iterator[Hashable]:
    """Names of the pages behind which a token stands."""
    for begin in range(0, len(ids) - PAGE, PAGE):
        yield tuple(ids[begin : begin + PAGE + 1])


def _below(node: Node) -> Iterator[Node]:
    for child in node.children.values():
        yield child
        yield from _below(child)
