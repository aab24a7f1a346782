"""A Ray cluster of somebody else, in a process of its own: Serve listens and runs an application named `other`.

It prints the cluster's address. For each line on standard input it prints the names of the applications that run, as a
JSON list. Both lines begin with `MARK`, because Ray may write to standard output too. The cluster ends when standard
input is closed.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

MARK = "other cluster: "
ENVIRONMENT = {
    "RAY_ADDRESS": "",
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",  # a damaged bundle stays damaged, and each start takes seconds
}


class OtherCluster:
    """Handle to the process."""

    def __init__(self, process):
        self._process = process
        self.address = self._line()

    def applications(self):
        """Sorted names of the applications that run now."""
        self._process.stdin.write("applications\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def _line(self):
        for line in self._process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK).strip()
        raise AssertionError("the other cluster has ended")


@contextmanager
def other_cluster(port):
    """A cluster whose Serve listens on `port` of loopback."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(port)], cwd=Path(__file__).parents[2], env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield OtherCluster(process)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


def main(port):
    import ray
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Other:
        async def __call__(self, _):
            return "other"

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    serve.run(Other.bind(), name="other", route_prefix="/other")
    print(MARK + ray.get_runtime_context().gcs_address, flush=True)
    for _ in sys.stdin:
        print(MARK + json.dumps(sorted(serve.status().applications)), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
