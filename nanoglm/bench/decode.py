"""``nanoglm bench decode``: milliseconds a token behind contexts of several lengths."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch

from nanoglm.bench.ops import READ, reading
from nanoglm.bench.prefill import rows, shape
from nanoglm.bench.result import Result
from nanoglm.bench.shapes import PATTERNS, Subject, bench_nano, make, random_ids
from nanoglm.bench.timing import Parts, Progress, check_lengths, check_rounds, interleave, parts_of
from nanoglm.model.keys import IndexKeys, Latents

TOKENS = 30  # at least so many are timed


def decode(
    lengths: tuple[int, ...], rounds: int = 5, dtype: str = "bf16", index_dtype: str | None = None,
    progress: Progress = lambda what, share: None,
) -> Result:  # fmt: skip
    """Single tokens behind each length, both patterns in turns.

    The cache is filled with random latents and keys instead of a prefill: which rows are read hardly depends on
    values, how many not at all. Each round takes its tokens back, so the length stays.

    Raises:
        InputError: too few rounds, a length or dtype out of range.
    """
    check_rounds(rounds)
    check_lengths(lengths)
    config, lengths, each = bench_nano(), tuple(sorted(set(lengths))), -(-TOKENS // rounds)
    subjects = make(config, max(lengths) + each, dtype, index_dtype)
    result = Result("decode", rounds, shape(config, dtype, index_dtype))
    read = reading(1 << 28)  # several times what caches hold
    for at, length in enumerate(lengths):
        for subject in subjects.values():
            fill(subject, length)
        runs: dict[str, list[Parts]] = {pattern: [] for pattern in PATTERNS}
        seconds: list[float] = []
        for turn in range(rounds):
            progress(f"{length:,} tokens", (at + turn / rounds) / len(lengths))
            seconds.append(interleave({READ: read.run}, 1)[READ].median)
            for pattern in PATTERNS[:: -1 if turn % 2 else 1]:
                subject = subjects[pattern]
                subject.feed([0])  # brings its weights back
                subject.reset(length)
                runs[pattern] += [parts_of(partial(subject.feed, [token])) for token in random_ids(config, each)]
                subject.reset(length)
        table = rows(length, runs)
        for row in table:
            for name in ("seconds", "low", "high", "indexer", "attention", "rest"):
                row[name] *= 1e3
            row["ms"] = row.pop("seconds")
            row["limit"] = bytes_read(subjects[row["pattern"]], length) * median(seconds) / read.work * 1e3
            row["share"] = row["limit"] / row["ms"]
        result.rows.setdefault("decode", []).extend(table)
    return result


@torch.no_grad()
def fill(subject: Subject, length: int) -> None:
    """Random latents and index keys up to ``length`` tokens."""
    config, cache, model = subject.config, subject.cache, subject.model
    while (held := cache.length(subject.request)) < length:
        count = min(8192, length - held)
        batch = cache.extend([subject.request], [count])
        rotary = model.rotary(batch.turns)
        for layer, attention in enumerate(block.self_attn for block in model.layers):
            latents = torch.randn(count, config.kv_lora_rank + config.qk_rope_head_dim).to(subject.dtype)
            cache.write_latent(layer, Latents(latents, attention.kv_a_layernorm, rotary), batch)
            if attention.indexer is not None:
                keys = torch.randn(count, config.index_head_dim).to(subject.dtype)
                cache.write_index_keys(layer, IndexKeys(keys, attention.indexer.k_norm, rotary), batch)


def bytes_read(subject: Subject, length: int) -> int:
    """Of one token: the weights it meets, the head, every index key of the Full layers, the selected rows."""
    config = subject.config
    weights = subject.active_parameters() + config.vocab_size * config.hidden_size
    selected = config.num_hidden_layers * min(config.index_topk, length)
    return (
        (weights + selected * (config.kv_lora_rank + config.qk_rope_head_dim)) * subject.dtype.itemsize
        + len(config.full_layers) * length * subject.index_key_bytes
    )  # fmt: skip
