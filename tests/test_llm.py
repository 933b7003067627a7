"""The offline front: texts and tokens, stop texts, several continuations, known prefixes, a budget of memory."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import nanoglm
from nanoglm.cache import PagedCache
from nanoglm.engine import SamplingParams, generate
from nanoglm.engine.memory import share
from nanoglm.errors import InputError
from nanoglm.llm import LLM

PROMPTS = ["It was", "She said that", "x"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", memory="50MB")


def test_texts_are_the_plain_loops(llm: LLM) -> None:
    model = llm.model
    params = SamplingParams(20, stop_ids=model.config.eos_token_id)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, SamplingParams(20)), strict=True):
        ids = model.tokenizer.encode(prompt)
        expected = list(generate(model.module, ids, params))
        (one,) = output.outputs
        assert (output.prompt, list(output.prompt_token_ids), list(one.token_ids)) == (prompt, ids, expected)
        assert one.text == model.tokenizer.decode(expected)
        assert one.finish_reason == ("length" if len(expected) == 20 else "stop")
    (by_ids,) = llm.generate([model.tokenizer.encode("It was")], SamplingParams(20))
    assert by_ids.outputs[0].token_ids == llm.generate("It was", SamplingParams(20))[0].outputs[0].token_ids


def test_a_model_without_tokenizer_takes_and_gives_ids() -> None:
    (output,) = LLM("recall", memory="50MB").generate([[1, 2, 3]], SamplingParams(4), n=2)
    assert [len(one.token_ids) for one in output.outputs] == [4, 4] and output.outputs[0].text == ""


def test_several_continuations_differ_by_seed(llm: LLM) -> None:
    (output,) = llm.generate("abc", SamplingParams(10, 1.0, seed=3), n=3)
    texts = [one.token_ids for one in output.outputs]
    assert len(set(texts)) == 3 and [one.index for one in output.outputs] == [0, 1, 2]
    assert llm.generate("abc", SamplingParams(10, 1.0, seed=4))[0].outputs[0].token_ids == texts[1]


def test_a_stop_text_ends(llm: LLM) -> None:
    whole = llm.generate("abc", SamplingParams(60, 1.0, seed=4))[0].outputs[0].text
    (one,) = llm.generate("abc", SamplingParams(60, 1.0, seed=4), stop=[whole[10:13]])[0].outputs
    assert one.text == whole[: whole.index(whole[10:13])] and one.finish_reason == "stop"


def test_prefixes_are_known_from_call_to_call(llm: LLM) -> None:
    text = "the same beginning " * 20
    llm.generate(text + "one", SamplingParams(2))
    assert llm.engine.prefix is not None
    before = llm.engine.prefix.hits
    llm.generate(text + "two", SamplingParams(2))
    assert llm.engine.prefix.hits - before >= 320


def test_what_cannot_run_changes_nothing(llm: LLM) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        llm.generate([[1, 2], []])
    assert not llm.engine.busy
    with pytest.raises(InputError, match="stop holds an empty text"):
        llm.generate(["a", "b"], stop=[""])
    for params, words in (
        (SamplingParams(logit_bias={320: 1.0}), "logit_bias names token id 320; expected 0 to 319"),
        (SamplingParams(stop_ids=(-1,)), "stop_ids names token id -1"),
    ):
        with pytest.raises(InputError, match=words):
            llm.generate("a", params)
    assert not llm.engine.busy
    with pytest.raises(InputError, match="n is 0; expected at least 1"):
        llm.generate("a", n=0)


def test_memory_is_shared_out() -> None:
    model = nanoglm.load("tiny").module
    memory = share(model, 50e6)
    assert memory.weights == sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    page = memory.latents + memory.index_keys
    assert page == 64 * PagedCache(model.config, 1).bytes_per_token and memory.index_keys > 0
    assert 50e6 - page < memory.total <= 50e6
    assert str(memory).endswith(f"{memory.pages:,} pages, {64 * memory.pages:,} tokens")
    with pytest.raises(InputError, match=r"memory is 0\.001 GB; expected more than .* GB: weights .*, workspace"):
        share(model, 1e6)


def test_memory_is_said_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM("tiny", memory="50MB")
    gigabytes = r"\d[\d.e-]* GB"
    parts = ", ".join(f"{name} {gigabytes}" for name in ("weights", "workspace", "latents", "index keys"))
    assert re.fullmatch(rf"{parts}: \d+ pages, {llm.memory.tokens:,} tokens\n", capsys.readouterr().err)
    LLM("tiny", memory="50MB", quiet=True)
    assert not capsys.readouterr().err


FILLED = """
import sys, torch
from nanoglm import Model, SamplingParams
from nanoglm.bench.shapes import Subject, bench_nano, random_ids
from nanoglm.llm import LLM
from nanoglm.memory import peak_memory

drafts, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
config = bench_nano(8).replace(num_nextn_predict_layers=1)
LLM("tiny", memory="50MB").generate([[1, 2, 3]])  # what libraries take
before = peak_memory()
llm = LLM(Model(Subject(config, 64, dtype).model, None), memory="400MB", drafts=drafts)
each = llm.memory.tokens // 8 - 64
ids = random_ids(config, 8 * each)
llm.generate([ids[begin : begin + each] for begin in range(0, 8 * each, each)], SamplingParams(8))
assert llm.engine.cache.free_pages < 16
print(1e3 * (peak_memory() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("drafts", "dtype"), [(0, "bfloat16"), (3, "bfloat16"), (3, "float32")])
def test_a_full_cache_keeps_within_the_budget(drafts: int, dtype: str) -> None:
    command = [sys.executable, "-c", FILLED, str(drafts), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 300 < float(done.stdout.split()[-1]) <= 400
