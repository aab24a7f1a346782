"""An answers job from prompts to a folder that pack reads: the same on any number of actors, and after a kill."""

import asyncio
import hashlib
import json
import shutil

import pyarrow.parquet as pq
import pytest
from answering import QUESTIONS, answers_job, conversations_of, save_chat_bundle, write_prompts
from killed_jobs import kill_when

from pipelines.answers.answer import answer
from pipelines.answers.answer_tasks import FilePlan, PromptUnit, UnitAnswers, WorkFolder, plan_files, write_file
from pipelines.answers.answerer import Answerer, Conversation
from pipelines.answers.prompts import Prompt
from pipelines.answers.variants import variants_of
from pipelines.jobs import Source
from pipelines.packing import corpus
from pipelines.packing.answers_manifest import read_manifest
from pipelines.packing.pack_tasks import Tokenizing, Unit, keep_tokenizer, tokenize_unit
from pipelines.packing.pack_tasks import WorkFolder as PackFolder
from pipelines.packing.token_parts import read_part
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.chat_tokens import encode_chat
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import ConfigError, CorpusError, TidarError

ENTRIES = [*QUESTIONS, {"id": "several", "turns": ["Name it.", "And then?", "Why?"]}, {"no": "prompt"}, "x" * 600]
MIXED = {"greedy": 0.5, "sampled": 0.75}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a bundle that chats."""
    return save_chat_bundle(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of 13 prompts, an entry without one, and a prompt that is too long."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", ENTRIES)


@pytest.fixture(scope="module")
def whole(ray_cluster, tmp_path_factory, model, prompts):
    """The output of one worker that answers three prompts at a time."""
    output = tmp_path_factory.mktemp("answers") / "out"
    answer(answers_job(prompts, output, model, **MIXED))
    return output


def in_this_process(model, job, prompts):
    """Conversations of the prompts in order, answered by one decoder one after another."""
    answerer = Answerer(load_bundle(model), load_chat_template(model), job, uri=model)
    conversations = [Conversation(prompt, variant) for prompt in prompts for variant in variants_of(job, prompt.key)]
    for conversation in conversations:
        answerer.submit(conversation, lambda done: None)
        while answerer.busy:
            answerer.advance()
    return [conversation.messages for conversation in conversations if conversation.answers]


def test_an_output_holds_the_answers_to_all_prompts_in_their_order_and_counts_the_rest(whole, model, prompts):
    job = answers_job(prompts, whole, model, **MIXED)
    expected_prompts = [Prompt([{"content": text, "role": "user"}]) for text in QUESTIONS]
    expected_prompts.append(Prompt([{"content": text, "role": "user"} for text in ENTRIES[12]["turns"]]))
    expected = in_this_process(model, job, expected_prompts)
    entries = conversations_of(whole)
    assert [entry["messages"] for entry in entries] == expected
    assert {entry.get("id") for entry in entries} == {None, "several"}
    manifest = read_manifest(str(whole))
    answers = [m for entry in entries for m in entry["messages"] if m["role"] == "assistant"]
    assert (manifest.prompts, manifest.conversations, manifest.answers) == (14, len(expected), len(answers))
    assert manifest.greedy == sum(entry["temperature"] == 0 for entry in entries)
    assert 0 < manifest.greedy < len(entries)
    assert manifest.tokens == sum(entry["tokens"] for entry in entries)
    assert sum(manifest.finish_reasons.values()) == len(answers)
    assert manifest.left_out == 1 + len(variants_of(job, Prompt([{"content": "x" * 600, "role": "user"}]).key))
    assert manifest.named[0].endswith("set prompt_field to the key of it")
    assert manifest.model == load_bundle(model).info.bundle_hash
    for entry in manifest.files:
        assert hashlib.sha256((whole / entry.file).read_bytes()).hexdigest() == entry.sha256
    made_by = json.loads((whole / "made_by.json").read_text())
    assert made_by["job"] == job.model_dump(mode="json")
    assert made_by["parents"]["model"] == manifest.model


def test_a_killed_job_keeps_its_finished_units_and_ends_with_the_bytes_of_one_worker_and_another_batch(
    whole, model, prompts, tmp_path
):
    job = answers_job(prompts, tmp_path / "out", model, **MIXED, workers=3, batch=1, unit_prompts=1)
    kill_when(
        lambda: len(list(tmp_path.glob(".out.*/units-*/answers-*-*.json"))) >= 3,
        answer,
        job.model_copy(update={"workers": 1}),
    )
    marks = {path.name: path.stat() for path in tmp_path.glob(".out.*/units-*/answers-*-*.json")}
    assert 3 <= len(marks) < 14
    name = min(marks)
    (marked,) = tmp_path.glob(f".out.*/units-*/{name[: -len('.json')]}.jsonl")
    marked.write_text(marked.read_text().replace('"seed"', '"SEED"'))  # whoever answers it again repairs it
    answer(job)  # one more worker than the cluster has CPUs
    written = (whole / "answers-00000.jsonl").read_text()
    again = (tmp_path / "out/answers-00000.jsonl").read_text()
    assert again != written
    assert again.replace('"SEED"', '"seed"') == written
    assert read_manifest(str(tmp_path / "out")).identity == read_manifest(str(whole)).identity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_same_job_once_more_answers_nothing_and_a_changed_one_begins_anew(whole, model, prompts, monkeypatch):
    before = (whole / "answers.json").stat().st_mtime_ns
    monkeypatch.setattr("pipelines.answers.answer._answered", None)
    job = answers_job(prompts, whole, model, **MIXED)
    assert answer(job.model_copy(update={"batch": 7, "workers": 3})) == read_manifest(str(whole))
    assert (whole / "answers.json").stat().st_mtime_ns == before
    with pytest.raises(TypeError):
        answer(job.model_copy(update={"seed": 1}))


def test_prompts_without_a_usable_entry_or_with_a_damaged_line_are_refused_and_leave_nothing(
    ray_cluster, model, tmp_path
):
    bad = write_prompts(tmp_path / "bad.jsonl", [{"no": 1}, {"no": 2}, {"no": 3}, {"no": 4}, {"no": 5}])
    with pytest.raises(CorpusError, match=r"can be answered: line 1 of .*; and 2 more; change them") as caught:
        answer(answers_job(bad, tmp_path / "out", model))
    assert "\n" not in str(caught.value)
    for content, words in (
        ('{"prompt": "a"}\n{"prompt": \n', r"line 2 of .*bad.jsonl is not JSON"),
        ("\n \n", "can be answered: all lines are blank; change them"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(CorpusError, match=words) as caught:
            answer(answers_job(bad, tmp_path / "out", model))
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("needed", [{"cpus_per_worker": 99}, {"gpus_per_worker": 1}])
def test_a_worker_that_no_machine_can_hold_is_refused_instead_of_waiting(ray_cluster, model, prompts, tmp_path, needed):
    ((key, value),) = needed.items()
    with pytest.raises(ConfigError, match=f"{key} is {value}; this machine has . .PUs for Ray; lower {key}"):
        answer(answers_job(prompts, tmp_path / "out", model, **needed))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"prompts": "p.txt"}, "p.txt is neither JSON lines nor Parquet"),
        ({"prompts": "empty"}, "holds no text in files named"),
        ({"model": "p.jsonl"}, "p.jsonl"),
        ({"model": "bare"}, "bare has no chat template, so it knows no conversations"),
        ({"model": "checkpoint", "mode": "two-pass"}, "mode is two-pass and the model does not draft"),
        ({"output": "empty/.."}, "holds no answers.json, so it was not made by this command"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_leaves_nothing(model, tmp_path, given, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("text")
    write_prompts("p.jsonl", QUESTIONS)
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    shutil.copytree(model, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("tidar.json"))
    before = sorted(tmp_path.rglob("*"))
    values = {"prompts": "p.jsonl", "output": "out", "model": model} | given
    with pytest.raises(TidarError, match=words) as caught:
        answer(answers_job(**values))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def answered_unit(tmp_path, model, **changes):
    """The work folder and job of one unit that was answered in this process."""
    job = answers_job("p", tmp_path / "out", model, **(MIXED | changes))
    folder = WorkFolder(str(tmp_path / "work"), 100, 4)
    prompts = [
        Prompt([{"content": text, "role": "user"} for text in (question, "And then?")]) for question in QUESTIONS
    ]
    content = "".join(prompt.json + "\n" for prompt in prompts).encode()
    locations.write_bytes(f"{folder.units}/prompts-a.jsonl", content)
    work = UnitAnswers(job, folder, model, load_bundle(model).info.bundle_hash)
    outcome = asyncio.run(work(PromptUnit("a", len(prompts))))
    return job, folder, outcome


def test_pack_trains_the_tokens_of_the_answers_and_the_ends_that_the_model_chose(tmp_path, model):
    job, folder, outcome = answered_unit(tmp_path, model)
    (plan,) = plan_files([("a", outcome.conversations)], job)
    write_file(plan, folder)
    tokenizer, template = load_tokenizer(model), load_chat_template(model)
    pack_folder = PackFolder(str(tmp_path / "pack"), 100)
    keep_tokenizer(lambda: tokenizer, pack_folder)
    source = Source(path=folder.output, documents="conversations", text_field="text")
    pieces = tuple(
        p for unit in corpus.work_units(corpus.list_corpus(folder.output, ("*.jsonl",)), 2**20) for p in unit
    )
    tokenized = tokenize_unit(Unit(0, 0, pieces), Tokenizing(pack_folder, (source,), 0.0, 0, flags=True))
    assert tokenized.left_out.rows == 0
    (part,) = tokenized.parts
    tokens = read_part(locations.join(pack_folder.units, part.file))
    documents = tokens.tokens_T.split(tokens.document_len_N.tolist())
    flags = tokens.trained_T.split(tokens.document_len_N.tolist())
    entries = conversations_of(folder.output)
    assert len(documents) == len(entries)
    end = tokenizer.encode_with_special("<|im_end|>\n")
    reasons = set()
    for entry, ids, trained in zip(entries, documents, flags):
        expected = []
        for place, message in enumerate(entry["messages"]):
            if message["role"] == "assistant":
                reasons.add(message["finish_reason"])
                before = encode_chat(template, tokenizer, entry["messages"][:place])
                expected += [
                    (len(before), tokenizer.encode(message["content"]) + end * (message["finish_reason"] == "stop"))
                ]
        ended = entry["messages"][-1]["finish_reason"] == "stop"  # then the end-of-text token is trained as well
        assert trained.sum() == sum(len(written) for _, written in expected) + ended
        for begin, written in expected:
            assert ids[begin : begin + len(written)].tolist() == written
            assert trained[begin : begin + len(written)].all()
    assert reasons == {"stop", "length"}


def test_parquet_holds_the_conversations_of_json_lines(tmp_path, model):
    job, folder, outcome = answered_unit(tmp_path, model, format="parquet")
    (plan,) = plan_files([("a", outcome.conversations)], job)
    write_file(plan, folder)
    write_file(FilePlan("answers-00000.jsonl", plan.spans), folder)
    source = Source(path="", documents="conversations", text_field="text")
    read = {
        suffix: list(
            corpus.documents(
                corpus.Piece(f"{folder.output}/answers-00000.{suffix}", 0, 2**20, whole=True), source, pytest.fail
            )
        )
        for suffix in ("jsonl", "parquet")
    }
    assert read["parquet"] == read["jsonl"]
    assert len(read["jsonl"]) == outcome.conversations
    drawn = pq.read_table(f"{folder.output}/answers-00000.parquet", columns=["temperature", "seed"]).to_pylist()
    assert drawn == [
        {name: entry[name] for name in ("temperature", "seed")} for entry in conversations_of(folder.output)
    ]


def test_files_hold_equally_many_conversations_wherever_units_end():
    job = answers_job("p", "o", "m", entries_per_shard=4)
    plans = plan_files([("a", 3), ("b", 0), ("c", 6), ("d", 1)], job)
    assert [plan.spans for plan in plans] == [(("a", 0, 3), ("c", 0, 1)), (("c", 1, 5),), (("c", 5, 6), ("d", 0, 1))]
    assert [plan.file for plan in plans] == [f"answers-0000{n}.jsonl" for n in range(3)]


def test_units_in_one_actor_share_its_decoder_and_a_failed_forward_ends_all_of_them(tmp_path, model, monkeypatch):
    job = answers_job("p", tmp_path / "out", model, batch=8)
    folder = WorkFolder(str(tmp_path / "work"), 100, 1)
    units = [PromptUnit(str(place), 1) for place in range(6)]
    for unit, question in zip(units, QUESTIONS):
        line = Prompt([{"content": question, "role": "user"}]).json + "\n"
        locations.write_bytes(f"{folder.units}/prompts-{unit.name}.jsonl", line.encode())
    work = UnitAnswers(job, folder, model, load_bundle(model).info.bundle_hash)
    most = 0
    plain = Answerer.advance

    def watched(answerer):
        nonlocal most
        most = max(most, answerer._scheduler.taken_slots)
        return plain(answerer)

    async def all_units():
        return await asyncio.gather(*map(work, units), return_exceptions=True)

    monkeypatch.setattr(Answerer, "advance", watched)
    outcomes = asyncio.run(all_units())
    assert [outcome.unit for outcome in outcomes] == [unit.name for unit in units]
    assert most > 1
    for path in (tmp_path / "work").rglob("answers-*"):
        path.unlink()

    def failing(answerer):
        raise MemoryError("the device is full")

    monkeypatch.setattr(Answerer, "advance", failing)
    assert [type(outcome) for outcome in asyncio.run(all_units())] == [MemoryError] * len(units)
    assert not list((tmp_path / "work").rglob("answers-*"))


def test_a_model_that_changed_since_the_job_began_is_refused(tmp_path, model):
    with pytest.raises(TidarError, match="has changed since the job began"):
        UnitAnswers(answers_job("p", "o", model), WorkFolder(str(tmp_path), 1, 1), model, "another hash")
