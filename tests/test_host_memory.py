"""Freed memory is kept: counted in page faults, which the kernel counts, not in seconds."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from xmag_hf.host_memory import keep_freed_memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="malloc of another C library"
)

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Twenty times a block of 64 MiB, written and freed.
PAGES = 2**26 // resource.getpagesize()
COUNT_FAULTS = """
import resource, sys
from xmag_hf.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
import numpy as np
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**23)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    # numpy asks for huge pages of its own accord, which would hide the faults that are counted.
    plain |= {"NUMPY_MADVISE_HUGEPAGE": "0"} | environment
    run = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, how], env=plain, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    kept, count = run.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(
    THP.exists() and "[always]" in THP.read_text(), reason="huge pages: hardly any fault to count"
)
def test_a_freed_block_is_used_again_without_a_page_fault():
    kept, with_keeping = faults("keep")
    _, without = faults("leave")
    assert kept == "True"
    assert without >= 20 * PAGES
    assert with_keeping < PAGES


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_MMAP_MAX_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
)
def test_the_environments_word_on_malloc_stands(environment):
    assert faults("keep", **environment)[0] == "False"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    assert keep_freed_memory() is False
