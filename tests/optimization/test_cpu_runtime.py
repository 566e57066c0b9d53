"""Memory that a network frees stays in the process for its next call, and can be told not to."""

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
    """Whether the allocator was set, and page faults of 20 tensors of 24 MB made and freed, each written once."""
    environment = {**os.environ, "DEEPLABZOO_KEEP_MEMORY": switch, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_used_again() -> None:
    """Pages of twenty tensors are faulted in once, not twenty times."""
    kept, faults = kept_and_faults("1")
    assert kept
    assert faults < 6 * 1024  # one tensor's pages at most, instead of twenty's


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_the_allocator_is_left_alone_when_disabled() -> None:
    """A server that shares its process with others may want memory back."""
    kept, _ = kept_and_faults("0")
    assert not kept
