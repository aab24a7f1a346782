"""Services for tests: on the Ray cluster of the session, or in a process with a Ray of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
from fast_ray_env import python_path
from ports import unused_port

from serve_apps import app
from serve_apps.settings import ServeSettings

ROOT = Path(__file__).parents[2]


@contextmanager
def command(*arguments, **environment):
    """`tidar` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tidar", *map(str, arguments)], cwd=ROOT, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def until_ready(process, port, seconds=180):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    raise AssertionError(f"not ready after {seconds} s")


@contextmanager
def own_service(folder, port, **settings):
    """Address of a service with these settings.

    folder  where the file of settings is written
    """
    file = folder / "serve.yaml"
    file.write_text(json.dumps({"port": port, **settings}))  # JSON is YAML
    environment = {"RAY_ADDRESS": "", "PYTHONPATH": python_path(ROOT, Path(__file__).parent)}
    with command("serve", "--settings", file, **environment) as process:
        until_ready(process, port)
        yield httpx.URL(f"http://127.0.0.1:{port}")


@contextmanager
def running_service(bundle):
    """Base address of a service of `bundle`, with three slots and little room to wait, on the Ray cluster that runs."""
    port = unused_port()
    settings = ServeSettings(
        model=bundle,
        port=port,
        mode="single-pass",
        rows=3,
        max_waiting=4,
        threads=1,
        num_cpus=0.5,
        max_body_bytes=100_000,
        stream_interval_seconds=0,
        vllm_metric_names=True,
    )
    app.run(settings, blocking=False)
    yield f"http://127.0.0.1:{port}"
    app.shutdown()
