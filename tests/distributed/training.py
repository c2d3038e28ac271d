"""A model with a mixture in its loss, trained by a group of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from mfa_kernels import MFA
from tests.helpers.mixtures import mixture

TOKENS = 40
COMPONENTS, FEATURES = 9, 12  # neither of which four divides
METHODS = ("log_prob", "assign", "encode", "reconstruct", "component_log_prob", "woodbury", "screen", "rotate")


class Reader(nn.Module):
    """Predicts the next of 20 tokens from one, and keeps what it makes of a token where a mixture knows it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(20, FEATURES), nn.Linear(FEATURES, FEATURES), nn.Linear(12, 20)
        m = mixture(COMPONENTS, FEATURES, 3)
        self.mfa = MFA.from_parameters(*m[:3], m.log_weights.exp())
        with torch.no_grad():
            for module in (self.embed, self.layer, self.head):
                for parameter in module.parameters():
                    parameter.normal_(generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layer(self.embed(ids[:-1]))
        surprise: Tensor = self.mfa(hidden)
        return nn.functional.cross_entropy(self.head(hidden), ids[1:]) + 0.1 * surprise


def ids() -> Tensor:
    """(4, T), a row for each of four processes."""
    return torch.randint(20, (4, TOKENS), generator=torch.Generator().manual_seed(1))


def rows(rank: int, size: int) -> list[Tensor]:
    return list(ids().chunk(size)[rank])


def step(model: nn.Module, given: list[Tensor]) -> Tensor:
    """Returns the loss of a step of SGD over these rows, gradients added up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    loss = torch.stack([model(row) for row in given]).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def outcome(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and gradients and parameters by name, whole."""
    whole = {
        f"{kind} {name}": getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)()
        for name, parameter in model.named_parameters()
        for kind, tensor in (("value", parameter.detach()), ("gradient", parameter.grad))
    }
    return {"loss": loss, **whole}


def mean(loss: Tensor, size: int, group: Any) -> Tensor:
    dist.all_reduce(loss, group=group)
    return loss / size


def data_parallel(rank: int, size: int, group: Any) -> dict[str, Tensor]:
    model = DistributedDataParallel(Reader(), process_group=group)
    return outcome(model.module, mean(step(model, rows(rank, size)), size, group))


def sharded(rank: int, size: int, group: Any) -> Reader:
    """With parameters spread over the processes by FSDP, those of the mixture on their own."""
    model = Reader()
    mesh = DeviceMesh("cpu", list(range(size))) if group is None else DeviceMesh.from_group(group, "cpu")
    for module in (model.layer, model.mfa, model):
        fully_shard(module, mesh=mesh)
    return model


def fully_sharded(rank: int, size: int, group: Any, folder: Path) -> dict[str, Any]:
    model = sharded(rank, size, group)
    found: dict[str, Any] = {"step": outcome(model, mean(step(model, rows(rank, size)), size, group))}
    x = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(2))
    found["methods"] = {name: refused(model.mfa, name, x) for name in METHODS}
    found["save"] = error(lambda: model.mfa.save_pretrained(folder / "none"))
    found["paper"] = error(lambda: model.mfa.to_reference_checkpoint(folder / "none.pt"))
    found["x"] = error(lambda: Reader().mfa.log_prob(model.mfa.means))
    register_fsdp_forward_method(model.mfa, "log_prob")
    with torch.no_grad():
        found["log_prob"] = model.mfa.log_prob(x)
    whole = MFA(COMPONENTS, FEATURES, 3)
    whole.load_state_dict(get_model_state_dict(model.mfa, options=StateDictOptions(full_state_dict=True)))
    whole.save_pretrained(folder / f"whole-{size}-{rank}")
    return found


def refused(mfa: MFA, name: str, x: Tensor) -> str:
    given = () if name in ("woodbury", "screen", "rotate") else (x,)
    with torch.no_grad():
        return error(lambda: getattr(mfa, name)(*given))


def error(work: Any) -> str:
    try:
        work()
    except (RuntimeError, TypeError) as found:
        return f"{type(found).__name__}: {found}"
    return "no error"
