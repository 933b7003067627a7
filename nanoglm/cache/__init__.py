"""The paged latent cache and the tree of prefixes in it."""

from nanoglm.cache.paged import PAGE, PagedCache
from nanoglm.cache.prefix import PrefixCache

__all__ = ["PAGE", "PagedCache", "PrefixCache"]
