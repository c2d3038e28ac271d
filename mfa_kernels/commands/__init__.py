"""The command line: `mfa-kernels` and its parts."""
