"""The paged latent cache."""

from nanoglm.cache.paged import PAGE, PagedCache

__all__ = ["PAGE", "PagedCache"]
