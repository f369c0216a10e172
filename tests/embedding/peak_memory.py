"""`python peak_memory.py SLIDE OUT`: embed it, print the peak above the model in bytes.

Its own process, since a peak cannot be taken back.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import torch
from mean_colour import mean_colour

from xmag_hf.embedding import EmbedOptions, SlideSource, embed_slides
from xmag_hf.embedding.encode import PatchEncoder

if __name__ == "__main__":
    torch.set_num_threads(1)
    encoder = mean_colour(mpp=2.0)
    PatchEncoder(encoder)(np.zeros((32, 224, 224, 3), np.uint8))
    # Resident now, in pages.
    model = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    options = EmbedOptions(threads=2, batch_size=32)
    summary = embed_slides([SlideSource(Path(sys.argv[1]))], sys.argv[2], encoder, options)
    (record,) = summary.records
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(record.status, record.patches, peak - model, record.reason)
