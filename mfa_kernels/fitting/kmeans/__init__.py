"""K-means: Lloyd's iterations from a k-means|| start, clusters merged and split."""

from mfa_kernels.fitting.kmeans.kmeans import KMeansResult, kmeans

__all__ = ["KMeansResult", "kmeans"]
