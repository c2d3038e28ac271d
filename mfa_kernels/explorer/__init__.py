"""The explorer: a local web page over the regions of a mixture, their texts, and the model that they steer.

texts       the documents of a store in memory, and where words stand in them
cached      the region of every row, kept beside the store
catalog     a line for each region: share, entropy, distinct tokens, genre, telling tokens
layout      a map: regions with near centroids are near
region      all about one region: contexts, histograms, latents, lens, neighbors
reading     a text of the user's own, token by token
playground  text that streams while it is steered
explorer    all of these, over one mixture and one store
server      the pages, on this machine alone (needs starlette and uvicorn)
static      what the browser runs: no framework, nothing from a network
"""

from mfa_kernels.explorer.explorer import Explorer

__all__ = ["Explorer"]
