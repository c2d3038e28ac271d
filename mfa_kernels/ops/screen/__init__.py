"""Bounds that spare stage 1 most of its logits."""
