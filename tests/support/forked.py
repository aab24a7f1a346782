"""Processes forked from a server that has loaded the heavy libraries, so that each starts at once."""

import multiprocessing
import os

PRELOADED = [
    "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "pipelines.training.train_worker", "pandas",
    "pyarrow.dataset", "pyarrow.parquet", "tidar_core.decoding.completion", "tidar",
]  # fmt: skip
"""Modules that the processes would load otherwise, at their start or later. They start no thread. Ray is not among
them: when it is loaded, it reads the authentication mode of a cluster, which may start later."""


def forked(function, *arguments, **changes):
    """A started process that calls `function(*arguments)` in the environment of this process.

    changes  environment variables with other values
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_call, args=(dict(os.environ) | changes, function, arguments))
    process.start()
    return process


def _call(environment, function, arguments):
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)
