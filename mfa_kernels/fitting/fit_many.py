"""`fit_many`: several mixtures from one pass over a stream."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mfa_kernels.common.checks import is_flag, shown
from mfa_kernels.common.modes import door
from mfa_kernels.common.processes import Processes
from mfa_kernels.fitting.fit import fit
from mfa_kernels.fitting.stream_fit import feed_all, naming
from mfa_kernels.mixture.mfa import MFA

_WRITTEN = {"checkpoint": "{}", "log": "{}.jsonl"}  # arguments that name a path, and what it is called in a folder


@door
def fit_many(batches: Iterable[Any], fits: Mapping[str, Mapping[str, Any]], **options: Any) -> dict[str, MFA]:
    """Fits several mixtures online, in one pass over a stream: to several layers, of several sizes, in several ways.

    Each of them is, to the bit, what `fit` alone makes of the stream of its layer. Every batch goes to all of them
    before the next one is read, so that nothing is stored: what is held does not grow with the stream. It is what the
    fits hold (`fit`), and while they wait for the rows that they start from, these rows, once. A fit that runs out of
    patience ends before the others; the stream is read until it ends or all have.

        mixtures = fit_many(
            stream(model, tokenizer, texts, layer=[4, 8]),
            {
                "early": {"layer": 4, "n_components": 512},
                "late": {"layer": 8, "n_components": 512},
                "large": {"layer": 8, "n_components": 4096, "rank": 20},
            },
            checkpoint="checkpoints",
        )
        mixtures["large"].fit_report

    Args:
        batches: an iterable of batches (B, D), as of `fit`, or, for several layers, of dicts that hold one for each,
            such as `mfa_kernels.stream` gives. It is read once.
        fits: by name, the arguments of `fit` that are a fit's own, and, where batches are dicts, "layer": which part of
            them it is fitted to. Methods are "online" and "auto", as of an iterator. Progress bars, messages of
            errors, and files bear the name.
        options: arguments of `fit` for all that do not have them of their own; but a `checkpoint` here is a folder with
            a checkpoint of each fit in a folder of its own, and a `log` a folder with a file `<name>.jsonl` of each.
            With `resume=True`, each resumes from its checkpoint, or from the beginning where it has none yet: the
            stream is given again from its beginning, to the same fits, to some of them, or to more. A checkpoint of a
            fit alone can be resumed from here, and the other way round. Callbacks that are the same for all are called
            with the mixture of each.

    Returns:
        The mixtures by name, each with a `FitReport` as its attribute `fit_report`, whose seconds are those of the
        whole pass, the other fits included.

    Raises:
        TypeError, ValueError: naming the fit and the argument; before anything is read, where that can be told. Data
            that is held, methods that need it, and several processes (`group`) are among it.
        KeyboardInterrupt: Ctrl-C came before all of them were in training; afterwards, each returns its best so far.
    """
    if isinstance(batches, Tensor | np.ndarray | Mapping | str) or hasattr(batches, "rows"):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}: call fit for each mixture, which "
            "reads data that is held as often as it needs"
        )
    if not isinstance(batches, Iterable) or isinstance(batches, bytes):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}")
    if not isinstance(fits, Mapping) or not all(isinstance(own, Mapping) for own in fits.values()):
        raise TypeError(f"fits must be a mapping of names to arguments of `fit`, got {shown(fits)}")
    if not fits:
        raise ValueError("fits must name at least one fit, got none")
    layers: dict[str, Any] = {}
    bound: dict[str, dict[str, Any]] = {}
    written: dict[Path, str] = {}
    for name, own in fits.items():
        arguments = _arguments(name, own, options)
        for path in (Path(arguments[key]).resolve() for key in _WRITTEN if arguments.get(key) is not None):
            if path in written:
                raise ValueError(f"{name}: {path} is written to by {written[path]} already")
            written[path] = name
        layers[name] = arguments.pop("layer", None)
        with naming(name):
            call = inspect.signature(fit).bind(None, **arguments)
        call.apply_defaults()
        bound[name] = call.arguments
    return feed_all(bound, batches, lambda name, batch: _part(batch, layers[name]))


def _arguments(name: str, own: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one fit, "layer" among them."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"fits: a name must be a string that can be the name of a folder, got {name!r}")
    inside = {key: Path(options[key]) / _WRITTEN[key].format(name) for key in _WRITTEN if options.get(key) is not None}
    arguments = {**options, **inside, **own}
    if arguments.get("method", "auto") not in ("auto", "online"):
        raise ValueError(f"{name}: method must be 'online' or 'auto' for one pass, got {arguments['method']!r}")
    if not is_flag(arguments.get("resume", False)):
        raise TypeError(f"{name}: resume must be True or False, with a checkpoint, got {arguments['resume']!r}")
    if Processes(arguments.get("group")).count > 1:
        raise ValueError(f"{name}: group must be False: several fits share a process, not processes a fit")
    if arguments.get("progress", True) is True:
        arguments["progress"] = name
    return arguments


def _part(batch: Any, layer: Any) -> Any:
    """The part of a batch that a fit of that layer is fed with."""
    if not isinstance(batch, Mapping):
        if layer is not None:
            raise ValueError(f"layer must be left out, batches are of one layer alone, got {layer!r}")
        return batch
    if isinstance(layer, bool) or not isinstance(layer, Hashable) or layer not in batch:
        raise ValueError(f"layer must be one of {', '.join(map(repr, batch))}, as the stream calls them, got {layer!r}")
    return batch[layer]
