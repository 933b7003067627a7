"""What a reply's tokens selected and which experts they visited: the engine's own recording, for the page to show.

Asked for with ``"xray": true``; the last few replies are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from fastapi import APIRouter
from starlette.responses import Response

from nanoglm.engine.record import Trace
from nanoglm.errors import InputError
from nanoglm.server.http import JSON
from nanoglm.server.service import NotFound, Reply, Service

KEPT = 16
MOST_BINS = 512


class XRay:
    """One reply."""

    def __init__(self, name: str, service: Service, reply: Reply) -> None:
        self.name, self.service, self.config = name, service, service.model.config
        assert reply.request.trace is not None
        self.trace: Trace = reply.request.trace
        self.prompt = len(reply.job.prompt)
        self.ids = [*reply.job.prompt, *reply.request.outputs[: reply.tokens]]
        self.drafted = [int(kept) for kept in reply.request.kept[: reply.tokens]]
        self.rows = min(len(self.trace.ids), len(self.ids))

    def summary(self) -> dict[str, Any]:
        """The tokens, and what the model is made of. The last token was drawn and not run: it has no row."""
        config, stream = self.config, self.service.tokenizer.token_bytes
        source, last = list[int](), 0
        for layer in range(config.num_hidden_layers):
            last = layer if layer in config.full_layers else last
            source.append(last)
        return {
            "id": self.name,
            "model": self.service.names[0],
            "pattern": config.pattern,
            "index_topk": config.index_topk,
            "prompt_tokens": self.prompt,
            "rows": self.rows,
            "tokens": [{"id": i, "text": stream(i, skip_special=False).decode(errors="replace")} for i in self.ids],
            "drafted": self.drafted,
            "full_layers": list(config.full_layers),
            "source": source,
            "moe_layers": [i for i in range(config.num_hidden_layers) if config.is_moe(i)],
            "n_routed_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }

    def row(self, position: int) -> dict[str, Any]:
        """What the token at a position selected in every Full layer, and its experts in every MoE layer.

        Raises:
            InputError: a position without a row.
        """
        if not 0 <= position < self.rows:
            raise InputError(f"position is {position}; expected 0 to {self.rows - 1}")
        chosen = {str(layer): rows[position] for layer, rows in self.trace.selections.items()}
        return {
            "position": position,
            "selected": {layer: row[row >= 0].tolist() for layer, row in chosen.items()},
            "experts": {str(layer): rows[position].tolist() for layer, rows in self.trace.routes.items()},
        }

    def heat(self, layer: int, bins: int) -> dict[str, Any]:
        """How many of the positions that each token of the reply selected lie in each of ``bins`` equal stretches.

        Raises:
            InputError: no Full layer, or a number of stretches out of range.
        """
        if layer not in self.config.full_layers:
            raise InputError(f"layer is {layer}; expected a Full layer, one of {list(self.config.full_layers)}")
        if not 1 <= bins <= MOST_BINS:
            raise InputError(f"bins is {bins}; expected 1 to {MOST_BINS}")
        # The first token of the reply was drawn at the prompt's last position: what it saw is that row.
        rows = list(range(max(0, self.prompt - 1), self.rows))
        chosen = self.trace.selections[layer][rows].long()
        places = torch.where(chosen >= 0, chosen * bins // max(1, len(self.ids)), bins)
        counts = torch.zeros(len(rows), bins + 1, dtype=torch.int64).scatter_add_(1, places, torch.ones_like(places))
        return {"layer": layer, "bins": bins, "rows": rows, "counts": counts[:, :bins].tolist()}


class XRays:
    """The last replies that asked to be kept, by the id of their response."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, XRay] = OrderedDict()

    def keep(self, name: str, service: Service, reply: Reply) -> None:
        """Keeps a finished reply, if its request was recorded."""
        if reply.request.trace is not None:
            self._kept[name] = XRay(name, service, reply)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def get(self, name: str) -> XRay:
        """Raises NotFound if nothing is kept under this id."""
        if name not in self._kept:
            raise NotFound(f"no X-ray of {name!r}; expected the id of one of the last {KEPT} replies with xray")
        return self._kept[name]


def router(xrays: XRays) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/xray", tags=["xray"])

    @routes.get("/{name}")
    async def summary(name: str) -> Response:
        """A reply's tokens."""
        return JSON(xrays.get(name).summary())

    @routes.get("/{name}/heat")
    async def heat(name: str, layer: int, bins: int = 64) -> Response:
        """Where a layer looked, token by token."""
        return JSON(xrays.get(name).heat(layer, bins))

    @routes.get("/{name}/{position}")
    async def row(name: str, position: int) -> Response:
        """What one token saw."""
        return JSON(xrays.get(name).row(position))

    return routes
