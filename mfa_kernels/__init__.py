"""Fused kernels for mixtures of factor analyzers over language-model activations.

Importing it registers the operators, `torch.ops.mfa_kernels.*`; all else comes with its first use.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from mfa_kernels.common import moved
from mfa_kernels.common.version import __version__ as __version__

if TYPE_CHECKING:
    from mfa_kernels import data as data
    from mfa_kernels import evaluation as evaluation
    from mfa_kernels import fitting as fitting
    from mfa_kernels import functional as functional
    from mfa_kernels import interpret as interpret
    from mfa_kernels import models as models
    from mfa_kernels import steering as steering
    from mfa_kernels.data.harvest import harvest, stream
    from mfa_kernels.fitting.fit import fit
    from mfa_kernels.fitting.fit_many import fit_many
    from mfa_kernels.fitting.kmeans.kmeans import kmeans
    from mfa_kernels.mixture.codes import Code
    from mfa_kernels.mixture.mfa import MFA
    from mfa_kernels.steering import steer

__all__ = ["MFA", "Code", "fit", "fit_many", "harvest", "kmeans", "steer", "stream"]

moved.install()

_LAZY = {
    "MFA": "mixture.mfa",
    "Code": "mixture.codes",
    "fit": "fitting",
    "fit_many": "fitting",
    "kmeans": "fitting",
    "steer": "steering",
    "harvest": "data.harvest",
    "stream": "data.harvest",
}


if not TYPE_CHECKING:  # a checker of types would believe every name

    def __getattr__(name: str) -> Any:
        # Fitting, harvesting and steering bring in more than a training loop that only wants the layer.
        from importlib import import_module, util

        if name in _LAZY:
            return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        if not name.startswith("_") and util.find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")  # as if it had been imported: `mfa_kernels.functional`
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_command() -> bool:
    """Whether this process is the command line: `mfa-kernels`, or `python -m mfa_kernels`."""
    program = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    is_module = program == "-m" and any(given.split(".")[0] == __name__ for given in sys.orig_argv)
    return program.startswith("mfa-kernels") or is_module


# The command line imports torch itself, which takes a second: when it is there to answer Ctrl-C.
if not _is_command():
    from mfa_kernels.mixture import mfa  # noqa: F401
