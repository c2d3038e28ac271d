"""`python -m mfa_kernels`: the command line, as torchrun starts it too."""

from __future__ import annotations

import sys

from mfa_kernels.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
