"""`fit`: from activations to a mixture, with the best state on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.files import StrPath
from mfa_kernels.common.modes import door
from mfa_kernels.data.source import as_source
from mfa_kernels.fitting.kmeans import KMeansResult
from mfa_kernels.fitting.options import checked
from mfa_kernels.fitting.preparation import holding
from mfa_kernels.fitting.row_weights import weighted
from mfa_kernels.fitting.run import Callback
from mfa_kernels.fitting.sharded_stages import ShardedStages
from mfa_kernels.fitting.stages import Stages
from mfa_kernels.fitting.stream_fit import feed_all
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.sharded import ShardedMFA


@door
def fit(
    activations: Any,
    n_components: int | None = None,
    rank: int | None = None,
    *,
    method: str = "auto",
    split: str = "rows",
    noise: str | None = None,
    init: str = "pca",
    clusters: KMeansResult | Tensor | None = None,
    start: MFA | ShardedMFA | None = None,
    row_weights: Tensor | None = None,
    epochs: int = 10,
    batch_size: int = 1024,
    lr: float = 1e-2,
    schedule: str = "cosine",
    polish: int = 0,
    held_out: float = 0.05,
    eval_every: int | None = None,
    patience: int | None = 5,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str = "exact",
    callbacks: Sequence[Callback] = (),
    log: StrPath | None = None,
    checkpoint: StrPath | None = None,
    checkpoint_seconds: float = 60.0,
    resume: StrPath | bool = False,
    progress: bool | str = True,
    group: Any = None,
) -> MFA:
    """Fits a mixture of factor analyzers to activations; returns the best on held-out rows.

    K-means on a sample of the rows (128 K of them, at least 100,000, and at most the greater of 262,144 and 32 K), a
    start from the clusters, then one of

    - "auto": "online" for an iterator, and where a pass over the rows makes at least 100 of its M-steps; else
      "truncated" from 128 components and 2 epochs on, or from 1,024 components on, where the C++ kernels serve a CPU;
      else "em";
    - "em": passes over all the rows, each followed by a closed M-step under a prior, whose strength is chosen on the
      held-out rows (`mfa_kernels.fitting.em`): a region that owns few rows leans on what the others have in common.
      Steps are lengthened, which halves the passes, and taken back where the posterior falls;
    - "truncated": the same with E-steps that do not grow with K: a row looks at the components that were best for it
      before and at a few neighbors of these (`mfa_kernels.fitting.candidates`), the first time at those that a search
      in few coordinates finds (`mfa_kernels.fitting.candidate_search`). Likelihoods on the way are lower bounds; that
      of the result is exact, and `FitReport.candidate_gap` says what the bound misses. Not where processes share the
      components;
    - "online": "em" with an M-step every few rows, which needs fewer passes; of many components, rows look at those
      that the search finds, with bounds as above. An iterator is read once and never
      held: the rows of the sample are buffered, for the start and to hold out from, and the others are let go. One
      that ends within the sample is fitted as other data are. `mfa_kernels.fit_many` fits several mixtures to one;
    - "sgd": Adam on the mean negative log-likelihood, the paper's procedure (arXiv 2602.02464).

    Rows are shuffled by number and never moved. The same seed gives the same bits on one device and number of threads
    (docs/fitting.md, "The same bits"). Rows that are not finite in `dtype`, or whose squared norm is not, are left out
    and counted. Ctrl-C ends the training with a warning, and returns the best so far.

    With a `checkpoint`, a fit that is killed at any moment resumes, with `resume`, to the bits that it would have
    come to (timings apart; on the same kind of device and number of threads). The first one is written when the
    start is there: K-means is not cut up, and one that was killed runs again. An iterator has to be given again
    from its beginning: the rows that were used are read and passed over. What callbacks remember is theirs to keep.

    Where `torch.distributed` is initialised (as under torchrun), its processes fit one mixture: each of them calls
    `fit` with the same arguments. The result is that of a single process but for the order of sums. Data or settings
    that differ between processes are an error. An error on one process alone, and Ctrl-C, are left to the launcher,
    which ends the others. What the processes share is the `split`:

    - "rows": each takes its share of every batch, and returns the same mixture, bit for bit. Another number of
      processes can resume from a checkpoint. (By as many, it leads to the same bits, except where it cut a pass of "em"
      in two.) Process 0 runs K-means, shows progress, and writes `log` and `checkpoint`; callbacks are called on the
      processes that have them, and parameters that they change become those of process 0. Of an iterator that is fitted
      online, every process brings its own, and it takes as many processes to resume;
    - "components", for a mixture that is too large for one device: each reads all rows, holds parameters, statistics,
      steps and the best state of its own K / size components, writes its own part of `checkpoint` (in a folder that all
      of them see), and returns its part of a `mfa_kernels.mixture.sharded.ShardedMFA`. While K-means
      and the start run, every process also holds a few times K D numbers (centroids and their sums); the processes
      share these passes over the sample, whose rows are read again in each pass and not kept. In EM, a few numbers per
      token travel from each process. Callbacks are called on all processes, which must have the same. For methods "em",
      "online" and "auto", from `init` "pca", without `row_weights` and `polish`; an iterator is concatenated in memory,
      on every process.

    Args:
        activations: (N, D): a tensor, an array, an `ActivationStore`, or an iterable of batches (B, D), which is
            concatenated in memory, unless it is an iterator that is fitted online; see `mfa_kernels.fitting.as_source`.
        n_components: K, at most the number of rows to train on; None: that of `start`.
        rank: R, at most D; 0 is a mixture of diagonal Gaussians. None: that of `start`, else 10.
        method: "auto", "em", "truncated", "online" or "sgd".
        split: "rows" or "components": what several processes share, see above.
        noise: "shared" or "per_component". None: that of `start`, else "shared".
        init: "pca" (of every cluster) or "random" (loadings, the paper's start); see `start_from_clusters`.
        clusters: a `KMeansResult` or centroids (K, D) to begin with, instead of running K-means.
        start: a mixture to begin with, instead of K-means and a start from the clusters: one that was fitted before,
            for more epochs or to other rows, or one with parameters of your own. It is copied, in `dtype` and
            `precision` and with its `extra`, and stays as it is. With split="components" it may be a `ShardedMFA`,
            which is trained in place. The state kept is never worse on the held-out rows
            than the start, which is step 0. These are the rows that were held out before where data, `held_out` and
            `seed` are the same; with another seed, some were trained on. Adam, EM's choice of a prior and the report
            begin anew. A region of weight 0 may come back to life.
        row_weights: (N,), finite and non-negative; None: all 1. What is maximised is the mean of log p by these
            weights, in the start, in training and on the held-out rows: a row of weight 2 counts as two rows, one of
            weight 0 is left out. Weights count in K-means, `start_from_clusters`, EM, Adam's loss, the likelihoods of
            the report, and the sample that guards against worse states (`held_out`). They do not affect which rows are
            drawn or held out (a share of the rows), which count as outliers, or live regions. EM compares the tokens of
            its prior with the total weight: scale weights to a mean of 1. A total below K is refused. Not for an
            iterator that is fitted online.
        epochs: passes over the rows, at most; 0 returns the start.
        batch_size: rows per step, at most; an epoch is cut into batches of equal size. Online, rows per M-step, but
            at least 16 K. Passes of "em" do not depend on it.
        lr: Adam's learning rate. Means and loadings move in units of the standard deviation within clusters, per
            dimension, so that the rate depends neither on the scale of the activations nor on outlier dimensions.
        schedule: of Adam's rate: "cosine" (down to 0) or "constant", both after a short linear warm-up.
        polish: epochs of Adam after EM; not for an iterator, whose rows are gone.
        held_out: share of the rows kept from training to choose the best state, in [0, 1); at most 20,000 rows,
            and of whole texts where these are known, as a store does (`FitReport.held_out_by` says which it was). With
            0 nothing is chosen: the last state is returned. A state is refused, whatever held-out rows say,
            if a sample of the rows trained on (`mfa_kernels.fitting.guard`) is less likely under it than under the
            start; with EM, likelihood and prior together are compared.
        eval_every: steps (of EM: M-steps) between evaluations on the held-out rows; None: once an epoch, and every
            20 M-steps of an iterator.
        patience: evaluations without improvement after which to stop; None: never.
        seed: of everything that is drawn.
        device: of the mixture and of the work; None: where the activations are.
        dtype: of the parameters, float32 or float64.
        precision: of the mixture: "exact", "fast" or "reference".
        callbacks: called as callback(mfa, record) after every evaluation, the one of the start included; `record` is
            the entry of `FitReport.history`. They may change the mixture's parameters in place.
        log: path of a file of JSON lines, one per evaluation; the curve of another fit that is there is replaced.
        checkpoint: folder for what is needed to resume, replaced atomically; of one fit. See
            `mfa_kernels.fitting.checkpoint`.
        checkpoint_seconds: at least, between two of them.
        resume: a folder to resume from (and to write to, where `checkpoint` names no other), with the same data and
            settings. True: from `checkpoint`, or from the beginning where it holds none yet. A fit that came to its
            end returns its result.
        progress: show progress bars; with a string, that of the training begins with it.
        group: the `torch.distributed.ProcessGroup` whose processes fit together; None: the default one where there is
            one; False: this process fits alone.

    Returns:
        The mixture, with a `FitReport` as its attribute `fit_report`: with a split into components, a `ShardedMFA`, and
        times and memory of the process's own.

    Raises:
        TypeError, ValueError: naming the argument; for `resume`, each setting that differs.
        FileExistsError: `checkpoint` holds one, and there is no `resume`; or `checkpoint` or `log` would take the place
            of something else (`mfa_kernels.common.places`).
        FileNotFoundError: `resume` names a folder without a checkpoint.
        RuntimeError: when step after step has a loss or a gradient that is not finite.
    """
    given = dict(locals())
    if isinstance(activations, Iterator) and method in ("online", "auto") and split == "rows":
        return feed_all({"": given}, activations)[""]
    options = checked(given)
    with holding(options.checkpoint, options.log, options.group):
        fitting = Stages(options) if options.split == "rows" else ShardedStages(options)
        fitting.prepare(weighted(as_source(activations), options.row_weights))
        fitting.start()
        fitting.train()
        return fitting.report()
