"""The sums over the active pairs that EM's M-step needs."""
