"""Tasks of the paper: their settings, and the place of their questions.

There are twelve tasks (TiDAR, table 6): six are texts (table 2), six are choices by likelihood (table 3). Prompts,
few-shot examples, filters and metrics are lm-eval's own. This module fixes the choices that lm-eval leaves open: the
data lie on disk, and programs run in the sandbox. Any other task is an lm-eval YAML file, given by its path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.evaluation.job import TaskJob
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.compressed import damage_named, damaged, open_decompressed
from tidar_core.artifacts.store.file_names import compression_of, format_of
from tidar_core.artifacts.store.json_lines import is_blank, value_in
from tidar_core.errors import ConfigError

__all__ = ["PAPER_TASKS", "TABLE_2", "TABLE_3", "PaperTask", "check_tasks", "program", "read_entries"]

JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperTask:
    """A task of the paper, and its files in lm-eval."""

    title: str
    data: str
    """Name of the data set on the Hugging Face hub."""
    files: str
    """lm-eval's task files, a pattern below its folder of tasks."""
    metric: str
    """Metric and filter that the paper reports."""
    shots: int
    max_tokens: int | None = None
    """Most new tokens; None: nothing is generated."""
    runs_code: bool = False
    """Whether its answers are programs."""


PAPER_TASKS = {
    "humaneval": PaperTask(
        title="HumanEval", data="openai/openai_humaneval", files="humaneval/humaneval.yaml", metric="pass@1,none",
        shots=0, max_tokens=512, runs_code=True,
    ),
    "humaneval_plus": PaperTask(
        title="HumanEval+", data="evalplus/humanevalplus", files="humaneval/humaneval_plus.yaml", metric="pass@1,none",
        shots=0, max_tokens=512, runs_code=True,
    ),
    "mbpp": PaperTask(
        title="MBPP", data="google-research-datasets/mbpp", files="mbpp/mbpp.yaml", metric="pass@1,none", shots=3,
        max_tokens=512, runs_code=True,
    ),
    "mbpp_plus": PaperTask(
        title="MBPP+", data="evalplus/mbppplus", files="mbpp/mbpp_plus.yaml", metric="pass@1,none", shots=3,
        max_tokens=512, runs_code=True,
    ),
    "gsm8k": PaperTask(
        title="GSM8K", data="openai/gsm8k", files="gsm8k/gsm8k-cot.yaml", metric="exact_match,strict-match", shots=8,
        max_tokens=256,
    ),
    "minerva_math": PaperTask(
        title="Minerva Math", data="EleutherAI/hendrycks_math", files="minerva_math/minerva_math_*.yaml",
        metric="exact_match,none", shots=4, max_tokens=512,
    ),
    "mmlu": PaperTask(title="MMLU", data="cais/mmlu", files="mmlu/default/mmlu_*.yaml", metric="acc,none", shots=5),
    "arc_easy": PaperTask(
        title="ARC-e", data="allenai/ai2_arc", files="arc/arc_easy.yaml", metric="acc,none", shots=0
    ),
    "arc_challenge": PaperTask(
        title="ARC-c", data="allenai/ai2_arc", files="arc/arc_challenge.yaml", metric="acc_norm,none", shots=0
    ),
    "hellaswag": PaperTask(
        title="HellaSwag", data="Rowan/hellaswag", files="hellaswag/hellaswag.yaml", metric="acc_norm,none", shots=0
    ),
    "piqa": PaperTask(title="PIQA", data="baber/piqa", files="piqa/piqa.yaml", metric="acc_norm,none", shots=0),
    "winogrande": PaperTask(
        title="Winogrande", data="allenai/winogrande", files="winogrande/default.yaml", metric="acc,none", shots=5
    ),
}  # fmt: skip
"""Tasks of the paper by lm-eval's names."""
TABLE_2 = tuple(name for name, task in PAPER_TASKS.items() if task.max_tokens)
TABLE_3 = tuple(name for name, task in PAPER_TASKS.items() if not task.max_tokens)


def check_tasks(tasks: Sequence[TaskJob], *, allow_code_execution: bool) -> None:
    """Raise ConfigError for tasks that are unknown, lack their data, or would run programs without permission."""
    wrong = [line for task in tasks for line in _wrong(task, allow_code_execution)]
    if wrong:
        raise ConfigError("; ".join(wrong))


def _wrong(job: TaskJob, allow_code_execution: bool) -> Iterator[str]:
    known = PAPER_TASKS.get(job.task)
    if known is None and not job.task.endswith(".yaml"):
        yield f"task {job.task!r} is unknown; give one of {', '.join(PAPER_TASKS)}, or the path of an lm-eval YAML file"
    elif known is None and ((path := locations.local_path(job.task)) is None or not path.is_file()):
        yield f"task file {job.task} is not on this disk; give the path of an lm-eval YAML file"
    if known is not None and job.data is None:
        yield f"task {job.task} has no data; give the path of a copy of the data set {known.data}, or of a JSONL file"
    elif job.data is not None and not locations.exists(job.data):
        source = f"a copy of the data set {known.data} or a JSONL file" if known else "a JSONL file or a folder"
        yield f"data of task {job.task}: {job.data} does not exist; put {source} there"
    if known is not None and known.runs_code and not allow_code_execution:
        yield f"task {job.task} runs programs that the model wrote; set allow_code_execution: true, or leave it out"


def read_entries(uri: str) -> list[dict[str, Any]] | None:
    """Entries of a JSON lines file, compressed (.gz, .zst) or not, or of a Parquet file; None for a folder."""
    kind = format_of(uri)
    if kind == ".parquet" and not compression_of(uri):
        return _parquet_entries(uri)
    if kind not in JSON_LINES:
        return None
    entries = []
    with damage_named(uri), open_decompressed(uri) as lines:
        for number, line in enumerate(lines, 1):
            if not is_blank(line):
                try:
                    entries.append(value_in(line))
                except ValueError as fault:
                    raise ConfigError(f"{uri} line {number} {fault}") from None
    if not entries:
        raise ConfigError(f"{uri} has no rows; give one JSON object a line")
    return entries


def program(doc: dict[str, Any], completion: str) -> str:
    """The source that passes if `completion` answers an entry of HumanEval or MBPP.

    MBPP+ is checked by the assertions of `test_list`, as in lm-eval and so in the paper; EvalPlus's tests are not run.
    """
    if "entry_point" in doc:
        return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    before = [*doc.get("test_imports", ()), doc.get("test_setup_code") or ""]
    return "\n".join([*before, completion, *doc["test_list"]]) + "\n"


def _parquet_entries(uri: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with damage_named(uri), locations.open_random(uri) as file:
        try:
            return pq.read_table(file).to_pylist()
        except pa.ArrowException as error:
            raise damaged(uri, error) from error
