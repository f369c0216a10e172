"""`python peak_memory.py SLIDE OUT`: embed it, print the peak above the model in bytes.

Its own process, since a peak cannot be taken back.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch
from mean_colour import mean_colour

from xmag_hf.embedding import EmbedOptions, SlideSource, embed_slides
from xmag_hf.embedding.encode import PatchEncoder
from xmag_hf.host_memory import keep_freed_memory


def memory_kib(name: str) -> int:
    """A line of /proc/self/status. Not getrusage's peak: that is inherited from the caller."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found.group(1))


if __name__ == "__main__":
    keep_freed_memory()  # as `xmag embed` does
    torch.set_num_threads(1)
    encoder = mean_colour(mpp=2.0)
    PatchEncoder(encoder)(np.zeros((32, 224, 224, 3), np.uint8))
    model = memory_kib("VmRSS")
    options = EmbedOptions(threads=2, batch_size=32)
    summary = embed_slides([SlideSource(Path(sys.argv[1]))], sys.argv[2], encoder, options)
    (record,) = summary.records
    print(record.status, record.patches, (memory_kib("VmHWM") - model) * 1024, record.reason)
