"""Stage 1: tokens x components -> log p(x) and the active pairs."""
