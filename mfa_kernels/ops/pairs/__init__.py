"""Stage 2: latents, decoding and gradients, on the active pairs alone."""
