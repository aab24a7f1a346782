"""Commands that run a stage of the pipeline from its job file."""

from typing import Annotated

import typer

from tidar.options import JobFile, Json
from tidar.output import print_facts

__all__ = ["answers", "evaluate", "pack", "publish", "train"]


def answers(job: JobFile, as_json: Json = False) -> None:
    """Let a model answer prompts: conversations in its own words, for pack."""
    from dataclasses import asdict

    from pipelines.answers.answer import answer
    from pipelines.answers.job import AnswersJob
    from pipelines.jobs import read_job

    parsed = read_job(AnswersJob, job)
    facts = asdict(answer(parsed))
    print_facts({"output": parsed.output} | {name: facts[name] for name in facts if name != "files"}, as_json)


def pack(job: JobFile, as_json: Json = False) -> None:
    """Tokenize and pack a corpus into shards."""
    from pipelines.jobs import PackJob, read_job
    from pipelines.packing import pack as stage

    manifest = stage.pack(read_job(PackJob, job))
    splits = {
        name: {"documents": s.documents, "tokens": s.tokens, "rows": s.rows} for name, s in manifest.splits.items()
    }
    print_facts(
        {"row_len": manifest.row_len, "vocab_len": manifest.vocab_len, "identity": manifest.identity} | splits, as_json
    )


def train(
    job: JobFile,
    dry_run: Annotated[bool, typer.Option(help="Print what it would do, and whether it can.")] = False,
    as_json: Json = False,
) -> None:
    """Train on packed shards, or continue a stopped run; ends with a bundle."""
    from pipelines.jobs import TrainJob, read_job

    parsed = read_job(TrainJob, job)
    if dry_run:
        from pipelines.training.dry_run import dry_run as dry_run_facts

        return print_facts(dry_run_facts(parsed), as_json)
    from pipelines.training import train as stage

    info = stage.train(parsed)
    return print_facts({"bundle": parsed.output, "bundle_hash": info.bundle_hash, "block_len": info.block_len}, as_json)


def evaluate(job: JobFile, as_json: Json = False) -> None:
    """Measure a bundle or an AR checkpoint on held-out rows and prompts; ends with a report."""
    from pipelines.evaluation import evaluate as stage
    from pipelines.evaluation.job import EvaluateJob
    from pipelines.jobs import read_job

    print_facts(stage.evaluate(read_job(EvaluateJob, job)), as_json)


def publish(job: JobFile, as_json: Json = False) -> None:
    """Register a bundle whose report meets every bar; it becomes the challenger."""
    from pipelines.evaluation import publish as stage
    from pipelines.evaluation.job import PublishJob
    from pipelines.jobs import read_job

    parsed = read_job(PublishJob, job)
    print_facts({"name": parsed.name, "registry_version": stage.publish(parsed), "alias": "challenger"}, as_json)
