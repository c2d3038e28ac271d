"""A mixture spread over the processes of a group, for K that does not fit on one device.

Every process scans the tokens against its own components; log p(x) is the logsumexp over the processes of what each
finds. Gradients and statistics of a component stay where it is: what travels per token is one log-density from each
process, and for codes its slots.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.common import checksum
from mfa_kernels.common.files import StrPath, atomic_path, atomic_write_json
from mfa_kernels.common.modes import door
from mfa_kernels.common.places import MIXTURE, check_replaced
from mfa_kernels.common.processes import Processes
from mfa_kernels.common.reading import opened
from mfa_kernels.mixture import saving
from mfa_kernels.mixture.base import Mixture, Parameters
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs, activity_threshold

_PIECE_ELEMENTS = 1 << 24  # of a tensor on its way to the file
_SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# A tensor is common where every process holds the same values; its gradient is then the same on every process.


class _Stack(torch.autograd.Function):
    """Stacks the processes' own tensors: (...) -> (size, ...), common."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes) -> Tensor:
        ctx.rank = processes.index
        return processes.stacked(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad[ctx.rank], None


class _Use(torch.autograd.Function):
    """Hands a common tensor to each process's own components: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, common: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return common.view_as(common)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.processes.sum_(grad)
        return grad, None


class _Sum(torch.autograd.Function):
    """Sums the processes' own tensors: the sum is common."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes) -> Tensor:
        out = own.clone(memory_format=torch.contiguous_format)
        processes.sum_(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


_OF_LOCAL = {"means", "loadings", "log_noise", "weight_logits", "center", "noise_floor", "precision", "extra"}


class ShardedMFA(Mixture):
    """One mixture, each process with some of its components: component-parallel. `fitting.fit_sharded` fits one to
    data.

    The methods are collective: every process calls them, with the same tokens, and gets the same result. So is
    backward; afterwards a process has the gradients of its own components, and all have that of a shared noise and of
    x. An optimiser on every process then moves the parameters as one process would move them.

    Args:
        local: this process's components, a mixture on this process's device; component k of process r is number
            `first_component` + k of the whole. The weights of the whole are the softmax of all processes'
            `weight_logits`. A shared noise is taken over from process 0, as is the centre.
        group: the process group; None: the default one.

    Attributes:
        local: as given; its own methods see its components alone.
        n_components: K, of all processes.
        first_component: number of this process's first component.
        threshold: nats below a token's best logit at which a component stops being active.
        means, loadings, log_noise, noise_variance, weight_logits: of this process's components.

    Raises:
        ValueError: on every process, where the mixtures do not fit each other.
    """

    def __init__(self, local: MFA, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.processes = Processes(group).on(local.means.device)
        self.local = local
        kinds = self.processes.objects(
            (local.n_features, local.rank, local.noise, local.noise_floor, local.means.dtype)
        )
        if len(set(kinds)) > 1:
            raise ValueError(f"local must have one n_features, rank, noise, noise_floor and dtype, got {kinds}")
        counts = self.processes.objects(local.n_components)
        self.n_components, self.first_component = sum(counts), sum(counts[: self.processes.index])
        self.n_features, self.rank, self.noise = local.n_features, local.rank, local.noise
        self.threshold = activity_threshold(self.n_components, local.parameters_in_compute_dtype()[0].dtype)
        with torch.no_grad():
            self.processes.broadcast_(local.center, *([local.log_noise] if self.noise == "shared" else []))

    def __getattr__(self, name: str) -> Any:
        """Parameters and settings of this process's components are those of `local`."""
        return getattr(self.local, name) if name in _OF_LOCAL else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_LOCAL:
            raise AttributeError(f"{name} is that of `local`: set it there")
        super().__setattr__(name, value)

    @classmethod
    @door
    def from_mfa(cls, mfa: MFA, group: dist.ProcessGroup | None = None) -> ShardedMFA:
        """Returns each process's part of a mixture that every process holds; parameters are copied."""
        start, stop = part_of(mfa.n_components, Processes(group))
        config = saving.config_of(mfa, None, None)
        local = saving.blank_mixture(MFA, config, stop - start, None, Path()).to_empty(device=mfa.means.device)
        local.extra = dict(mfa.extra)
        local.load_state_dict(
            {name: t[start:stop] if is_split(name, mfa.noise) else t for name, t in mfa.tensors().items()}
        )
        sharded = cls(local, group)
        sharded.fit_report = mfa.fit_report
        return sharded

    @property
    def log_weights(self) -> Tensor:
        """log pi of this process's components, (K_local,): they add up to 1 over all processes."""
        logits = self.local.weight_logits
        return logits - self._shared(_Stack.apply(logits.logsumexp(0), self.processes).logsumexp(0))

    def tensors(self) -> dict[str, Tensor]:
        """Returns parameters and centre of this process's components by name, without gradients."""
        return self.local.tensors()

    def parameters_in_compute_dtype(self) -> Parameters:
        """Returns means, loadings, noise_variance, log_weights of this process's components, as the kernels take
        them."""
        means, loadings, noise, _ = self.local.parameters_in_compute_dtype()
        if self.noise == "shared":
            noise = self._shared(noise)
        return Parameters(means, loadings, noise, self.log_weights.to(means.dtype))

    def woodbury(self) -> ops.Woodbury:
        """Returns the Woodbury terms of this process's components."""
        return self.local.woodbury()

    def scan(self, x: Tensor, slots: int = SLOTS) -> ActivePairs:
        """Returns the active pairs of x (N, D) among this process's components alone, numbered from 0; the weights are
        global."""
        exact = self.precision != "fast"
        return ops.log_prob(self._shared(x), *self.parameters_in_compute_dtype(), self.woodbury(), slots, exact=exact)

    def active_pairs(self, x: Tensor, slots: int = SLOTS) -> ActivePairs:
        """Returns log p(x) and the active pairs of x (N, D) among all components."""
        return self.merged(self.scan(x, slots))

    def merged(self, own: ActivePairs) -> ActivePairs:
        """Returns the active pairs among all components, from what the scan of each process's own has found."""
        slots = own.logits.shape[1]
        log_prob = _Stack.apply(own.log_prob, self.processes).logsumexp(0)
        every = _Stack.apply(own.logits, self.processes)  # (size, N, slots), like the tensors that follow
        numbers = self.processes.stacked(torch.where(own.components >= 0, own.components + self.first_component, -1))
        counts = self.processes.stacked(own.counts)
        least = every.detach().amax((0, 2)) - self.threshold
        active = (every.detach() >= least.unsqueeze(-1)) & (numbers >= 0)
        cut = ((counts > slots) & active[..., -1]).any(0)  # some process has more of them than slots
        count = active.sum((0, 2))
        logits, order = every.masked_fill(~active, -torch.inf).transpose(0, 1).flatten(1).topk(slots)
        components = numbers.transpose(0, 1).flatten(1).gather(1, order).masked_fill(logits == -torch.inf, -1)
        return ActivePairs(log_prob, components, logits, torch.where(cut, slots + 1, count).clamp_max(slots + 1).int())

    def _log_density(self, x: Tensor) -> Tensor:
        """log p(x) of x (N, D), (N,): no slots travel for it."""
        return _Stack.apply(self.scan(x).log_prob, self.processes).logsumexp(0)

    def _owner(self, x: Tensor) -> Tensor:
        """The most responsible component of each token of x (N, D), (N,): one slot of each process travels for it."""
        own = self.scan(x)
        best = self.processes.stacked(own.logits[:, 0].nan_to_num(-torch.inf, -torch.inf, -torch.inf)).argmax(0)
        number = torch.where(own.components[:, 0] >= 0, own.components[:, 0] + self.first_component, -1)
        return self.processes.stacked(number).gather(0, best.unsqueeze(0)).squeeze(0)

    def _own(self, components: Tensor) -> Tensor:
        own = components - self.first_component
        return torch.where((components >= 0) & (own >= 0) & (own < self.local.n_components), own, -1).int()

    def _shared(self, tensor: Tensor) -> Tensor:
        return _Use.apply(tensor, self.processes) if tensor.requires_grad else tensor

    def _summed(self, own: Tensor) -> Tensor:
        return _Sum.apply(own, self.processes)

    # On disk: an ordinary mixture

    def save_pretrained(self, folder: StrPath, *, extra: Mapping[str, Any] | None = None) -> None:
        """Writes what `MFA.save_pretrained` would write of the whole mixture, for any number of processes to load.

        Process 0 writes, and holds a piece of one tensor at a time. Returns when the files are there.

        Args:
            folder: where process 0 sees it.
            extra: as in `MFA.save_pretrained`; that of process 0 counts, as does its `fit_report`.
        """
        processes, local = self.processes, self.local
        processes.agree(lambda: check_replaced(Path(folder) / saving.CONFIG, MIXTURE, "folder"))
        config = {
            **processes.agree(lambda: saving.config_of(local, extra, self.fit_report)),
            "n_components": self.n_components,
        }
        config = saving.sealed(config)
        metadata, of = saving.header_metadata(config), self._facts()
        digests: dict[str, list[bytes]] = {}
        with ExitStack() as files:
            weights = None
            if processes.first:
                config_path = files.enter_context(atomic_path(Path(folder) / saving.CONFIG))
                weights_path = files.enter_context(atomic_path(Path(folder) / saving.WEIGHTS))
                atomic_write_json(config_path, config)
                weights = files.enter_context(open(weights_path, "wb"))
                weights.write(self._header({**metadata, checksum.KEY: "0" * 64}, of))
            for name, tensor in local.tensors().items():
                sharers = range(processes.count if is_split(name, self.noise) else 1)
                written = checksum.Pieces()
                for piece in (piece for rank in sharers for piece in self._pieces(tensor, rank)):
                    if weights is not None:
                        data = piece.cpu().view(torch.uint8).numpy().tobytes()
                        written.add(data)
                        weights.write(data)
                digests[name] = written.digests()
            if weights is not None:  # the header has room for the checksum, which is known only now
                total = checksum.combined(of, [one for name in sorted(digests) for one in digests[name]], metadata)
                weights.seek(0)
                weights.write(self._header({**metadata, checksum.KEY: total}, of))
        processes.totals(0)  # waits for process 0

    def _facts(self) -> dict[str, checksum.Fact]:
        """The dtype and shape of each tensor of the whole mixture, in the order of the state dict."""
        return {
            name: checksum.fact(
                tensor.dtype, [self.n_components if is_split(name, self.noise) else len(tensor), *tensor.shape[1:]]
            )
            for name, tensor in self.local.tensors().items()
        }

    def _header(self, metadata: Mapping[str, str], of: Mapping[str, checksum.Fact]) -> bytes:
        """The header of the safetensors file."""
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, tensor in self.local.tensors().items():
            start, end = end, end + torch.Size(of[name].shape).numel() * tensor.element_size()
            dtype = _SAFETENSORS_DTYPES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": of[name].shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _pieces(self, tensor: Tensor, rank: int) -> Iterator[Tensor]:
        """The elements of a process's tensor, in order: on process 0, which receives them; nothing on the others."""
        processes = self.processes
        count = processes.objects(tensor.numel())[rank] if rank else tensor.numel()
        for start in range(0, count, _PIECE_ELEMENTS):
            length = min(_PIECE_ELEMENTS, count - start)
            if rank == processes.index:
                piece = tensor.reshape(-1)[start : start + length]
                if processes.first:
                    yield piece
                else:
                    dist.send(piece, group_dst=0, group=processes.group)
            elif processes.first:
                piece = tensor.new_empty(length)
                dist.recv(piece, group_src=rank, group=processes.group)
                yield piece

    @classmethod
    @door
    def from_pretrained(
        cls,
        folder_or_hub_id: StrPath,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        subfolder: str | None = None,
        **hub: Any,
    ) -> ShardedMFA:
        """Loads a saved mixture, of which every process reads its own components alone.

        Args:
            folder_or_hub_id: what `MFA.save_pretrained` or `save_pretrained` wrote, where every process sees it.
            group: the process group; None: the default one.
            device: of this process's components.
            dtype, precision, subfolder, hub: as in `MFA.from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: as `MFA.from_pretrained`; fewer components than processes among it.
        """
        config_path, weights_path = saving.find_files(folder_or_hub_id, subfolder, **hub)
        config = saving.read_config(config_path)
        processes, tensors = Processes(group), {}
        with opened(weights_path) as file:
            _verify(file, weights_path, processes)
            config = saving.config_beside(config, file.metadata() or {}, weights_path)
            start, stop = part_of(config["n_components"], processes)
            local = saving.blank_mixture(MFA, config, stop - start, precision, config_path)
            expected = local.tensors()
            if set(file.keys()) != set(expected):
                raise ValueError(f"{weights_path} holds the tensors {sorted(file.keys())}, expected {sorted(expected)}")
            for name, like in expected.items():
                split = is_split(name, local.noise)
                found = file.get_slice(name)
                shape = [config["n_components"] if split else len(like), *like.shape[1:]]
                if list(found.get_shape()) != shape:
                    raise ValueError(f"{weights_path}: {name} has shape {found.get_shape()}, expected {shape}")
                tensors[name] = found[start:stop] if split else found[:]
        local = saving.allocated(local, device, dtype)
        local.load_state_dict(tensors)
        local.extra = config.get("extra", {})
        mfa = cls(local, group)
        mfa.fit_report = saving.fit_report_of(config, config_path)
        return mfa


def _verify(file: Any, path: Path, processes: Processes) -> None:
    """Compares weights with the checksum in their header, if it has one; every process reads its part of them."""
    metadata = file.metadata() or {}
    if checksum.KEY not in metadata:
        return
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (mapped, not read)
    parts = checksum.pieces(tensors)
    own = checksum.digests(parts[slice(*processes.span(len(parts)))])
    found = checksum.combined(
        checksum.facts(tensors), [one for each in processes.objects(own) for one in each], metadata
    )
    checksum.compare(found, metadata[checksum.KEY], path, "its header")


def is_split(name: str, noise: str) -> bool:
    """True where a parameter of this name has a row for every component."""
    return name in ("means", "loadings", "weight_logits") or (name == "log_noise" and noise == "per_component")


def part_of(components: int, processes: Processes) -> tuple[int, int]:
    """Returns the first component of this process, and the first one after its last."""
    if components < processes.count:
        raise ValueError(f"a mixture of {components} components cannot be spread over {processes.count} processes")
    return processes.span(components)
