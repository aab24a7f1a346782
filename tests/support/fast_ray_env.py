"""Environment variables that make processes of tests start sooner, and Ray take less time beside them."""

import os
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"
"""Folder of the module that each Python process loads first."""

FAST_RAY_ENV = {
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled on a CPU, but DeepSpeed's optimizers would load the compiler
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # delay until the end or death of a worker is noticed
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # time between a node's reports of its load, which no test reads
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the handling of preempted cloud nodes costs a process of its own
}
"""Variables for the environment of a cluster or a command."""


def python_path(*folders):
    """PYTHONPATH of these folders, and of the module that makes Python processes start sooner."""
    return os.pathsep.join(map(str, (*folders, STARTUP)))
