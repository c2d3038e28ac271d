"""Steered hidden states: gates, interpolation, offsets and norms in one pass."""
