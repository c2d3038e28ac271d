"""Fitting mixtures to activations: K-means, a start from the clusters, and training with held-out selection."""

from mfa_kernels.fit_report import FitReport
from mfa_kernels.fitting.kmeans import KMeansResult, kmeans
from mfa_kernels.fitting.loop import fit
from mfa_kernels.fitting.many import fit_many
from mfa_kernels.fitting.reservoir import reservoir
from mfa_kernels.fitting.sharded import fit_sharded
from mfa_kernels.fitting.source import Source, as_source
from mfa_kernels.fitting.start import start_from_clusters

__all__ = [
    "FitReport",
    "KMeansResult",
    "Source",
    "as_source",
    "fit",
    "fit_many",
    "fit_sharded",
    "kmeans",
    "reservoir",
    "start_from_clusters",
]
