"""What the processes of a group do; the tests compare it with the same in one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfa_kernels import MFA, fit, kmeans
from mfa_kernels.common.processes import Processes
from mfa_kernels.fitting import em_base, guard, preparation
from mfa_kernels.fitting import initialization as cluster_start
from mfa_kernels.fitting.m_step import Prior
from mfa_kernels.fitting.sharded_em import em_step
from mfa_kernels.mixture.sharded import ShardedMFA
from tests.distributed import training
from tests.fitting.planted import SIX, CutOff, draw, planted, raising
from tests.helpers.mixtures import Mixture, mixture, tokens

PROCESSES = 4
SIZES = (4, 2)

ROWS = draw(planted(), 1501).double()  # no size divides it, nor its batches
ROWS[::97, 0] = torch.nan
WEIGHTS = torch.arange(1501) % 5  # about a fifth of the rows are left out, but none that is not finite
WEIGHTS[::97] = 1
FITS: dict[str, dict[str, Any]] = {
    "sgd": {"method": "sgd", "batch_size": 250},
    "sgd, nothing held out": {"method": "sgd", "batch_size": 700, "held_out": 0.0, "noise": "per_component"},
    "sgd, out of patience": {"method": "sgd", "batch_size": 700, "lr": 0.5, "eval_every": 1, "patience": 3},
    "em": {"method": "em", "epochs": 4},
    "em, polish": {"method": "em", "n_components": 9, "noise": "per_component", "polish": 1},
    "truncated": {"method": "truncated", "n_components": 9, "epochs": 4},
    "online": {"method": "online", "batch_size": 250},
    "online, rank 0": {"method": "online", "batch_size": 250, "rank": 0, "noise": "per_component", "held_out": 0.0},
    "em, rows that weigh": {"method": "em", "epochs": 3, "row_weights": WEIGHTS},
    "online, rows that weigh": {"method": "online", "batch_size": 250, "row_weights": WEIGHTS},
    "sgd, rows that weigh, from a mixture": {
        "method": "sgd", "batch_size": 250, "row_weights": WEIGHTS, "start": planted(),
    },
}  # fmt: skip
RESUMED = ("sgd", "em", "truncated", "online")


def run(x: Any = ROWS, **options: Any) -> MFA:
    return fit(x, **{**SIX, "method": "sgd", "epochs": 2, "dtype": torch.float64, **options})


def several_batches() -> None:
    """Passes of EM in several batches, whatever the number of processes."""
    em_base._LEAST_BATCH, em_base._BATCH_ELEMENTS = 150, 1


def cut_off(options: dict[str, Any], folder: Path, group: Any, run: Callable[..., Any] = run) -> None:
    """A fit that ends, after its first evaluation in training, without having come to a checkpoint since."""
    try:
        run(**options, checkpoint=folder, checkpoint_seconds=0, callbacks=[raising(CutOff())], group=group)
    except CutOff:
        return
    raise AssertionError("the fit came to its end")


def save_checkpoints_of_one_process(folder: Path) -> None:
    """Those that the group goes on with."""
    with patch.multiple(em_base, _LEAST_BATCH=150, _BATCH_ELEMENTS=1):
        for name in RESUMED:
            cut_off(FITS[name], folder / f"one, {name}", False)


def outcome(mfa: MFA) -> dict[str, Any]:
    report = asdict(mfa.fit_report)
    del report["seconds"], report["run"]
    for record in report["history"]:
        del record["seconds"], record["tokens_per_second"], record["memory"]
    return {"state": getattr(mfa, "local", mfa).tensors(), "noise_floor": mfa.noise_floor, "report": report}


def message(work: Any) -> str:
    """Of the error that it raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # one processor for all: to wake another one takes longer than the work
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    several_batches()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    pair = dist.new_group([0, 1])
    for size, group in zip(SIZES, (None, pair)):
        if rank < size:
            found = {"fits": fits(Path(folder), size, group), **checks(rank, Path(folder), size, group)}
            torch.save(found, f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()


def fits(folder: Path, size: int, group: Any) -> dict[str, Any]:
    out = {name: outcome(run(**options, group=group)) for name, options in FITS.items()}
    for name in RESUMED:
        options = {**FITS[name], "group": group}
        if size == 4:
            cut_off(FITS[name], folder / f"four, {name}", group)
            if dist.get_rank() == 0:
                for copy in ("four", "two"):
                    shutil.copytree(folder / f"four, {name}", folder / f"four, for {copy}, {name}")
            dist.barrier()
        own = folder / f"four, for {'four' if size == 4 else 'two'}, {name}"
        out[f"{name}, resumed from four"] = outcome(run(**options, resume=own))
        if size == 2:
            out[f"{name}, resumed from one"] = outcome(run(**options, resume=folder / f"one, {name}"))
    return out


def streamed(rank: int, size: int, group: Any, rows: Tensor = ROWS, **options: Any) -> MFA:
    """A fit to streams that are dealt to the processes, batch by batch: the last one, of one row, to process 0 alone.

    The rows of the start and of every step are then those of one process, in another order.
    """
    own: Iterator[Tensor] = iter(rows.split(25)[rank::size])
    with patch.multiple(preparation, LEAST_START_ROWS=400, START_ROWS_PER_COMPONENT=1):
        return run(
            own, method="online", batch_size=100, held_out=0.0, eval_every=2, group=group,
            clusters=planted().means.detach().double(), **options,
        )  # fmt: skip


def checks(rank: int, folder: Path, size: int, group: Any) -> dict[str, Any]:
    def shift(mfa: MFA, record: dict[str, Any]) -> None:
        with torch.no_grad():
            mfa.means.add_(1)  # on process 1, but those of process 0 count

    out: dict[str, Any] = {}
    checkpoint = folder / f"{size}, stream"
    out["stream"] = outcome(streamed(rank, size, group, checkpoint=checkpoint))
    resumed = {"checkpoint": checkpoint, "resume": True}
    out["stream, resumed"] = outcome(streamed(rank, size, group, **resumed))
    out["other stream"] = message(lambda: streamed(rank, size, group, ROWS + (rank == 1), **resumed))
    out["callback"] = outcome(run(**FITS["sgd"], callbacks=[shift] if rank == 1 else [], group=group))
    log = folder / f"{size}-{rank}.jsonl"
    run(method="em", epochs=1, log=log, group=group)
    out["log"] = log.exists()
    out["other data"] = message(lambda: run(ROWS + (rank == 1), group=group))
    out["other settings"] = message(lambda: run(seed=rank, group=group))
    out["no start"] = message(lambda: run(torch.ones(200, 3), group=group))
    out["alone"] = torch.equal(run(epochs=0, group=False).means, run(epochs=0, group=group).means)
    out["sums"] = sums(Processes(group))
    out["ddp"] = data_parallel(rank, size, group)
    out["training, ddp"] = training.data_parallel(rank, size, group)
    out["training, fsdp"] = training.fully_sharded(rank, size, group, folder)
    for name in SHARDED:
        out[f"sharded, {name}"] = sharded(name, folder / f"{size}, {name}", group)
    out["fit_sharded"] = sharded_fits(rank, size, folder, group)
    return out


def sums(processes: Processes) -> dict[str, Any]:
    """Numbers whose sum depends on the order."""
    torch.manual_seed(processes.index)
    x = torch.randn(7, 5) * 10.0 ** torch.randint(-6, 6, (7, 5))
    expected = processes.stacked(x)
    total = expected[0].clone()
    for other in expected[1:]:
        total += other
    processes.sum_(x)
    uneven = torch.full((processes.index, 2), float(processes.index))
    return {
        "exact": torch.equal(x, total),
        "concatenated": processes.concatenated(uneven),
        "gathered": processes.gathered(uneven),
        "totals": processes.totals(1, processes.index),
        "nan": processes.totals(float("nan") if processes.index == 1 else 1.0),
    }


# Data-parallel and component-parallel modules


def small() -> tuple[Mixture, Tensor]:
    m = mixture(9, 12, 3, dtype=torch.float64)
    return m, tokens(m, 40)


def module(m: Mixture) -> MFA:
    return MFA.from_parameters(*m[:3], m.log_weights.exp())


def data_parallel(rank: int, size: int, group: Any) -> dict[str, Tensor]:
    m, x = small()
    mfa = DistributedDataParallel(module(m), process_group=group)
    loss = mfa(x.tensor_split(size)[rank])
    loss.backward()
    dist.all_reduce(loss.detach_(), group=group)
    return {"loss": loss / size, **{name: p.grad for name, p in mfa.module.named_parameters()}}


SHARDED: dict[str, dict[str, Any]] = {
    "shared": {"components": 11},
    "per component": {"components": 11, "per_component": True},
    "diffuse": {"components": 90, "spread": 0.05},  # more active components than slots, on some processes and on all
    "rank 0": {"components": 6, "rank": 0},
}


def problem(name: str) -> tuple[MFA, Tensor]:
    options = {"features": 12, "rank": 3, "dtype": torch.float64, **SHARDED[name]}
    m = mixture(**options)
    x = tokens(m, 57)
    x[5, 3] = torch.nan
    return module(m), x.reshape(3, 19, 12)


def use(mfa: Any, x: Tensor) -> dict[str, Any]:
    """What a mixture, spread over processes or not, makes of tokens."""
    finite = x.flatten(0, 1)[torch.arange(57) != 5].clone().requires_grad_()
    out: dict[str, Any] = {"log_prob": mfa.log_prob(x).detach(), "assign": mfa.assign(x)}
    for top_k in (1, 4, None):
        with torch.no_grad():
            code = mfa.encode(x, top_k)
            out[f"encode, {top_k}"] = [code.components, code.responsibilities, code.latents, code.dropped]
    with torch.no_grad():
        out["reconstruct"] = mfa.reconstruct(x)
    loss = mfa(finite)
    loss.backward()
    out["loss"], out["dx"] = loss.detach(), finite.grad.clone()
    out["gradients"] = gradients(mfa)
    finite.grad = None
    code = mfa.encode(finite, 3)
    (mfa.decode(code).square().sum() + code.latents.sum()).backward()
    out["dx, decode"], out["gradients, decode"] = finite.grad.clone(), gradients(mfa)
    optimizer = torch.optim.Adam(mfa.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        mfa(finite.detach()).backward()
        optimizer.step()
    out["after Adam"] = mfa.log_prob(x).detach()
    return out


def gradients(mfa: nn.Module) -> dict[str, Tensor]:
    out = {name.removeprefix("local."): p.grad.clone() for name, p in mfa.named_parameters()}
    mfa.zero_grad()
    return out


def prior(features: int = 12) -> Prior:
    return Prior(torch.eye(features, dtype=torch.float64), 3.0, 1.0)


def sharded(name: str, folder: Path, group: Any) -> dict[str, Any]:
    whole, x = problem(name)
    whole.extra = {"layer": 3}
    mfa = ShardedMFA.from_mfa(whole, group)
    out = use(mfa, x)
    mfa = ShardedMFA.from_mfa(whole, group)
    batches = x.flatten(0, 1).split(20)
    out["em"] = [em_step(mfa, batches, prior()) for _ in range(3)]
    out["ml"] = em_step(mfa, [x], None) if name == "rank 0" else None
    mfa.save_pretrained(folder)
    again = ShardedMFA.from_pretrained(folder, group=group)
    out["again"] = {name: torch.equal(t, again.local.tensors()[name]) for name, t in mfa.local.tensors().items()}
    out["first"] = mfa.first_component
    out["too many"] = message(lambda: ShardedMFA.from_mfa(module(mixture(1, 5, 1)), group))
    return out


# Component-parallel fits


def far_away() -> Tensor:
    """Where regions are, and a place where no row is, on the first of two and the second of four processes."""
    means = planted().means.detach().double()
    return torch.cat([means[:2], torch.full_like(means[:1], 1e3), means[2:]])


SHARDED_FITS: dict[str, dict[str, Any]] = {
    "shared": {"n_components": 7, "epochs": 3},
    "few rows": {"n_components": 60, "rank": 5, "epochs": 2, "noise": "per_component", "held_out": 0.0},
    "a region moves": {"n_components": 7, "epochs": 3, "clusters": far_away()},
    "online": {"n_components": 7, "epochs": 3, "method": "online", "batch_size": 300},
    "online, per component": {
        "n_components": 7, "epochs": 2, "method": "online", "batch_size": 400, "noise": "per_component",
    },
    "online, a region moves": {
        "n_components": 7, "epochs": 3, "method": "online", "batch_size": 150, "clusters": far_away(),
    },
}  # fmt: skip
SHARDED_RESUMED = ("few rows", "online", "online, per component")
TWINS: dict[str, Any] = {"n_components": 7, "epochs": 3, "held_out": 0.0}
LARGE = {"n_components": 32, "rank": 24, "epochs": 1}
LARGE_FEATURES = 64


def run_sharded(x: Any = ROWS, **options: Any) -> ShardedMFA:
    mfa: Any = fit(x, split="components", **{"rank": 2, "progress": False, "dtype": torch.float64, **options})
    return mfa


def sharded_outcome(mfa: ShardedMFA) -> dict[str, Any]:
    """That of the whole mixture, on every process."""
    out = outcome(mfa)  # type: ignore[arg-type]
    split = {name: len(t) == mfa.local.n_components for name, t in mfa.local.tensors().items()}
    out["state"] = {n: mfa.processes.concatenated(t) if split[n] else t for n, t in mfa.local.tensors().items()}
    return out


def clusters_of_a_sample(processes: Processes) -> dict[str, Any]:
    weights = torch.linspace(0, 2, len(ROWS), dtype=torch.float64)
    options: dict[str, Any] = {"sample": 700, "iterations": 4, "progress": False, "processes": processes}
    return {w is None: asdict(kmeans(ROWS, 9, weights=w, **options)) for w in (None, weights)}


def twins(group: Any) -> ShardedMFA:
    """A mixture whose first and last components are one but for their weights: on two processes, where there are
    some."""
    m = planted()
    parameters = [m.means, m.loadings]
    means, loadings = (torch.cat([p.detach(), p[:1].detach()]).double() for p in parameters)
    weights = m.log_weights.exp().detach().double()
    weights = torch.cat([0.6 * weights[:1], weights[1:], 0.4 * weights[:1]])
    whole = MFA.from_parameters(means, loadings, m.noise_variance.detach(), weights)
    return ShardedMFA.from_mfa(whole, group)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor of three or more dimensions that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.dim() >= 3:
                stored = t.untyped_storage().nbytes() // t.element_size()  # less, where it is expanded
                self.elements = max(self.elements, min(t.numel(), stored))
        return out


def largest_tensor(group: Any) -> tuple[int, tuple[int, ...]]:
    """While K D R outgrows everything else; and the shape of the loadings that come out."""
    x = draw(planted(features=LARGE_FEATURES), 600)
    small = patch.object(cluster_start, "_GROUP_ELEMENTS", 1 << 12), patch.object(guard, "_CHUNK", 64)
    with small[0], small[1], Largest() as largest:
        mfa = run_sharded(x, **LARGE, group=group)
    return largest.elements, tuple(mfa.loadings.shape)


def sharded_fits(rank: int, size: int, folder: Path, group: Any) -> dict[str, Any]:
    em_base._LEAST_BATCH = 600
    out: dict[str, Any] = {}
    seen: list[int] = []
    saved = folder / f"{size}, saved"
    for name, options in SHARDED_FITS.items():
        more: dict[str, Any] = {}
        if name == "shared":
            more = {"log": folder / f"sharded {size}-{rank}.jsonl"}
            more["callbacks"] = [lambda mfa, record: seen.append(mfa.n_components)]
        mfa = run_sharded(**options, **more, group=group)
        out[name] = sharded_outcome(mfa)
        if name == "shared":
            mfa.save_pretrained(saved)
    for name in SHARDED_RESUMED:
        own, copies = folder / f"{size}, {name}", [folder / f"four, for {count}, {name}" for count in (4, 2, 1)]
        if size == 4:
            cut_off(SHARDED_FITS[name], own, group, run_sharded)
            if rank == 0:
                for copy in copies:
                    shutil.copytree(own, copy)
            dist.barrier()
        there = copies[SIZES.index(size)]
        out[f"{name}, resumed"] = sharded_outcome(run_sharded(**SHARDED_FITS[name], resume=there, group=group))
    out["seen"], out["log"] = seen, (folder / f"sharded {size}-{rank}.jsonl").exists()
    out["again"] = outcome(
        run_sharded(n_components=7, epochs=0, start=ShardedMFA.from_pretrained(saved, group=group), group=group)  # type: ignore[arg-type]
    )["report"]
    out["twins"] = sharded_outcome(run_sharded(**TWINS, start=twins(group), group=group))
    out["clusters"] = clusters_of_a_sample(Processes(group))
    out["largest"] = largest_tensor(group)
    out["other data"] = message(lambda: run_sharded(ROWS + (rank == 1), n_components=6, group=group))
    out["too many"] = message(lambda: run_sharded(n_components=1, group=group))
    out["other start"] = message(lambda: run_sharded(n_components=8, start=twins(group), group=group))
    em_base._LEAST_BATCH = 150
    return out
