"""A Ray head by `ray start --head` for the tests of this folder alone, and commands against it."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from fast_ray_env import FAST_RAY_ENV
from ports import unused_port

from serve_apps.shared_cluster import PATIENT_START_ENV

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 90


@dataclass(frozen=True)
class Head:
    """A running head: the address of its dashboard, and the environment with its token."""

    address: str
    env: dict[str, str]
    temp: Path

    def command(self, *arguments, seconds=240):
        """Run a program of the virtual environment against the head, from the root of the repository."""
        program, *rest = arguments
        return subprocess.run(
            [BIN / program, *rest], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=seconds, check=False
        )


@pytest.fixture(scope="module")
def head():
    """`ray start --head` on loopback with free ports, a token and a folder of its own. SIGTERM ends it."""
    with tempfile.TemporaryDirectory(prefix="tidar-head-") as folder:  # pytest's own paths are too long for sockets
        dashboard, agent = unused_port(), unused_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",  # for `ray job`
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",  # for `serve`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_prestart_worker_first_driver": "0",  # every job's workers have its own environment
            **PATIENT_START_ENV,  # as the manifests give it to every node
            **FAST_RAY_ENV,
        }
        with open(Path(folder) / "head.log", "wb") as log:
            process = subprocess.Popen(_start(folder, dashboard, agent), env=env, stdout=log, stderr=log, cwd=folder)
        try:
            urls = (f"{env['RAY_API_SERVER_ADDRESS']}/api/jobs/", f"http://127.0.0.1:{agent}/api/local_raylet_healthz")
            _wait_until_up(urls, env, process, Path(folder) / "head.log")
            yield Head(env["RAY_API_SERVER_ADDRESS"], env, Path(folder))
        finally:
            process.send_signal(signal.SIGTERM)  # with --block it ends its children
            process.wait(timeout=60)


def _start(folder, dashboard, agent):
    ports = {
        name: unused_port()
        for name in ("port", "ray-client-server-port", "dashboard-agent-grpc-port", "metrics-export-port",
                     "node-manager-port", "object-manager-port")
    }  # fmt: skip
    return [
        BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}",
        "--num-cpus=3", f"--object-store-memory={200 * 2**20}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip


def _wait_until_up(urls, env, process, log):
    """Wait for the dashboard, which accepts jobs, and the node's agent, which starts them."""
    deadline = time.monotonic() + START_SECONDS
    waiting = [
        urllib.request.Request(url, headers={"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"}) for url in urls
    ]
    while waiting:
        try:
            with urllib.request.urlopen(waiting[0], timeout=5):
                waiting.pop(0)
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
