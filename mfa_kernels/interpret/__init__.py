"""Reading a mixture: what its regions are about, how they vary inside, what they do to the next token.

contexts    rows of each region in their text, latent axes from end to end
regions     tokens that set each region apart, and which regions are worth showing
lens        centroids, axes and steering in the vocabulary
neighbors   which regions lie next to which
figures     a map of the regions, a region from the inside (matplotlib)
report      all of it on one HTML page
"""

from mfa_kernels.interpret.contexts import (
    Assignments,
    AxisContexts,
    Context,
    assignments,
    axis_contexts,
    show_token,
    top_contexts,
)
from mfa_kernels.interpret.figures import region_scatter, regions_map
from mfa_kernels.interpret.lens import LogitLens, LogitShift, TokenChange, logit_lens, logit_shift
from mfa_kernels.interpret.neighbors import neighbors
from mfa_kernels.interpret.regions import RegionSummary, TokenShare, interesting_regions, region_summaries
from mfa_kernels.interpret.report import write_report

__all__ = [
    "Assignments",
    "AxisContexts",
    "Context",
    "LogitLens",
    "LogitShift",
    "RegionSummary",
    "TokenChange",
    "TokenShare",
    "assignments",
    "axis_contexts",
    "interesting_regions",
    "logit_lens",
    "logit_shift",
    "neighbors",
    "region_scatter",
    "region_summaries",
    "regions_map",
    "show_token",
    "top_contexts",
    "write_report",
]
