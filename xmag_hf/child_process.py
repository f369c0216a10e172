"""What a process does first that this package starts.

Below all folders of the package; imports `host_memory` only.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading

from xmag_hf.host_memory import keep_freed_memory


def begin_child(threads: int, log_level: int = logging.WARNING) -> None:
    """Settle a spawned process: memory, threads, logging, and its end when its parent ends.

    Args:
        threads: Of torch.
        log_level: Of this package's messages, which go to stderr as in the parent.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    keep_freed_memory()
    end_with_parent()
    torch.set_num_threads(threads)
    disable_progress_bar()  # of weights being loaded: the parent draws the bar
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("xmag_hf").setLevel(log_level)


def end_with_parent() -> None:
    """End this process when its parent ends.

    A killed parent cannot tell its children. They would work on, with nobody to collect it, and
    hold a GPU's memory for ever.
    """
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
