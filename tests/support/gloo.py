"""Training workers without Ray: processes that connect over gloo and run jobs one after another.

The workers are forked, so that a group costs a second and not half a minute.
"""

import gc
import itertools
import json
import os
import signal
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

from fast_ray_env import FAST_RAY_ENV
from forked import forked
from ports import unused_port


def start_workers(world_size, jobs, logs, *, dies_in_forward=None, spoiled=None):
    """Starts a group of workers and returns its processes.

    logs             folder for each job's metrics, in files with the name of its output
    dies_in_forward  ordinal of the forward in whose middle SIGKILL ends the last worker
    spoiled          name of a job's output -> (`loss` or `gradient`, first, last): the last worker makes it nan in
                     forwards with these ordinals
    """
    port = unused_port()
    Path(logs).mkdir(parents=True, exist_ok=True)
    values = [job.model_dump(mode="json") for job in jobs]
    return [
        forked(_work, rank, world_size, port, values, str(logs), dies_in_forward, spoiled or {}, **FAST_RAY_ENV)
        for rank in range(world_size)
    ]


def train_on(world_size, jobs, logs, spoiled=None):
    """Runs the jobs to their ends on `world_size` workers."""
    assert exit_codes(start_workers(world_size, jobs, logs, spoiled=spoiled)) == [0] * world_size


def exit_codes(processes):
    """Exit codes of a group after its end; if a process fails, the others would wait for it, so they are killed."""
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
    return [process.exitcode for process in processes]


def logged(logs, job):
    """Everything that was logged of a job, as (train step, metrics), in order."""
    path = Path(logs) / (Path(job.output).name + ".jsonl")
    return [(entry["step"], entry["metrics"]) for entry in map(json.loads, path.read_text().splitlines())]


def end_of(logs, job, workers):
    """Each worker's error message about a run that diverged; an empty list if the run did not diverge."""
    path = Path(logs) / Path(job.output).name
    found = [path.with_suffix(f".error-{rank}") for rank in range(workers)]
    return [file.read_text() for file in found if file.exists()]


def curve(logs, job, metric="ar_loss"):
    """Train step -> a metric's value."""
    return {step: metrics[metric] for step, metrics in logged(logs, job) if metric in metrics}


def _die_in_forward(ordinal):
    """Sends SIGKILL to this process inside forward `ordinal` of the model, after the first attention layer."""
    from torch.nn.modules.module import register_module_forward_hook

    from tidar_core.transformer.model import SelfAttention

    count = itertools.count(1)

    def hook(module, *_):
        if isinstance(module, SelfAttention) and module.index == 0 and next(count) == ordinal:
            os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_hook(hook)


@contextmanager
def _spoiling(kind, first, last):
    """Makes the output of the first attention layer nan, or its gradient, in forwards `first` to `last`."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    from tidar_core.transformer.model import SelfAttention

    count = itertools.count(1)

    def hook(module, _, output):
        if not isinstance(module, SelfAttention) or module.index or not first <= next(count) <= last:
            return None
        if kind == "gradient" and torch.is_grad_enabled():
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output if kind == "gradient" else output * float("nan")

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _work(rank, world_size, port, jobs, logs, dies_in_forward, spoiled):
    warnings.simplefilter("ignore")
    gc.freeze()  # DeepSpeed collects garbage for every engine, and all that was preloaded would be looked through
    if dies_in_forward is not None and rank == world_size - 1:
        _die_in_forward(dies_in_forward)
    import torch.distributed as dist

    from pipelines.jobs import TrainJob
    from pipelines.training.train_worker import Surroundings, train_worker
    from tidar_core.errors import DivergedError

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
    }  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for job in map(TrainJob.model_validate, jobs):
        path = Path(logs) / Path(job.output).name

        def log(metrics, step, path=path):
            with path.with_suffix(".jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "metrics": metrics}) + "\n")

        def keep_text(name, text, path=path):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)

        bad = spoiled.get(path.name) if rank == world_size - 1 else None
        try:
            with _spoiling(*bad) if bad else nullcontext():
                train_worker(job, Surroundings(rank=rank, world_size=world_size, log=log, keep_text=keep_text))
        except DivergedError as error:
            path.with_suffix(f".error-{rank}").write_text(str(error))
    dist.destroy_process_group()
