"""Figures for Prometheus, under vLLM's names, so that dashboards made for it work (serving spec 4.4, 5.1)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nanoglm.engine import Engine, Request

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300, 1200)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 200_000, 1_048_576)


class Metrics:
    """All figures of one engine, in a registry of their own: two servers in a process do not mix."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._engine, self.registry, labels = engine, CollectorRegistry(), ("model_name",)

        def gauge(what: str, text: str) -> Gauge:
            return Gauge(f"vllm:{what}", text, labels, registry=self.registry).labels(name)

        def counter(what: str, text: str, *more: str) -> Counter:
            made = Counter(f"vllm:{what}", text, labels + more, registry=self.registry)
            return made if more else made.labels(name)

        def histogram(what: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"vllm:{what}", text, labels, registry=self.registry, buckets=buckets).labels(name)

        self._name = name
        self._running = gauge("num_requests_running", "Requests that run.")
        self._waiting = gauge("num_requests_waiting", "Requests that wait.")
        self._usage = gauge(
            "kv_cache_usage_perc", "Share of the cache's pages that requests and prefixes hold, 0 to 1."
        )
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found there.")
        self._prompt = counter("prompt_tokens", "Prompt tokens of requests that have begun.")
        self._generation = counter("generation_tokens", "Tokens generated.")
        self._success = counter("request_success", "Requests that have ended.", "finished_reason")
        self._prompts = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generations = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._first = histogram("time_to_first_token_seconds", "From a request's coming to its first token.")
        self._between = histogram("inter_token_latency_seconds", "Between steps that gave a request tokens.")
        self._whole = histogram("e2e_request_latency_seconds", "From a request's coming to its end.")
        self._queued = histogram("request_queue_time_seconds", "From a request's coming to its first step.")
        self._prefill = histogram("request_prefill_time_seconds", "From a request's first step to its first token.")
        self._decode = histogram("request_decode_time_seconds", "From a request's first token to its last.")
        self._iteration = histogram("iteration_tokens_total", "Tokens computed in a step of the engine.", _TOKENS)
        self._drafts = counter("spec_decode_num_drafts", "Chains of drafts that were verified.")
        self._drafted = counter("spec_decode_num_draft_tokens", "Drafts that were verified.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafts that were accepted.")
        self._places = counter("spec_decode_num_accepted_tokens_per_pos", "By their place in a chain.", "position")

    def step(self) -> None:
        """One step of the engine is over."""
        self._iteration.observe(self._engine.computed)

    def finished(self, request: Request, tokens: int, reason: str, times: Sequence[float]) -> None:
        """A request has ended, for whatever reason.

        Args:
            tokens: that its listener was given. times: of its coming, and of every step that gave it tokens.
        """
        now, begun = time.monotonic(), request.began
        self._success.labels(self._name, reason).inc()
        self._generation.inc(tokens)
        self._whole.observe(now - times[0])
        if begun is not None:
            self._prompt.inc(len(request.prompt))
            self._prompts.observe(len(request.prompt))
            self._queries.inc(len(request.prompt))
            self._hits.inc(request.hit)
            self._queued.observe(max(0.0, begun - times[0]))
        if times[1:]:
            self._generations.observe(tokens)
            self._first.observe(times[1] - times[0])
            self._decode.observe(times[-1] - times[1])
            if begun is not None:
                self._prefill.observe(max(0.0, times[1] - begun))
        for before, after in pairwise(times[1:]):
            self._between.observe(after - before)
        if request.drafted:
            self._drafts.inc(request.drafted[0])
            self._drafted.inc(sum(request.drafted))
            self._accepted.inc(sum(request.accepted))
        for place, count in enumerate(request.accepted):
            self._places.labels(self._name, str(place)).inc(count)

    def text(self) -> bytes:
        """In Prometheus' format."""
        cache, scheduler = self._engine.cache, self._engine.scheduler
        self._running.set(len(scheduler.running))
        self._waiting.set(len(scheduler.waiting))
        self._usage.set(1 - cache.free_pages / cache.pages)
        return generate_latest(self.registry)
