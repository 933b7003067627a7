"""bench-nano: the model that the benchmarks run, with random weights; and what is counted of it."""

from __future__ import annotations

import torch

from nanoglm.cache import PAGE, PagedCache
from nanoglm.config import FULL, SHARED, GLMConfig
from nanoglm.engine.generate import PREFILL_CHUNK, prefill
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.weights import materialise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
PATTERNS = ("all-Full", "IndexShare")


def bench_nano(index_heads: int = 4) -> GLMConfig:
    """8 layers of width 512: GLM-5.2's structure at a size that two cores prefill a million tokens of."""
    return GLMConfig.from_dict({
        "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 8, "first_k_dense_replace": 1,
        "num_attention_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32, "v_head_dim": 64, "index_n_heads": index_heads, "index_head_dim": 64,
        "index_topk": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 0,
        "index_topk_freq": 1, "rope_parameters": {"rope_theta": 8_000_000}, "max_position_embeddings": 1 << 20,
    })  # fmt: skip


def with_pattern(config: GLMConfig, pattern: str) -> GLMConfig:
    """The same with every layer Full, or one in four from the first on."""
    every = 1 if pattern == "all-Full" else 4
    return config.replace(
        indexer_types=tuple(SHARED if i % every else FULL for i in range(config.num_hidden_layers)),
    )


class Subject:
    """A model with a cache for ``tokens``, made once so that no run pays for new memory, and one open request."""

    def __init__(
        self,
        config: GLMConfig,
        tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        index_dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        self.config, self.dtype = config, dtype
        with torch.device("meta"):
            self.model = GLM(config)
        materialise(self.model, dtype, device)
        self.model.initialise(0).eval()
        self.cache = PagedCache(config, -(-tokens // PAGE), dtype=dtype, index_dtype=index_dtype, device=device)
        self.request = self.cache.open()

    def feed(self, ids: list[int], chunk: int = PREFILL_CHUNK) -> None:
        """Runs ids behind what the cache holds, in chunks, up to the last one's logits."""
        prefill(self.model, self.cache, self.request, ids, chunk)

    def reset(self, length: int = 0) -> None:
        """Forgets all but the first ``length`` tokens."""
        self.cache.rollback(self.request, self.cache.length(self.request) - length)

    @property
    def index_key_bytes(self) -> int:
        """Of one token in one Full layer."""
        latents = self.config.num_hidden_layers * (self.config.kv_lora_rank + self.config.qk_rope_head_dim)
        left = self.cache.bytes_per_token - latents * self.dtype.itemsize
        return left // len(self.config.full_layers)

    def active_parameters(self) -> int:
        """Weights of the layers that one token is multiplied with."""
        chosen = self.config.num_experts_per_tok / self.config.n_routed_experts
        counts = {name: p.numel() for name, p in self.model.model.layers.named_parameters()}
        return sum(int(n * chosen) if ".experts." in name else n for name, n in counts.items())


def random_ids(config: GLMConfig, count: int) -> list[int]:
    """The same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (count,), generator=generator).tolist()


def make(
    config: GLMConfig, tokens: int, dtype: str, index_dtype: str | None, patterns: tuple[str, ...] = PATTERNS
) -> dict[str, Subject]:
    """A model a pattern. Raises InputError for dtypes that there are no kernels for."""
    if dtype not in ("fp32", "bf16") or index_dtype not in (None, "fp32", "bf16", "int8"):
        raise InputError(f"dtypes are {dtype} and {index_dtype}; expected fp32 or bf16, index keys also int8")
    kinds = DTYPES[dtype], None if index_dtype is None else DTYPES[index_dtype]
    return {pattern: Subject(with_pattern(config, pattern), tokens, *kinds) for pattern in patterns}
