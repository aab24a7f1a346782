"""Jobs that are killed while they run."""

import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALL = "import pickle, sys; pickle.load(sys.stdin.buffer)()"


def kill_when(ready, run, job):
    """Calls `run(job)` in a process of its own on the same cluster; SIGKILL as soon as something is ready."""
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen([sys.executable, "-c", CALL], cwd=ROOT, stdin=subprocess.PIPE, env=environment)
    try:
        with process.stdin:
            pickle.dump(partial(run, job), process.stdin)
        while not ready():
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
