"""Stage 0: parameters -> Woodbury terms."""
