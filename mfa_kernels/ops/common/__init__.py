"""What the stages share: backends, builds, registration, checks of tensors, parts of kernels."""
