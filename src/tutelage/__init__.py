"""Instruction tuning, exact and visible: from raw instruction data to a tuned, evaluated model and the evidence for it."""

from __future__ import annotations

__version__ = "0.1.0"
