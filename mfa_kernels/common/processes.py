"""The processes that work on one mixture: sums and copies over them that leave every one with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfa_kernels.common.moved import renamed

_ELEMENTS = 1 << 24  # of a tensor that is summed at once


class Processes:
    """A process group as the fitting sees it; a process that works alone has count 1 and sends nothing.

    Sums add the processes up in their order, 0 first, whatever the backend would do: every process holds the same bits
    afterwards, two runs of one size agree, and so do decisions that are taken on such sums.

    Args:
        group: a `ProcessGroup`; None: the default one where `torch.distributed` is initialised; False: alone.

    Attributes:
        index: of this process in the group; torch.distributed calls it the rank.
        count: processes.
        first: true for process 0, which logs and writes.
    """

    def __init__(self, group: dist.ProcessGroup | bool | None = None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        if isinstance(group, bool):
            if group:
                raise ValueError("group must be a process group, None (the default one) or False (alone), got True")
            ready = False
        elif group is not None and not ready:
            raise ValueError("group needs torch.distributed.init_process_group to be called first")
        self.group = group if ready and not isinstance(group, bool) else None
        self.index = dist.get_rank(self.group) if ready else 0
        if self.index < 0:
            raise ValueError("group does not contain this process")
        self.count = dist.get_world_size(self.group) if ready else 1
        self.device: torch.device | None = None

    def on(self, device: torch.device) -> Processes:
        """Makes small messages on `device`, which for NCCL is a GPU of the process's own; returns itself."""
        if self.count > 1 and dist.get_backend(self.group) == "nccl" and device.type != "cuda":
            raise ValueError(f"device must be a GPU of this process's own for the backend nccl, got {device}")
        self.device = device
        return self

    @property
    def first(self) -> bool:
        return self.index == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's part of something (n, ...) that all processes hold: contiguous, of nearly equal sizes, in
        order."""
        return index if self.count == 1 else index.tensor_split(self.count)[self.index]

    def span(self, count: int) -> tuple[int, int]:
        """This process's part [start, stop) of so many things that all processes know by number: contiguous, in
        order."""
        return count * self.index // self.count, count * (self.index + 1) // self.count

    def stacked(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of one shape and dtype: (count, ...)."""
        out = tensor.new_empty(self.count, *tensor.shape)
        if self.count == 1:
            out[0] = tensor
        else:
            dist.all_gather(list(out.unbind(0)), tensor.contiguous(), group=self.group)
        return out

    def totals(self, *values: float) -> list[float]:
        """Sums of numbers over the processes; NaN where one is."""
        if self.count == 1:
            return list(values)
        every = self.stacked(torch.tensor(values, dtype=torch.float64, device=self.device))
        return [sum(column) for column in every.t().tolist()]

    @torch.no_grad()
    def sum_(self, *tensors: Tensor) -> None:
        """Replaces contiguous tensors by their sums over the processes.

        A process adds up its slice of all numbers and sends the result round: the traffic of a ring all-reduce,
        and an order of additions that does not depend on the backend.
        """
        if self.count == 1:
            return
        for tensor in tensors:
            for part in tensor.view(-1).split(_ELEMENTS):
                mine = -(-len(part) // self.count)
                padded = part.new_zeros(self.count * mine)
                padded[: len(part)] = part
                received = torch.empty_like(padded)
                dist.all_to_all_single(received, padded, group=self.group)
                total, *others = received.view(self.count, mine).unbind(0)
                for other in others:
                    total += other
                part.copy_(self.stacked(total).view(-1)[: len(part)])

    @torch.no_grad()
    def broadcast_(self, *tensors: Tensor) -> None:
        """Replaces tensors by those of process 0."""
        if self.count > 1:
            for tensor in tensors:
                buffer = tensor.contiguous().clone()
                dist.broadcast(buffer, group_src=0, group=self.group)
                tensor.copy_(buffer)  # which, unlike a broadcast, tells autograd and the cached Woodbury terms

    def agree(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on process 0 alone; returns its result, pickled, or raises its error, on every process."""
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                failure, told = error, [None, f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(told, group_src=0, group=self.group, device=self.device)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise RuntimeError(f"process 0 failed with {told[1]}")
        return told[0]

    def objects(self, value: Any) -> list[Any]:
        """The values of all processes; pickled."""
        out = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(out, value, group=self.group)
        return out

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors (n_r, ...) of all processes one after the other, on process 0; on the others, their own."""
        if self.count == 1:
            return tensor
        counts = [int(count) for count in self.objects(len(tensor))]
        if not self.first:
            if len(tensor):
                dist.send(tensor.contiguous(), group_dst=0, group=self.group)
            return tensor
        out = tensor.new_empty(sum(counts), *tensor.shape[1:])
        parts = out.split(counts)
        parts[0].copy_(tensor)
        for index in range(1, self.count):
            if counts[index]:
                dist.recv(parts[index], group_src=index, group=self.group)
        return out

    def concatenated(self, tensor: Tensor) -> Tensor:
        """The tensors (n_r, ...) of all processes one after the other, on every process."""
        if self.count == 1:
            return tensor
        counts = [int(count) for count in self.objects(len(tensor))]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return torch.cat([part[:count] for part, count in zip(self.stacked(padded), counts)])

    def rows(self, own: Tensor, index: Tensor) -> Tensor:
        """The rows at `index` of a tensor of which each process has a part (n_r, ...), one after the other."""
        if self.count == 1 or not len(index):
            return own[index]
        start = sum(self.objects(len(own))[: self.index])
        here = (index >= start) & (index < start + len(own))
        out = own.new_zeros(len(index), *own.shape[1:])
        out[here] = own[index[here] - start]
        self.sum_(out)  # all others have zeros
        return out


ALONE = Processes(False)
if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, Ranks="Processes")
