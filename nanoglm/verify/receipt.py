"""Running the rows and the planted faults, and writing the receipt."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite
from typing import Any

import torch

from nanoglm.verify import internal
from nanoglm.verify.faults import FAULTS
from nanoglm.verify.rows import Row

ORACLE = "5.23.0"  # of transformers: what the receipt is defined for
EXTERNAL, INTERNAL = "transformers", "nanoglm"


@dataclass
class Caught:
    """A planted fault and the rows that turned red; only rows against transformers are looked at."""

    name: str
    trap: str  # where the specification states the right way
    by: list[str]

    @property
    def caught(self) -> bool:
        return bool(self.by)


@dataclass
class Receipt:
    """Rows, faults and what they were obtained with.

    Attributes:
        rows: with what each was compared, "transformers" or "nanoglm".
        not_run: why rows are missing, one sentence each; a receipt with any is not ok.
    """

    rows: list[tuple[str, Row]] = field(default_factory=list)
    faults: list[Caught] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every row green, every fault red, nothing left out."""
        return all(row.ok for _, row in self.rows) and all(f.caught for f in self.faults) and not self.not_run

    def to_json(self) -> dict[str, Any]:
        """Plain values; a value that is not finite becomes null."""
        return {
            "ok": self.ok,
            "rows": [
                {"name": r.name, "ok": r.ok, "value": r.value if isfinite(r.value) else None, "limit": r.limit,
                 "against": against}
                for against, r in self.rows
            ],
            "faults": [{"name": f.name, "caught": f.caught, "by": f.by, "trap": f.trap} for f in self.faults],
            "not_run": self.not_run,
            "versions": self.versions,
        }  # fmt: skip


def verify(*, faults: bool = True, progress: Callable[[str, float], None] = lambda what, share: None) -> Receipt:
    """The fidelity receipt (docs/verify.md).

    Tiny random models of GLM-5.2's shape are compared with transformers layer by layer, beyond k tokens, in
    decoding, drafting and through files; then every planted fault must turn one of those rows red.

    Args:
        faults: False leaves the planted faults out; the receipt then says so and is not ok.
        progress: called with what runs and the share done, 0 to 1.
    """
    receipt = Receipt(versions=_versions())
    progress("nanoglm against itself", 0)
    receipt.rows += [(INTERNAL, row) for row in internal.rows()]
    if find_spec("transformers") is None:
        receipt.not_run.append(
            "all rows against transformers, and with them all planted faults: transformers is not installed "
            f"(pip install transformers=={ORACLE})"
        )
        return receipt
    if receipt.versions["transformers"] != ORACLE:
        receipt.not_run.append(
            f"all rows against transformers {ORACLE}: version {receipt.versions['transformers']} is installed"
        )
        return receipt
    from nanoglm.verify.external import Oracle
    from nanoglm.verify.oracle import silent

    with silent():
        progress("transformers", 0.05)
        oracle = Oracle()
        receipt.rows += [(EXTERNAL, row) for row in oracle.rows()]
        if not faults:
            receipt.not_run.append("the planted faults: left out on request")
            return receipt
        comparisons = {row.name for _, row in receipt.rows}  # a refusal under a fault is none
        for i, fault in enumerate(FAULTS):
            progress(f"fault: {fault.name}", 0.1 + 0.9 * i / len(FAULTS))
            with fault.planted():
                red = [row.name for row in oracle.rows() if not row.ok and row.name in comparisons]
            receipt.faults.append(Caught(fault.name, fault.trap, red))
    return receipt


def _versions() -> dict[str, str]:
    packages = ("nanoglm", "torch", "transformers")
    found = {name: version(name) for name in packages if find_spec(name) is not None}
    found["python"] = platform.python_version()
    return found | {"cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}
