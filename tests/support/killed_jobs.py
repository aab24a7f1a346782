"""Jobs that are killed while they run."""

import time

from forked import forked


def kill_when(ready, run, job):
    """Calls `run(job)` in a process of its own on the same cluster; SIGKILL as soon as something is ready."""
    import ray

    process = forked(run, job, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    try:
        while not ready():
            assert process.is_alive(), "the job ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
