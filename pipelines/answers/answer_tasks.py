"""The work of an answers job: each piece of it is done once and leaves a mark.

Tasks write the prompts of the corpus into units of equal size. Actors answer units. An actor works on a few units at a
time, so its slots stay full while the last answers of a unit are generated. Tasks then cut the output's files from the
answers in the order of the prompts. Every file lies in the work folder of the job until the output is complete.
"""

import asyncio
import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.answers.answerer import Answerer, Conversation
from pipelines.answers.job import AnswersJob
from pipelines.answers.prompts import Prompt, prompt_columns, prompt_of
from pipelines.answers.variants import variants_of
from pipelines.packing.answers_manifest import AnswerFile
from pipelines.packing.corpus import Piece, object_entries
from pipelines.packing.skipped_entries import LeftOut
from tidar_core.artifacts.model.bundle import DTYPES, load_for_decoding
from tidar_core.artifacts.model.bundle_info import base_location
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.output_folder import marked, read_mark, write_mark
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.errors import BundleError, TokenizerError
from tidar_core.training.packing import overlapping_spans

__all__ = [
    "AnsweredUnit",
    "FilePlan",
    "PromptUnit",
    "ReadPrompts",
    "UnitAnswers",
    "WorkFolder",
    "plan_files",
    "read_prompts",
    "write_file",
]

A_PROMPT = "a prompt; it needs messages, prompt, question, turns or text, or the column that prompt_field names"
SHOWN_CHARACTERS = 40
"""Characters of a prompt that name it in a report if its entry has no name."""


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Folder that holds the files of a job until the output is complete."""

    uri: str
    unit_bytes: int
    unit_prompts: int

    @property
    def output(self) -> str:
        """Folder that becomes the output."""
        return locations.join(self.uri, "answers")

    @property
    def units(self) -> str:
        """Folder of the units of work; other sizes cut other units."""
        return locations.join(self.uri, f"units-{self.unit_bytes}-{self.unit_prompts}")


@dataclass(frozen=True, slots=True)
class PromptUnit:
    """Consecutive prompts in a file of the work folder."""

    name: str
    prompts: int


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """Outcome of pieces of the corpus whose prompts were written as units."""

    ordinal: int
    units: list[PromptUnit]
    left_out: LeftOut


@dataclass(slots=True)
class Speed:
    """Speed of one actor's decoder."""

    actor: str = field(default_factory=lambda: uuid4().hex)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Add a forward."""
        self.tokens += tokens
        self.seconds += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredUnit:
    """Outcome of a unit whose answers were written."""

    unit: str
    prompts: int
    conversations: int
    """Conversations with an answer."""
    greedy: int
    answers: int
    tokens: int
    finish_reasons: dict[str, int]
    left_out: LeftOut
    unfinished: LeftOut
    speed: Speed | None = None
    """Speed of the actor by now; None if an earlier run of the job answered the unit."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """The conversations that a file of the output holds."""

    file: str
    spans: tuple[tuple[str, int, int], ...]
    """Names of units; the first conversation of each, and the end."""


def read_prompts(item: tuple[int, Sequence[Piece]], job: AnswersJob, folder: WorkFolder) -> ReadPrompts:
    """Write the prompts in some pieces of the corpus, given with their ordinal, as units."""
    ordinal, pieces = item
    left_out = LeftOut()

    def prompts() -> Iterator[Prompt]:
        for entry in (e for piece in pieces for e in object_entries(piece, prompt_columns(job.prompt_field), A_PROMPT)):
            try:
                yield prompt_of(
                    entry.values, field=job.prompt_field, system=job.system, keep_answers=job.given_answers == "keep"
                )
            except RecursionError:
                left_out.add(entry.place, "is nested too deeply to be read; flatten or remove the entry")
            except ValueError as fault:
                left_out.add(entry.place, fault)

    def work() -> ReadPrompts:
        units = []
        for number, batch in enumerate(_in_batches(prompts(), job.unit_prompts)):
            name = f"{ordinal:07d}-{number:05d}"
            content = "".join(prompt.json + "\n" for prompt in batch).encode()
            locations.write_bytes(locations.join(folder.units, f"prompts-{name}.jsonl"), content)
            units.append(PromptUnit(name, len(batch)))
        return ReadPrompts(ordinal, units, left_out)

    return marked(locations.join(folder.units, f"prompts-{ordinal:07d}.json"), ReadPrompts, work)


class UnitAnswers:
    """Answers units in an actor. Units come in at any time and share the slots of one decoder."""

    def __init__(self, job: AnswersJob, folder: WorkFolder, uri: str, model_hash: str) -> None:
        """uri         location of the bundle or checkpoint
        model_hash  hash that it had when the job began
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(job.cpus_per_worker)
        bundle = load_for_decoding(uri, dtype=DTYPES[job.dtype], device="cuda" if job.gpus_per_worker else "cpu")
        if bundle.info.bundle_hash != model_hash:
            raise BundleError(f"{uri} has changed since the job began; start the job again")
        template = load_chat_template(base_location(uri, bundle.info))
        if template is None:
            raise TokenizerError(f"{uri} has no chat template; put chat_template.jinja into its folder")
        self._answerer = Answerer(bundle, template, job, uri=uri)
        self._job, self._folder = job, folder
        self._waiting: list[asyncio.Future[None]] = []
        self._decoding: asyncio.Task[None] | None = None
        self._speed = Speed()

    async def __call__(self, unit: PromptUnit) -> AnsweredUnit:
        """Counts of the unit's answers, which are written into the work folder."""
        mark = locations.join(self._folder.units, f"answers-{unit.name}.json")
        if await asyncio.to_thread(locations.exists, mark):
            return await asyncio.to_thread(read_mark, mark, AnsweredUnit)
        where = locations.join(self._folder.units, f"prompts-{unit.name}.jsonl")
        lines = (await asyncio.to_thread(locations.read_bytes, where)).splitlines()
        conversations = await self._answered([Prompt.from_json(line) for line in lines])
        outcome = await asyncio.to_thread(self._write, unit, conversations, mark)
        return replace(outcome, speed=replace(self._speed))

    async def _answered(self, prompts: Sequence[Prompt]) -> list[Conversation]:
        """The conversations of some prompts in order, each answered to its end."""
        conversations = [
            Conversation(prompt, variant) for prompt in prompts for variant in variants_of(self._job, prompt.key)
        ]
        left = len(conversations)
        all_done = asyncio.get_running_loop().create_future()

        def done(conversation: Conversation) -> None:
            nonlocal left
            left -= 1
            if not left and not all_done.done():
                all_done.set_result(None)

        self._waiting.append(all_done)
        for conversation in conversations:
            self._answerer.submit(conversation, done)
        if not conversations:
            all_done.set_result(None)
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode())
        try:
            await all_done
        finally:
            self._waiting.remove(all_done)
        return conversations

    async def _decode(self) -> None:
        """Run forwards as long as any conversation is open; other units may come in between two forwards."""
        try:
            while self._answerer.busy:
                began = time.perf_counter()
                tokens = self._answerer.advance()
                self._speed.add(tokens, time.perf_counter() - began)
                await asyncio.sleep(0)
        except Exception as error:
            for future in self._waiting:
                if not future.done():
                    future.set_exception(error)

    def _write(self, unit: PromptUnit, conversations: Sequence[Conversation], mark: str) -> AnsweredUnit:
        kept = [conversation for conversation in conversations if _is_answered(conversation)]
        content = "".join(json.dumps(_entry(each), ensure_ascii=False) + "\n" for each in kept).encode()
        locations.write_bytes(locations.join(self._folder.units, f"answers-{unit.name}.jsonl"), content)
        outcome = _outcome(unit, conversations, kept)
        write_mark(mark, outcome)
        return outcome


def plan_files(units: Sequence[tuple[str, int]], job: AnswersJob) -> list[FilePlan]:
    """The files of the output: the conversations of all units in order, so many in each.

    units  name and number of conversations of each unit
    """
    begins = [0]
    for _, conversations in units:
        begins.append(begins[-1] + conversations)
    size = job.entries_per_shard
    plans = []
    for ordinal, begin in enumerate(range(0, begins[-1], size)):
        spans = overlapping_spans(begins, begin, min(begin + size, begins[-1]))
        named = tuple((units[span.part][0], span.start, span.stop) for span in spans)
        plans.append(FilePlan(f"answers-{ordinal:05d}.{job.format}", named))
    return plans


def write_file(plan: FilePlan, folder: WorkFolder) -> AnswerFile:
    """Write one file of the output; returns its entry in the manifest."""

    def work() -> AnswerFile:
        lines: list[bytes] = []
        for unit, start, stop in plan.spans:
            content = locations.read_bytes(locations.join(folder.units, f"answers-{unit}.jsonl"))
            lines += content.splitlines(keepends=True)[start:stop]
        content = b"".join(lines) if plan.file.endswith(".jsonl") else _parquet(lines)
        locations.write_bytes(locations.join(folder.output, plan.file), content)
        return AnswerFile(plan.file, len(lines), len(content), hashlib.sha256(content).hexdigest())

    return marked(locations.join(folder.units, f"{plan.file}.json"), AnswerFile, work)


def _is_answered(conversation: Conversation) -> bool:
    return any("finish_reason" in message for message in conversation.messages)


def _entry(conversation: Conversation) -> dict[str, Any]:
    """A conversation as pack reads it, and how its answers were drawn."""
    prompt, variant = conversation.prompt, conversation.variant
    named = {} if prompt.name is None else {"id": prompt.name}
    tools = {} if prompt.tools is None else {"tools": prompt.tools}
    drawn = {"temperature": variant.temperature, "seed": variant.seed, "tokens": conversation.tokens}
    return named | {"prompt_hash": prompt.key, "messages": conversation.messages} | tools | drawn


def _outcome(unit: PromptUnit, conversations: Sequence[Conversation], kept: Sequence[Conversation]) -> AnsweredUnit:
    left_out, unfinished = LeftOut(), LeftOut()
    for conversation in conversations:
        if conversation.fault is not None:
            counted = unfinished if _is_answered(conversation) else left_out
            counted.add(_namer(conversation.prompt), conversation.fault)
    answers = [answer for conversation in conversations for answer in conversation.answers]
    reasons = Counter("stop_string" if answer.stop_reason else answer.finish_reason for answer in answers)
    return AnsweredUnit(
        unit=unit.name,
        prompts=unit.prompts,
        conversations=len(kept),
        greedy=sum(conversation.variant.temperature == 0 for conversation in kept),
        answers=sum("finish_reason" in message for each in kept for message in each.messages),
        tokens=sum(answer.tokens for answer in answers),
        finish_reasons=dict(sorted(reasons.items())),
        left_out=left_out,
        unfinished=unfinished,
    )


def _namer(prompt: Prompt) -> Callable[[], str]:
    content = " ".join(str(prompt.messages[-1].get("content", "")).split())
    shown = content if len(content) <= SHOWN_CHARACTERS else content[:SHOWN_CHARACTERS] + "..."
    return lambda: f"prompt {prompt.name or repr(shown)}"


def _parquet(lines: Sequence[bytes]) -> bytes:
    """The same entries as Parquet; messages and tools are text of JSON, because their fields differ."""
    entries = [json.loads(line) for line in lines]
    written = [
        entry | {name: json.dumps(entry[name], ensure_ascii=False) for name in ("messages", "tools") if name in entry}
        for entry in entries
    ]
    columns = {"id": pa.string(), "prompt_hash": pa.string(), "messages": pa.string(), "tools": pa.string(),
               "temperature": pa.float64(), "seed": pa.int64(), "tokens": pa.int64()}  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(written, schema=pa.schema(columns.items())), sink, compression="zstd")
    return sink.getvalue()


def _in_batches(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in prompts:
        batch.append(prompt)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
