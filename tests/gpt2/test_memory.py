"""Memory that was freed is used again without a page fault."""

import ctypes
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FAULTS = """
import resource, torch
from gpt2.memory import keep_freed
keep_freed()
torch.ones(2**24).sum()  # 64 MiB, twice what malloc would keep by itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_tensor_takes_the_memory_of_the_one_before():
    """In a process of its own, as a run is: this one's memory has been cut to pieces by other tests."""
    found = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2**14 / 10
