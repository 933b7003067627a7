"""Any engine against this code: a small reference checkpoint, a server that has loaded it, and questions to it.

Prompts lie below, at and above top-k (where engines without a right indexer give themselves away), reach across borders
of chunks, and share prefixes. Asked for are log-probabilities of prompts and greedy continuations; the expected ones
are computed here, from the same files in fp32.

The server is asked by OpenAI's ``/v1/completions`` with token ids, ``echo`` and ``logprobs``, as vLLM, SGLang and ours
answer it. Ids of generated tokens are compared where it gives them (``return_token_ids``), else what it gives for them.

Source: serving spec 8, architecture spec 8.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nanoglm.api import Model, load
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.config import GLMConfig
from nanoglm.engine import SamplingParams, generate
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.verify.receipt import Receipt
from nanoglm.verify.rows import Row

Shape = Literal["tiny", "engine"]
GREEDY = 8  # tokens of a continuation
# A greedy token must lead by so much, or rounding may choose another.
MARGIN = 0.1
SHARP = 3  # the head's weights are so much larger, or hardly a greedy token would lead
# Head counts and widths that engines' kernels are written for; everything that they do not ask about is small.
ENGINE = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 64, "num_key_value_heads": 64,
    "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "intermediate_size": 512,
    "moe_intermediate_size": 128, "n_routed_experts": 16, "num_experts_per_tok": 4, "vocab_size": 320,
}  # fmt: skip


def write_reference(directory: Path, shape: Shape = "tiny") -> Model:
    """Writes the checkpoint that an engine is to load: random weights of one seed, in bf16.

    Args:
        shape: tiny, for engines whose kernels take any; engine, with the widths of GLM-5.2's attention and k 2,048.

    Raises:
        InputError: the directory exists and is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"reference {directory} exists and is not empty; expected a new directory")
    if shape == "tiny":
        config = GLMConfig.preset("tiny").replace(initializer_range=0.2, eos_token_id=())
    else:
        kept = {"rope_parameters": {"rope_theta": 8_000_000, "rope_type": "default"}, "eos_token_id": []}
        config = GLMConfig.preset("tiny", **ENGINE, **kept).with_pattern("FFFSSS")
    module = GLM(config).initialise(5)
    with torch.no_grad():
        module.lm_head.weight.mul_(SHARP)
    Model(module, byte_tokenizer()).save(directory)
    return load(directory)


def verify_endpoint(
    url: str,
    reference: Path,
    *,
    tolerance: float = 1e-3,
    longest: int | None = None,
    key: str | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Receipt:
    """Compares a server that has loaded the reference checkpoint with this code.

    Args:
        url: of the server, with or without /v1. reference: the checkpoint's directory. tolerance: of a log-probability;
            5e-2 suits an engine in bf16. longest: tokens of the longest prompt; a little above 4 times k if left out,
            at least 1,100.

    Raises:
        InputError: the server cannot be reached, or does not answer as such a server does.
    """
    model, server = load(reference), _Server(url, key)
    receipt = Receipt(versions={"engine": server.name, "url": url, "reference": str(reference)})
    questions = list(_questions(model, longest))
    for i, (name, ids) in enumerate(questions):
        progress(name, i / len(questions))
        expected = model.logits([ids])[0].log_softmax(-1)
        answered = server.complete(ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
        found = (answered.get("logprobs") or {}).get("token_logprobs") or []
        if len(found) < len(ids):
            receipt.not_run.append(f"log-probabilities of {name}: the server gives none for echo and logprobs")
        else:
            values = expected[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            differences = [abs(a - b) for a, b in zip(found[1 : len(ids)], values.tolist(), strict=True)]
            receipt.rows.append(("engine", Row(f"log-probabilities, {name}", max(differences), tolerance)))
        receipt.rows.append(("engine", Row(f"greedy tokens, {name}", _greedy(model, server, ids, tolerance), 0.0)))
    return receipt


def _questions(model: Model, longest: int | None) -> list[tuple[str, list[int]]]:
    """Prompts by name. The last three share their beginning and come one after the other."""
    k = model.config.index_topk
    longest = max(4 * k + 100, 1100) if longest is None else longest
    lengths = {"below k": 3 * k // 4, "at k": k, "one above k": k + 1, "above k": 5 * k // 2, "chunked": longest}
    found = [(f"{n:,} tokens ({name})", _prompt(model, n, seed)) for seed, (name, n) in enumerate(lengths.items())]
    shared = max(4 * k, 200)
    first = _prompt(model, shared, 11)
    other = _prompt(model, shared, 12, first[: 2 * shared // 3])
    return [*found, ("a prefix, first", first), ("a prefix, then another end", other), ("a prefix, again", first)]


def _prompt(model: Model, length: int, seed: int, begin: Sequence[int] = ()) -> list[int]:
    """Random text whose greedy continuation is certain."""
    for attempt in range(50):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        ids = [*begin, *torch.randint(32, 127, (length - len(begin),), generator=generator).tolist()]
        if _certain(model, ids):
            return ids
    raise InputError("reference has no certain greedy continuation; expected the checkpoint of --write-reference")


def _certain(model: Model, ids: Sequence[int]) -> bool:
    outputs = list(generate(model.module, ids, SamplingParams(GREEDY)))
    logits = model.logits([[*ids, *outputs[:-1]]])[0][len(ids) - 1 :].log_softmax(-1)
    best = logits.topk(2).values
    return bool(((best[:, 0] - best[:, 1]) > MARGIN).all())


def _greedy(model: Model, server: _Server, ids: Sequence[int], tolerance: float) -> float:
    """How many of the server's greedy tokens are others than ours."""
    ours = list(generate(model.module, ids, SamplingParams(GREEDY)))
    answered = server.complete(
        ids, max_tokens=GREEDY, temperature=0, logprobs=1, return_token_ids=True, ignore_eos=True, echo=False
    )
    theirs = answered.get("token_ids")
    if theirs is not None:
        return float(sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs)))
    found = (answered.get("logprobs") or {}).get("token_logprobs") or []
    logits = model.logits([[*ids, *ours[:-1]]])[0][len(ids) - 1 :].log_softmax(-1)
    expected = logits[torch.arange(GREEDY), torch.tensor(ours)].tolist()
    near = sum(abs(a - b) <= tolerance for a, b in zip(expected, found, strict=False))
    return float(GREEDY - near)


class _Server:
    """What answers under a URL."""

    def __init__(self, url: str, key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"endpoint is {url!r}; expected a URL such as http://127.0.0.1:8000")
        self._url, self._key = url.rstrip("/").removesuffix("/v1"), key
        models = self._ask("/v1/models").get("data") or []
        if not models or not isinstance(models[0], Mapping) or "id" not in models[0]:
            raise InputError(f"endpoint {url} serves no model; expected one in /v1/models")
        self.name = str(models[0]["id"])

    def complete(self, ids: Sequence[int], **fields: Any) -> Mapping[str, Any]:
        """The one choice of a completion."""
        answered = self._ask("/v1/completions", {"model": self.name, "prompt": list(ids), **fields})
        choices = answered.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
            raise InputError(f"endpoint {self._url} answers {str(answered)[:200]}; expected one choice")
        return choices[0]

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self._url + path, data, headers), timeout=600) as reply:
                found = json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise InputError(f"endpoint {self._url}{path} refuses with {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"endpoint {self._url}{path} cannot be asked: {error}") from None
        if not isinstance(found, Mapping):
            raise InputError(f"endpoint {self._url}{path} answers {str(found)[:200]}; expected an object")
        return found
