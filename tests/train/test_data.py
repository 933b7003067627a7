"""Datasets: what is written is what is read; every token once an epoch; a loader goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoglm.chat.tokenizer import ADDED_TOKENS, Tokenizer, train_bpe
from nanoglm.errors import InputError, NanoglmError
from nanoglm.train import data
from nanoglm.train.data import Loader, Tokens

TEXT = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufeffplain é", encoding="utf-8")  # a byte order mark is no text
    (folder / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    (folder / "c.bin").write_bytes(b"\xff")
    return folder


def test_documents_of_files_and_folders(sources: Path) -> None:
    assert list(data.documents([sources])) == ["plain é", "one", "two"]
    assert list(data.documents([sources / "b.jsonl", sources / "a.txt"])) == ["one", "two", "plain é"]


def test_documents_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"body": ["one", None, "two"]}), tmp_path / "x.parquet")
    assert list(data.documents([tmp_path], "body")) == ["one", "two"]
    with pytest.raises(InputError, match="column 'text'"):
        list(data.documents([tmp_path]))


def test_the_standard_library_needs_no_download() -> None:
    texts = data.documents([data.STDLIB])
    assert sum("def " in next(texts) for _ in range(20)) > 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", '{"text": "a"}\n{"body": "b"}\n', "line 2 has no text under 'text'"),
        ("x.jsonl", '{"text": 3}\n', "line 1"),
        ("x.jsonl", "[1\n", "line 1"),
        ("x.txt", b"\xff", "cannot be read as UTF-8"),
        ("x.csv", "a", r"holds no file of \.txt"),
    ],
)
def test_a_bad_source_is_one_sentence(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words):
        list(data.documents([tmp_path]))


# ------------------------------------------------------------------------------- writing and reading
def test_what_is_written_is_what_is_read(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD_TOKENS", 5)  # several shards
    out = tmp_path / "out"
    splits = data.write([sources], out, val=0.0)
    tokens = Tokens(out)
    expected = [*"plain é".encode(), 256, *b"one", 256, *b"two", 256]
    assert tokens.read(0, len(tokens)).tolist() == expected
    assert tokens.ends.tolist() == [9, 13, 17] and tokens.bytes == 14
    assert len(splits["train"].shards) == 2 and len(Tokens(out, "val")) == 0
    for start in range(17):
        for count in range(18 - start):
            assert tokens.read(start, count).tolist() == expected[start : start + count]
    assert Tokenizer.from_file(out / "tokenizer.json").is_bytes


def test_the_end_of_the_text_is_for_validation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.txt").write_text("abcdefghij")
    data.write([tmp_path], tmp_path / "out", val=0.25)
    train, val = (Tokens(tmp_path / "out", split) for split in data.SPLITS)
    assert bytes(t for t in train.read(0, len(train)).tolist() if t < 256) == b"0123456789abcde"
    assert bytes(t for t in val.read(0, len(val)).tolist() if t < 256) == b"fghij"
    data.write([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "more", val=0.75)
    val = Tokens(tmp_path / "more", "val")  # whole documents behind the cut one
    assert val.read(0, len(val)).tolist() == [*b"56789", 256, *b"abcdefghij", 256]


def test_a_trained_bpe_writes_fewer_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT + "<|user|> 中")
    data.write([tmp_path / "a.txt"], tmp_path / "out", tokenizer="bpe:300", val=0.0)
    tokens, tokenizer = Tokens(tmp_path / "out"), Tokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    ids = tokens.read(0, len(tokens)).tolist()
    assert tokenizer.vocab_size == tokens.vocab_size == 300
    assert len(ids) < len(TEXT) * 0.8 and ids[-1] == tokenizer.encode("<|endoftext|>")[0]
    assert tokenizer.decode(ids) == TEXT + "<|user|> 中"
    assert max(ids[:-1]) < 300 - len(ADDED_TOKENS)  # text never becomes markup


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_plain_text_never_becomes_markup(tokenizer: str) -> None:
    backend = data.byte_tokenizer() if tokenizer == "bytes" else train_bpe([TEXT], 300)
    for spelled in (*ADDED_TOKENS, "<<think>></think>", "a/nothink/nothink"):
        ids = backend.encode_plain(f"x{spelled}y")
        assert backend.decode(ids, skip_special=False) == f"x{spelled}y"
        assert not set(ids) & {backend.encode(t)[0] for t in ADDED_TOKENS}
    with pytest.raises(InputError, match="lone surrogate U\\+D800 at character 1"):
        backend.encode_plain("a\ud800")


def test_bad_requests_leave_nothing_behind(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong = (
        ({"val": 1.0}, "val is 1.0"),
        ({"tokenizer": "bpe:x"}, "tokenizer is bpe:x"),
        ({"tokenizer": "bpe:100"}, "at least 292"),
        ({"tokenizer": "bpe:5000"}, "expected more text"),
        ({"tokenizer": str(tmp_path / "none.json")}, "cannot be read"),
    )
    for arguments, words in wrong:
        with pytest.raises(NanoglmError, match=words):
            data.write([sources], out, **arguments)
    (sources / "d.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        data.write([sources], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="there already"):
        data.write([sources / "a.txt"], out)
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_a_damaged_dataset_is_refused(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data.write([sources], out, val=0.0)
    with (out / "train-00000.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(InputError, match="holds 18 tokens of train; expected 17"):
        Tokens(out)
    about = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(about | {"train": 3}))
    with pytest.raises(InputError, match="is no dataset"):
        Tokens(out)


# ------------------------------------------------------------------------------- loader
def places(count: int) -> Tokens:
    """Tokens that are their own place."""
    return Tokens.of(np.arange(count, dtype=np.uint16))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 9))
def test_an_epoch_reads_every_token_once(length: int, more: int, seed: int) -> None:
    tokens = places(length + more)
    loader, seen = Loader(tokens, length, seed), list[int]()
    while loader.epoch == 0:
        (window,) = loader.take(1).tolist()
        assert window == list(range(window[0], window[0] + length + 1))
        seen += window[:-1]
    assert len(seen) == len(set(seen)) > len(tokens) - 1 - 2 * length


def test_a_loader_goes_on_where_it_stopped() -> None:
    tokens = places(200)
    whole = Loader(tokens, 16, seed=3)
    expected = [whole.take(5).tolist() for _ in range(8)]
    assert expected[0] != Loader(tokens, 16, seed=4).take(5).tolist()
    for stop in range(8):
        first = Loader(tokens, 16, seed=3)
        found = [first.take(5).tolist() for _ in range(stop)]
        second = Loader(tokens, 16, seed=3, **json.loads(json.dumps(first.state_dict())))
        assert found + [second.take(5).tolist() for _ in range(8 - stop)] == expected
