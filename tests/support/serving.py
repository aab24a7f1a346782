"""A service in a process of its own, with a Ray of its own, as `tidar serve` starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

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
    environment = {"RAY_ADDRESS": "", "PYTHONPATH": str(ROOT)}
    with command("serve", "--settings", file, **environment) as process:
        until_ready(process, port)
        yield httpx.URL(f"http://127.0.0.1:{port}")
