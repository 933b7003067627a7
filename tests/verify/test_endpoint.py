"""Any engine against this code, shown on our own server: green as it is, red with what other engines got wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanoglm.errors import InputError
from nanoglm.verify.endpoint import verify_endpoint, write_reference
from nanoglm.verify.receipt import Receipt

# Faults are planted in another process: the expected values are computed in this one.
SERVE = """
import sys
from contextlib import nullcontext
from nanoglm.cli import main
from nanoglm.verify.faults import FAULTS
name = sys.argv.pop(1)
fault = next((fault for fault in FAULTS if fault.name == name), None)
with nullcontext() if fault is None else fault.planted():
    main(["serve", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference") / "model"
    write_reference(directory)
    return directory


@contextmanager
def server(reference: Path, fault: str = "", *options: str) -> Iterator[str]:
    """Ours, in a process of its own."""
    arguments = [str(reference), "--port", "0", "--memory", "1GB", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, fault, *arguments], stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = ""
        while "http://" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield "http://" + said.partition("http://")[2].split()[0]
    finally:
        process.terminate()
        process.wait(30)


def red(receipt: Receipt) -> list[str]:
    return [row.name for _, row in receipt.rows if not row.ok]


@pytest.mark.parametrize("drafts", ["0", "3"])
def test_our_own_server_is_green(reference: Path, drafts: str) -> None:
    with server(reference, "", "--drafts", drafts) as url:
        receipt = verify_endpoint(url, reference, longest=150)
    assert receipt.ok and len(receipt.rows) == 16, receipt


@pytest.mark.parametrize(
    "fault", ["indexer RoPE half-split", "main RoPE half-split", "Shared layers take an older Selection"]
)
def test_a_planted_fault_is_red(reference: Path, fault: str) -> None:
    with server(reference, fault) as url:
        receipt = verify_endpoint(url, reference, longest=150)
    assert red(receipt)
    if fault.startswith("indexer"):  # nobody sees it up to k tokens; greedy continuations of those go beyond
        assert not any("log-probabilities" in name and ("below k" in name or "at k" in name) for name in red(receipt))
        assert any("log-probabilities" in name and "(above k)" in name for name in red(receipt))


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1"])
def test_no_server_is_one_sentence(reference: Path, url: str) -> None:
    with pytest.raises(InputError, match="endpoint"):
        verify_endpoint(url, reference)


def test_nothing_is_overwritten(reference: Path) -> None:
    with pytest.raises(InputError, match="exists and is not empty"):
        write_reference(reference)
