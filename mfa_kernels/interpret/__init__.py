"""Reading a mixture: what its regions are about, how they vary inside, what they do to the next token.

contexts    rows of each region in their text, latent axes from end to end
regions     tokens that set each region apart, and which regions are worth showing
lens        centroids, axes and steering in the vocabulary
neighbors   which regions lie next to which
genres      genres of documents, by where they came from
topics      regions that tell the genre of a text
associate   how regions and latents go with labels of tokens, beside chance
labels      labels of regions: files of them, questions to whoever labels, answers
delphi      regions as the latents of delphi, which explains and scores them
figures     a map of the regions, a region from the inside (matplotlib)
report      all of it on one HTML page
"""

from mfa_kernels.interpret.associate import Association, LatentAssociation, associate
from mfa_kernels.interpret.contexts import (
    Assignments,
    AxisContexts,
    Context,
    assignments,
    axis_contexts,
    show_token,
    top_contexts,
)
from mfa_kernels.interpret.delphi import write_delphi_cache
from mfa_kernels.interpret.figures import region_scatter, regions_map
from mfa_kernels.interpret.genres import genres_of
from mfa_kernels.interpret.labels import (
    Label,
    label_prompt,
    label_regions,
    parse_label,
    read_answers,
    read_labels,
    write_labels,
    write_prompts,
)
from mfa_kernels.interpret.lens import LogitLens, LogitShift, TokenChange, logit_lens, logit_shift
from mfa_kernels.interpret.neighbors import neighbors
from mfa_kernels.interpret.regions import RegionSummary, TokenShare, interesting_regions, region_summaries
from mfa_kernels.interpret.report import write_report
from mfa_kernels.interpret.topics import GenreCounts, Topic, genre_counts, topic_direction, topic_regions, topics

__all__ = [
    "Assignments",
    "Association",
    "AxisContexts",
    "Context",
    "GenreCounts",
    "Label",
    "LatentAssociation",
    "LogitLens",
    "LogitShift",
    "RegionSummary",
    "TokenChange",
    "TokenShare",
    "Topic",
    "assignments",
    "associate",
    "axis_contexts",
    "genre_counts",
    "genres_of",
    "interesting_regions",
    "label_prompt",
    "label_regions",
    "logit_lens",
    "logit_shift",
    "neighbors",
    "parse_label",
    "read_answers",
    "read_labels",
    "region_scatter",
    "region_summaries",
    "regions_map",
    "show_token",
    "top_contexts",
    "topic_direction",
    "topic_regions",
    "topics",
    "write_delphi_cache",
    "write_labels",
    "write_prompts",
    "write_report",
]
