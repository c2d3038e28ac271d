"""A BLAS and a LAPACK whose bits depend on the number of threads, as MKL's do on some processors, on any processor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

# What PyTorch hands to the libraries; in their functional, in-place and `out` forms.
OPERATORS = [
    "mm", "mm.out", "addmm", "addmm_", "addmm.out", "bmm", "bmm.out", "baddbmm", "baddbmm_", "baddbmm.out",
    "addmv", "addmv_", "addmv.out", "dot", "vdot",
    "linalg_cholesky_ex", "linalg_qr", "_linalg_eigh", "linalg_solve_triangular", "cholesky_inverse",
]  # fmt: skip


def nudged(value: Tensor) -> Tensor:
    """One unit in the last place more in a third of the entries: which third, the number of threads decides."""
    if not value.is_floating_point() or value.layout != torch.strided:
        return value
    index = torch.arange(value.numel()).view(value.shape)
    chosen = (index + torch.get_num_threads()) % 3 == 0
    return torch.where(chosen, torch.nextafter(value, torch.full_like(value, torch.inf)), value)


def _unsteady(kernel: Callable[..., object], in_place: bool) -> Callable[..., object]:
    def call(keys: torch.DispatchKeySet, *args: object, **kwargs: object) -> object:
        found = kernel(keys, *args, **kwargs)
        if isinstance(found, Tensor):
            return found.copy_(nudged(found)) if in_place else nudged(found)
        return tuple(nudged(t) for t in found)

    return call


@contextmanager
def unsteady_blas() -> Iterator[None]:
    """Within it, products and factorisations of PyTorch on a CPU differ in their last bits between thread counts.

    The kernels themselves are replaced, so that what runs inside an operator of ours, or inside another of PyTorch's
    own, is seen as well.
    """
    if not hasattr(torch.library, "get_kernel"):
        pytest.skip("this PyTorch does not hand out its kernels (torch.library.get_kernel)")
    with ExitStack() as stack:
        warnings_off = stack.enter_context(warnings.catch_warnings())
        assert warnings_off is None
        warnings.simplefilter("ignore")  # that a kernel is replaced
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name in OPERATORS:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
            in_place = name.endswith((".out", "_"))
            library.impl(name, _unsteady(kernel, in_place), "CPU", with_keyset=True)
        yield
