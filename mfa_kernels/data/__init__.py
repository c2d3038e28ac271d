"""Activations: made from texts (`harvest`), kept on disk (`ActivationStore`), read by row."""

from __future__ import annotations

from mfa_kernels.data.reservoir import reservoir
from mfa_kernels.data.source import Source, as_source
from mfa_kernels.data.store import ActivationStore, ActivationStoreWriter
from mfa_kernels.data.text import read_texts

__all__ = ["ActivationStore", "ActivationStoreWriter", "Source", "as_source", "read_texts", "reservoir"]
