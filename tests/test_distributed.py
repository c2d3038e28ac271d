"""The layer under DistributedDataParallel: two processes equal one."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.test_mfa import module


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mfa = DistributedDataParallel(module(9, 12, 3))
    x = module(9, 12, 3).sample(40, generator=torch.Generator().manual_seed(0))
    mfa(x[rank * 20 : rank * 20 + 20]).backward()
    torch.save({name: p.grad for name, p in mfa.module.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_gradients(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    mfa = module(9, 12, 3)
    x = mfa.sample(40, generator=torch.Generator().manual_seed(0))
    mfa(x).backward()
    for name, parameter in mfa.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-9, atol=1e-11)
