"""Fitting mixtures to activations: K-means, a start from the clusters, and training."""

from mfa_kernels.data.reservoir import reservoir
from mfa_kernels.data.source import Source, as_source
from mfa_kernels.fitting.fit import fit
from mfa_kernels.fitting.fit_many import fit_many
from mfa_kernels.fitting.fit_sharded import fit_sharded
from mfa_kernels.fitting.initialization import start_from_clusters
from mfa_kernels.fitting.kmeans import KMeansResult, kmeans
from mfa_kernels.mixture.fit_report import FitReport

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
