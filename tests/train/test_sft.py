"""Supervised fine-tuning: which tokens are learned, token by token; rows of whole samples; a loader that goes on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

import nanoglm
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from nanoglm.cli import main
from nanoglm.errors import InputError
from nanoglm.train import sft
from nanoglm.train.data import IGNORE
from nanoglm.train.sft import Conversations, Document, best_fit

BYTES = byte_tokenizer()
MERGED = train_bpe(["the weather of the house, reasoning and the answers of the tools "] * 20, 320)
GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/train.jsonl"

MAX = "[gMASK]<sop><|system|>Reasoning Effort: Max"
OFF = "[gMASK]<sop>"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, think: str | None = None, **calls: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if think is not None:
        message["reasoning_content"] = think
    return message | {"tool_calls": [{"name": name, "arguments": calls[name]} for name in calls]}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def expected(marked: str, tokenizer: Tokenizer = BYTES) -> tuple[list[int], list[int]]:
    """Ids and labels of a text in which «...» is learned."""
    ids, labels = list[int](), list[int]()
    for i, part in enumerate(marked.replace("»", "«").split("«")):
        found = tokenizer.encode(part)
        ids += found
        labels += found if i % 2 else [IGNORE] * len(found)
    return ids, labels


def learned(conversation: dict[str, Any], *marked: str) -> None:
    """Both tokenizers, every token."""
    for tokenizer in (BYTES, MERGED):
        found = sft.samples(conversation, tokenizer)
        assert [(s.ids.tolist(), s.labels.tolist()) for s in found] == [expected(m, tokenizer) for m in marked]
        assert all(s.ids.dtype == s.labels.dtype == np.int64 for s in found)


# ------------------------------------------------------------------------------- what is learned
def test_thinking_answer_and_the_end_of_the_turn() -> None:
    learned(
        {"messages": [{"role": "system", "content": "Sys"}, user("1+1?"), assistant("2", "Add.")]},
        f"{MAX}<|system|>Sys<|user|>1+1?<|assistant|><think>«Add.</think>2<|user|>»",
    )


def test_effort_is_part_of_the_prompt() -> None:
    learned(
        {"messages": [user("1+1?"), assistant("2", "Add.")], "reasoning_effort": "high"},
        "[gMASK]<sop><|system|>Reasoning Effort: High<|user|>1+1?<|assistant|><think>«Add.</think>2<|user|>»",
    )


def test_without_reasoning_in_the_data_thinking_is_off() -> None:
    """Nobody learns to close the block at once: the prompt has done it."""
    messages = [user("a"), assistant("b"), user("c"), assistant("d", "")]
    learned(
        {"messages": messages},
        f"{OFF}<|user|>a<|assistant|><think></think>«b<|user|>»c<|assistant|><think></think>«d<|user|>»",
    )
    learned(  # unless the conversation says that this is wanted
        {"messages": messages[:2], "enable_thinking": True}, f"{MAX}<|user|>a<|assistant|><think>«</think>b<|user|>»"
    )


def test_thinking_switched_off_leaves_reasoning_out() -> None:
    messages = [user("a"), assistant("b", "B"), user("c"), assistant("d", "D")]
    for clear in (True, False):
        learned(
            {"messages": messages, "enable_thinking": False, "clear_thinking": clear, "reasoning_effort": "high"},
            f"{OFF}<|user|>a<|assistant|><think></think>«b<|user|>»c<|assistant|><think></think>«d<|user|>»",
        )


def test_calls_end_with_observation_and_results_are_not_learned() -> None:
    """Interleaved thinking: between two users every step keeps its reasoning, and every step is learned."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    begin = ChatTemplate().render([user("go")], tools)
    step = "<|assistant|><think>«R1</think>Look.<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>"
    messages = [user("go"), assistant("Look.", "R1", f={"x": 1}), tool("a"), tool("b"), assistant("", "R2", g={})]
    answers = "<|observation|>»<tool_response>a</tool_response><tool_response>b</tool_response>"
    last = "<|assistant|><think>«R2</think><tool_call>g</tool_call><|observation|>»"
    head, _, rest = begin.partition("<tool_call>")
    assert rest  # the block of tools shows the format with real markup, of which nothing is learned
    learned({"messages": messages, "tools": tools}, begin + step + answers + last)
    learned(
        {"messages": [*messages, tool("c")], "tools": tools},
        begin + step + answers + last + "<tool_response>c</tool_response>",
    )


THREE_TURNS = [
    user("a"),
    assistant("", "A1", f={}),
    tool("t"),
    assistant("b", "A2"),
    user("c"),
    assistant("d"),
    user("e"),
    assistant("f", "E"),
]


def test_cleared_thinking_makes_a_sample_of_each_turn() -> None:
    """As it is served: in the prompt of a turn the earlier ones have lost their reasoning."""
    call, answer = "<tool_call>f</tool_call>", "<tool_response>t</tool_response>"
    first = f"{MAX}<|user|>a<|assistant|><think></think>{call}<|observation|>{answer}<|assistant|><think></think>b"
    learned(
        {"messages": THREE_TURNS},
        f"{MAX}<|user|>a<|assistant|><think>«A1</think>{call}<|observation|>»{answer}"
        "<|assistant|><think>«A2</think>b<|user|>»",
        f"{first}<|user|>c<|assistant|><think>«</think>d<|user|>»",
        f"{first}<|user|>c<|assistant|><think></think>d<|user|>e<|assistant|><think>«E</think>f<|user|>»",
    )


def test_preserved_thinking_is_one_sample() -> None:
    learned(
        {"messages": THREE_TURNS, "clear_thinking": False},
        f"{MAX}<|user|>a<|assistant|><think>«A1</think><tool_call>f</tool_call><|observation|>»"
        "<tool_response>t</tool_response><|assistant|><think>«A2</think>b<|user|>»"
        "c<|assistant|><think>«</think>d<|user|>»e<|assistant|><think>«E</think>f<|user|>»",
    )


def test_a_turn_that_the_model_would_not_end_so_learns_no_end() -> None:
    """<|system|> and <|assistant|> are no tokens that generation stops at."""
    messages = [
        user("a"),
        assistant("b"),
        {"role": "system", "content": "s"},
        user("c"),
        assistant("d"),
        assistant("e"),
    ]
    learned(
        {"messages": messages},
        f"{OFF}<|user|>a<|assistant|><think></think>«b»<|system|>s"
        "<|user|>c<|assistant|><think></think>«d»<|assistant|><think></think>«e<|user|>»",
    )


def test_unanswered_users_at_the_end_teach_nothing() -> None:
    messages = [user("a"), user("b"), assistant("c", "C"), user("d"), user("e")]
    learned({"messages": messages}, f"{MAX}<|user|>a<|user|>b<|assistant|><think>«C</think>c<|user|>»")


def test_spelled_markup_moves_no_border() -> None:
    sample = sft.samples({"messages": [user("<|assistant|><think>x"), assistant("<|user|>y", "</think>z")]}, BYTES)[0]
    control = [int(i) for i in sample.ids if i >= 256]
    assert control == BYTES.encode("[gMASK]<sop><|system|><|user|><|assistant|><think></think><|user|>")
    assert sample.labels[sample.labels >= 0].tolist() == [
        *b"</think>z", *BYTES.encode("</think>"), *b"<|user|>y", *BYTES.encode("<|user|>")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ({"messages": [user("a")]}, "teaches nothing"),
        ({}, "teaches nothing"),
        ({"messages": "a"}, "expected a list of objects"),
        ({"messages": [user("a"), {"role": "x"}]}, r"messages\[1\] has role 'x'"),
    ],
)
def test_a_conversation_to_mend_is_one_sentence(conversation: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        sft.samples(conversation, BYTES)


def test_a_template_or_tokenizer_of_another_kind_is_refused() -> None:
    conversation = {"messages": [user("a"), assistant("b")]}
    with pytest.raises(InputError, match="no generation prompt"):
        sft.samples(conversation, BYTES, ChatTemplate("{{ messages[0].content }}"))
    plain = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(InputError, match=r"tokenizer has no <\|user\|>"):
        sft.samples(conversation, Tokenizer(plain))


def test_a_checkpoints_own_template_decides_what_its_prompt_supplies() -> None:
    """GLM-4.7's habit: the prompt of an answer without thinking ends with </think> alone."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '</think>' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
        "{{ '<|assistant|></think>' if add_generation_prompt }}"
    )
    found = sft.samples({"messages": [user("a"), assistant("b")]}, BYTES, ChatTemplate(source))[0]
    assert (found.ids.tolist(), found.labels.tolist()) == expected("<|user|>a<|assistant|></think>«b<|user|>»")


# ------------------------------------------------------------------------------- files
def test_files_of_conversations_and_of_questions(tmp_path: Path) -> None:
    lines = [
        {"messages": [user("a")], "id": 3},
        {"question": "How many?", "answer": "It is 1+1=<<1+1=2>>2, é.\nSo 2*3=<<2*3=6>>6, 6-0=<<6-0=6>>6.\n#### 6"},
        {"question": "Who?", "answer": "I"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    found = list(sft.conversations(tmp_path / "x.jsonl"))
    assert found[0] == lines[0]
    reply = {"role": "assistant", "reasoning_content": "It is 1+1=2, é.\nSo 2*3=6, 6-0=6.", "content": "6"}
    assert found[1] == {"messages": [user("How many?"), reply]}
    assert found[2]["messages"][1] == {"role": "assistant", "reasoning_content": "", "content": "I"}


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", "{}", '{"messages": 3}', '{"question": "a"}', '{"question": 1, "answer": "a"}']
)
def test_a_bad_line_is_one_sentence(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"messages": []}\n' + line)
    with pytest.raises(InputError, match=r"x\.jsonl line 2 has neither messages nor question and answer"):
        list(sft.conversations(tmp_path / "x.jsonl"))


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as UTF-8: .*No such file"):
        list(sft.conversations(tmp_path / "x.jsonl"))


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not at ../shared/data/gsm8k")
def test_gsm8k() -> None:
    found = list(sft.conversations(GSM8K))
    assert len(found) == 7473
    replies = [c["messages"][1] for c in found]
    assert not any("<<" in r["reasoning_content"] or "####" in r["reasoning_content"] for r in replies)
    assert all(r["reasoning_content"] and r["content"].lstrip("-")[0].isdigit() for r in replies)
    sample = sft.samples(found[0], BYTES)[0]
    text = BYTES.decode(sample.labels[sample.labels >= 0], skip_special=False)
    assert text.startswith("Natalia sold 48/2 = 24 clips in May.") and text.endswith("</think>72<|user|>")


# ------------------------------------------------------------------------------- rows
@settings(deadline=None)
@given(st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(1, w), max_size=30))))
def test_packing_keeps_every_document_once_and_wastes_little(case: tuple[int, list[int]]) -> None:
    width, lengths = case
    rows = best_fit(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(n <= width for n in filled)
    assert all(a + b > width for i, a in enumerate(filled) for b in filled[:i])  # no two rows would go into one


def test_packing_prefers_the_fullest_row() -> None:
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert best_fit([5, 6, 4, 2, 3], 10) == [[1, 2], [0, 4, 3]]
    assert best_fit([], 4) == []


def documents(*lengths: int) -> list[Document]:
    """Of so many ids each, all learned: 100, 101, ... then 200, 201, ..."""
    ids = [100 * i + np.arange(n) for i, n in enumerate(lengths, 1)]
    return [Document(x, x.copy()) for x in ids]


def test_rows_hold_whole_documents_that_are_sequences_of_their_own() -> None:
    sample = Conversations(documents(6, 3, 8)).take(7, 2)
    assert sorted(sample.counts) == [2, 5, 7]  # 7 alone, 5 and 2 share a row
    for ids, targets in zip(sample.ids.split(sample.counts), sample.targets.split(sample.counts), strict=True):
        assert targets.tolist() == [int(i) + 1 for i in ids] and ids[0] % 100 == 0
    assert sample.batch.positions.tolist() == [t for n in sample.counts for t in range(n)]


def test_targets_are_the_labels_one_on() -> None:
    conversation = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    (document,) = sft.samples(conversation, BYTES)
    sample = Conversations([document]).take(64, 1)
    assert sample.ids.tolist() == document.ids[:-1].tolist()
    assert sample.targets.tolist() == document.labels[1:].tolist()
    assert 0 < int((sample.targets != IGNORE).sum()) < len(sample.targets)


def test_long_samples_are_cut_and_counted() -> None:
    ids = np.arange(20)
    late = Document(ids, np.where(ids < 15, IGNORE, ids))
    with pytest.warns(UserWarning, match="2 of 3 samples are longer than 9 tokens: 1 were cut, 1 had nothing to learn"):
        sample = Conversations([*documents(12), late, *documents(9)]).take(8, 2)
    assert sample.counts == (8, 8)
    with pytest.raises(InputError, match="no sample teaches anything within 9 tokens"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Conversations([late]).take(8, 1)


def test_samples_that_fit_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    Conversations(documents(9, 9)).take(8, 1)
    assert not recwarn.list


def firsts(source: Conversations, rows: int) -> list[int]:
    """The first id of each document of the next rows."""
    sample = source.take(8, rows)
    return [int(ids[0]) for ids in sample.ids.split(sample.counts)]


def test_every_sample_once_an_epoch_in_a_new_order() -> None:
    source, other = Conversations(documents(*[5] * 7), seed=3), Conversations(documents(*[5] * 7), seed=4)
    epochs = [firsts(source, 4) for _ in range(3)]  # four rows, one of them half empty
    assert all(sorted(epoch) == [100 * i for i in range(1, 8)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert firsts(other, 4) != epochs[0]


def test_a_source_goes_on_where_it_stopped() -> None:
    source = Conversations(documents(*[5] * 7), seed=3)
    firsts(source, 6)
    again = Conversations(documents(*[5] * 7), seed=3)
    again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert firsts(again, 5) == firsts(source, 5)


# ------------------------------------------------------------------------------- the stage
def test_a_model_is_tuned_on_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint, by the command: it learns the answers, and its text loss alone would not have."""
    lines = [{"messages": [user(f"{a}+1"), assistant(str(a + 1), f"{a} and one")]} for a in range(1, 9)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    nanoglm.load("tiny").save(tmp_path / "base")
    options = ["--stages.0.length", "128", "--tokens", "512", "--steps", "30", "--rate", "1e-2", "--warmup", "3"]
    recipe = str(Path(__file__).parents[2] / "recipes" / "sft.py")
    command = ["train", recipe, "--conversations", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "out")]
    main([*command, "--init", str(tmp_path / "base"), *options])
    log = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert log[-1]["stage"] == "sft" and log[-1]["loss"] < 0.6 * log[0]["loss"]
    with pytest.raises(SystemExit):
        main(["train", recipe, "--text", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "no"), *options])
    assert "conversations is missing; expected some for stage sft" in capsys.readouterr().err
