"""Weights that are kept elsewhere between passes, as accelerate's hooks do it for a `device_map` with "cpu"."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


class Hook:
    """A stand-in for accelerate's `_hf_hook` on a module: it has the weights, and wraps `forward` of the instance."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}

    def attach(self, module: nn.Module) -> None:
        inner = module.forward
        self.put(module, {name: weight.to("meta") for name, weight in self.weights.items()})

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.put(module, self.weights)
            try:
                return inner(*args, **kwargs)
            finally:
                self.put(module, {name: weight.to("meta") for name, weight in self.weights.items()})

        module._hf_hook = self  # type: ignore[assignment]
        module.forward = functools.update_wrapper(forward, inner)  # type: ignore[method-assign]

    @staticmethod
    def put(module: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def offloaded(model: nn.Module, *paths: str) -> Any:
    """The model, with all weights below these paths (of all of it, without any) on the meta device between passes."""
    for path, module in model.named_modules():
        if module._parameters and (not paths or any(f"{path}.".startswith(f"{own}.") for own in paths)):
            Hook(module).attach(module)
    return model
