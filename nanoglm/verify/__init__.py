"""The fidelity receipt: this code against transformers, and planted faults that must show."""

from nanoglm.verify.receipt import Receipt, verify
from nanoglm.verify.rows import Row

__all__ = ["Receipt", "Row", "verify"]
