"""What the X-ray shows is what this very generation selected: every cell is computed anew from the weights."""

from __future__ import annotations

import httpx2 as httpx
import pytest
import torch
from server.scripted import TOKENIZER, scripted_model, serving

from nanoglm.engine import Engine
from nanoglm.model import BatchStore, Tape
from nanoglm.ops import Batch
from nanoglm.server.service import Service
from nanoglm.server.xray import KEPT

ASKED = {"messages": [{"role": "user", "content": "What do you see?" * 3}], "seed": 3, "max_tokens": 90, "xray": True}


@pytest.mark.parametrize("drafts", [0, 3])
def test_cells_are_those_of_the_model(drafts: int) -> None:
    model = scripted_model()
    # A budget that cuts the prompt, and a second request beside it: neither may show.
    service = Service(model, Engine(model.module, pages=64, drafts=drafts, budget=20), ["tiny"])
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        name = client.post("/v1/chat/completions", json=ASKED | {"logit_bias": {"256": -100, "263": -100, "265": -100}})
        name = name.json()["id"]
        shown = client.get(f"/xray/{name}").json()
        ids = [token["id"] for token in shown["tokens"]]
        prompt, rows = shown["prompt_tokens"], shown["rows"]
        assert len(ids) == prompt + 90 and rows == len(ids) - 1 and len(shown["drafted"]) == 90
        assert any(shown["drafted"]) <= (drafts > 0)
        assert "".join(token["text"] for token in shown["tokens"][:2]) == "[gMASK]<sop>"
        assert [shown["source"][layer] for layer in shown["full_layers"]] == shown["full_layers"]
        tape = Tape(indexers=False)
        with torch.no_grad():
            model.module(torch.tensor(ids[:rows]), Batch.contiguous([rows]), BatchStore(), tape=tape)
        chosen = model.selections([ids[:rows]])[0]
        for position in (0, 5, prompt - 1, prompt, prompt + 40, rows - 1):
            row = client.get(f"/xray/{name}/{position}").json()
            for layer in shown["full_layers"]:
                expected = chosen[layer][position]
                assert row["selected"][str(layer)] == expected[expected >= 0].tolist()
            for layer in shown["moe_layers"]:
                assert row["experts"][str(layer)] == tape.experts[layer][position].tolist()
        layer, bins = shown["full_layers"][-1], 7
        heat = client.get(f"/xray/{name}/heat", params={"layer": layer, "bins": bins}).json()
        assert heat["rows"] == list(range(prompt - 1, rows))
        for position, counts in zip(heat["rows"], heat["counts"], strict=True):
            places = [p * bins // len(ids) for p in chosen[layer][position].tolist() if p >= 0]
            assert counts == [places.count(b) for b in range(bins)]


def test_only_what_was_asked_for_and_only_the_last_few() -> None:
    model = scripted_model()
    service = Service(model, Engine(model.module, pages=64), ["tiny"])
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        few = {"max_tokens": 3}
        plain = client.post("/v1/chat/completions", json=ASKED | few | {"xray": False}).json()["id"]
        assert client.get(f"/xray/{plain}").status_code == 404
        names = [client.post("/v1/chat/completions", json=ASKED | few).json()["id"] for _ in range(KEPT + 1)]
        assert client.get(f"/xray/{names[0]}").status_code == 404
        rows = client.get(f"/xray/{names[1]}").json()["rows"]
        for path in (f"{rows}", "-1", "heat?layer=1", "heat?layer=0&bins=0", "heat"):
            answer = client.get(f"/xray/{names[1]}/{path}")
            assert answer.status_code == 400 and "expected" in answer.text or "required" in answer.text, answer.text


def test_a_stream_is_kept_too_and_tokens_spell_the_text() -> None:
    model = scripted_model()
    service = Service(model, Engine(model.module, pages=64), ["tiny"])
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        lines = client.post("/v1/chat/completions", json=ASKED | {"stream": True, "max_tokens": 12}).text.splitlines()
        name = httpx.Response(200, text=lines[0].removeprefix("data: ")).json()["id"]
        shown = client.get(f"/xray/{name}").json()
        ids = [token["id"] for token in shown["tokens"]]
        assert TOKENIZER.decode(ids[: shown["prompt_tokens"]], skip_special=False).endswith("<|assistant|><think>")
