"""Memory of a training process on a CPU."""

import subprocess
import sys

import pytest

STEPS = """
import resource, statistics, sys, torch
from tidar_core.training.host_memory import keep_freed_memory
assert sys.argv[1] == "as it is" or keep_freed_memory()
torch.set_num_threads(1)
faults = []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16, 2**20).add_(1).softmax(-1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median_low(faults[4:]))
"""
"""Two tensors of 64 MiB are made and freed in each step. A kernel may take pages that lie idle in one step or another,
so the median counts."""


def page_faults(how):
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the C library is glibc on Linux")
def test_tensors_of_a_train_step_take_the_memory_that_the_last_step_freed():
    assert page_faults("kept") < page_faults("as it is") / 8
