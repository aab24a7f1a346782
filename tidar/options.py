"""Options and arguments that several commands share."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "MODEL",
    "THREADS",
    "TRACKING",
    "BlockLen",
    "DType",
    "Dtype",
    "JobFile",
    "Json",
    "Mode",
    "Model",
    "Threads",
    "Tracking",
    "Weights",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Job file; see infra/jobs.")]
MODEL = "Folder or URI of a bundle or of an AR checkpoint in Hugging Face's format, or models:/NAME@ALIAS."
Model = Annotated[str, typer.Argument(help=MODEL)]
Tracking = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server or SQLite file.")]
MOST_THREADS = 1024
"""More threads than any machine has cores for; tens of thousands end torch in a segmentation fault."""
MOST_TOGETHER = 2**14
"""Most sequences of one batch."""
THREADS = max(1, (os.cpu_count() or 1) - 1)
"""CPU threads by default. A service's proxy and ingress need a core, and a decode step waits for a thread that shares
its core. All commands have this default, because `tidar serve` looks for a latency table of as many threads."""
Threads = Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads; all cores but one by default.")]
BlockLen = Annotated[int | None, typer.Option(min=1, help="Draft block; by default that of the training.")]
TRACKING = "sqlite:///mlflow.db"


class DType(StrEnum):
    """Type of weights and arithmetic; only in fp32 are texts compared exactly."""

    fp32 = "fp32"
    bf16 = "bf16"


Dtype = Annotated[DType, typer.Option(help="Type of weights and arithmetic.")]


class WeightBits(StrEnum):
    """Bits of the weights of linear maps, which are rounded at load; on a CPU alone."""

    int8 = "int8"
    int4 = "int4"


Weights = Annotated[WeightBits | None, typer.Option(help="Round weights at load, on a CPU; by default they stay.")]


class Mode(StrEnum):
    """How a model decodes; `auto` measures this machine first, then picks the fastest for each step."""

    auto = "auto"
    single_pass = "single-pass"
    two_pass = "two-pass"
    autoregressive = "autoregressive"
