"""Freed memory stays in the process for the next call, unless DEEPLABZOO_KEEP_MEMORY=0."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from deeplabzoo.optimization.cpu_runtime import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(6 * 2**20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def kept_and_faults(switch: str) -> tuple[bool, int]:
    """Return whether the allocator was set, and the page faults of 20 tensors of 24 MB, each allocated, written and freed."""
    environment = {**os.environ, "DEEPLABZOO_KEEP_MEMORY": switch, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_freed_memory_is_reused() -> None:
    """Twenty tensors in a row reuse the same pages."""
    kept, faults = kept_and_faults("1")
    assert kept
    assert faults < 6 * 1024  # the pages of one tensor, not of twenty


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_the_allocator_is_unchanged_when_disabled() -> None:
    """A process that shares a machine may need to return memory."""
    kept, _ = kept_and_faults("0")
    assert not kept
