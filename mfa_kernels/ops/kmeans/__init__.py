"""The nearest centroid of every row, and sums by cluster."""
