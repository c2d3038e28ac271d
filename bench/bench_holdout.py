"""What fits promise of rows they have not seen, and what other texts keep of it: rows held out one by one, or by text.

    python -m bench.bench_holdout [-K 64 512 2048]

SmolLM2, layer 18 (bench/real.py): 200,000 rows to fit, R=10, shared noise. `fit` holds one row in twenty out, and
chooses the strength of the prior and the pass by them: single rows where it is given a tensor, whole texts where it is
told which text each row is of, as an `ActivationStore` tells it. Both are judged by rows of texts that no fit has seen.
Of the 20,000 rows that stand for those trained on, one in twenty was held out.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from bench.race import HELD_OUT, processor
from bench.real import LAYER, LAYERS, Real
from mfa_kernels import fit
from mfa_kernels.fitting.run import mean_nll


class OfTexts:
    """Rows x (N, D) with the text of each (N,)."""

    def __init__(self, x: Tensor, texts: Tensor) -> None:
        self.x, self.texts, self.n_features = x, texts, x.shape[1]

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor) -> Tensor:
        return self.x[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-K", "--components", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--layer", type=int, default=LAYER, choices=LAYERS)
    parser.add_argument("--tokens", type=int, default=200_000, help="to train on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    real = Real(options.layer)
    rows = (~real.held_out).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][: options.tokens]
    x, texts = real.store.rows(rows).float(), real.store.texts[rows]
    test = real.split()[1][:HELD_OUT].contiguous()
    print(f"{processor()}, {options.threads} threads, {len(x):,} rows of {len(texts.unique()):,} texts\n")
    columns = ["K", "held out by", "prior", "pass kept", "trained on, nats", "promised", "other texts"]
    print("| " + " | ".join([*columns, "short of the promise", "of training"]) + " |\n|" + "---|" * 9, flush=True)
    for components in options.components:
        for data in (x, OfTexts(x, texts)):
            mfa = fit(data, components, 10, progress=False)
            report = mfa.fit_report
            best = min(report.history, key=lambda record: record["held_out_nll"])
            train, other = mean_nll(mfa, x[:HELD_OUT]), mean_nll(mfa, test)
            row = [components, report.held_out_by, f"{report.prior_strength:g}", best["epoch"]]
            row += [f"{nats:.1f}" for nats in (train, report.held_out_nll, other)]
            row += [f"{other - report.held_out_nll:.1f}", f"{other - train:.1f}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
