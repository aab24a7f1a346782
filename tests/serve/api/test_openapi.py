"""Responses of a service follow its OpenAPI document, for valid and invalid requests."""

import subprocess
import sys

import pytest

from serve_apps import app
from serve_apps.settings import ServeSettings

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(ray_cluster, bundle, free_port):
    """Address of a service with a short context, so that each valid request completes soon."""
    settings = ServeSettings(
        model=bundle, port=free_port, mode="single-pass", rows=3, context_len=48, max_waiting=4, threads=1,
        num_cpus=0.5, max_body_bytes=2_000_000, stream_interval_seconds=0, vllm_metric_names=True,
    )  # fmt: skip
    app.run(settings, blocking=False)
    yield f"http://127.0.0.1:{free_port}"
    app.shutdown()


def test_schemathesis_finds_no_response_that_the_document_does_not_describe(service, tmp_path):
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    # A single worker, because hypothesis parses sources and Python 3.11's parser can fail in parallel threads.
    command = ["run", f"{service}/openapi.json", "--checks", f"{checks},negative_data_rejection,unsupported_method",
               "--phases", "coverage", "--seed", "1", "--workers", "1", "--no-color"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", *command],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Traceback" not in done.stdout + done.stderr
