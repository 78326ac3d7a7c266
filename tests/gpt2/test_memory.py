"""Memory that was freed is used again without a page fault."""

import ctypes
import resource

import pytest
import torch

from gpt2.memory import keep_freed


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_tensor_takes_the_memory_of_the_one_before():
    keep_freed()
    torch.ones(2**24).sum()  # 64 MiB, twice what malloc would keep by itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2**14 / 10
