"""The curve of a fit in Weights & Biases or TensorBoard.

    python examples/callbacks.py --to tensorboard    # then: tensorboard --logdir runs
    python examples/callbacks.py --to wandb          # WANDB_MODE=offline keeps it on this machine

`fit` calls its callbacks after every look at the held-out rows, with the mixture and a record of numbers; a callback
is any function, and `log=` of `fit` writes the same records to a file without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _small import LAYER, TEXTS, parser

from mfa_kernels import MFA, fit, harvest
from mfa_kernels.models import load_language_model

Callback = Callable[[MFA, dict[str, Any]], None]


def to_wandb(run: Any) -> Callback:
    """Logs every number of a record to a run of Weights & Biases."""
    return lambda mfa, record: run.log({f"fit/{name}": value for name, value in _numbers(record).items()})


def to_tensorboard(writer: Any) -> Callback:
    """Logs every number of a record to a SummaryWriter, against the step."""

    def log(mfa: MFA, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(f"fit/{name}", value, record["step"])

    return log


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--to", choices=("wandb", "tensorboard"), default="wandb")
    given = options.parse_args()
    model, tokenizer = load_language_model(given.model)
    store = harvest(model, tokenizer, TEXTS, LAYER, max_tokens=5000)
    if given.to == "wandb":
        import wandb

        with wandb.init(project="mfa") as run:
            mfa = fit(store, n_components=16, rank=4, epochs=3, callbacks=[to_wandb(run)])
    else:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter() as writer:
            mfa = fit(store, n_components=16, rank=4, epochs=3, callbacks=[to_tensorboard(writer)])
    print(f"{len(mfa.fit_report.history)} records, the best {mfa.fit_report.held_out_nll:.1f} nats per token")


if __name__ == "__main__":
    main()
