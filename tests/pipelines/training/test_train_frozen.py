"""Drafts of a frozen checkpoint: nothing of it changes at any ZeRO stage, and a stopped run goes on exactly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from decoding import GREEDY, expected_texts, requests
from gloo import curve, train_on
from hf_folders import save_checkpoint, their_text
from tiny import save_tiny_shards

from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import read_part, whole_checkpoints
from pipelines.training.continuations import held_out_prompts, tokens_per_forward
from pipelines.training.dry_run import dry_run
from pipelines.training.train_start import check_start
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.bundle_info import model_info, read_bundle_info
from tidar_core.artifacts.model.drafts_file import DRAFTS
from tidar_core.artifacts.shards import ShardReader, read_manifest
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.config import DraftConfig
from tidar_core.decoding.autoregressive import score
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.errors import BundleError, ConfigError
from tidar_core.transformer.draft_adapter import DRAFT_WEIGHTS

pytestmark = pytest.mark.slow
STAGES = (1, 2, 3)
STEPS, STOP = 6, 3
TEXT = tuple(range(1, 60))
DECODED = {"decoded_prompts": 3, "decoded_tokens": 16}


class Runs:
    """Jobs of one folder, all on one checkpoint."""

    def __init__(self, folder):
        self.folder, self.logs, self.checkpoint = folder, folder / "logs", folder / "checkpoint"
        self.shards = save_tiny_shards(folder / "shards")
        save_checkpoint(self.checkpoint, load_tokenizer(folder / "shards/tokenizer"), "qwen2", head_dim=8)

    def job(self, name, **changes):
        values = {
            "shards": self.shards, "output": str(self.folder / name), "init_from": str(self.checkpoint), "block_len": 4,
            "drafts": "adapter", "adapter_rank": 4, "link_rank": 5, "steps": STEPS, "rows_per_step": 12,
            "rows_per_forward": 2, "learning_rate": 2e-2, "min_learning_rate": 5e-4, "precision": "fp32", "workers": 2,
            "checkpoint_every": STOP, "log_every": 1, "validate_every": 3, "validation_rows": 10,
        }  # fmt: skip
        if "resume_from" in changes:
            del values["init_from"]
        return TrainJob.model_validate(values | changes)

    def losses(self, name):
        metrics = ("diffusion_loss", "grad_norm", "validation_loss")
        return [curve(self.logs, self.job(name), metric) for metric in metrics]

    def model(self, name):
        return load_bundle(self.folder / name).model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("frozen"))
    jobs = []
    for stage in STAGES:
        jobs.append(runs.job(f"zero-{stage}", zero_stage=stage))
        middle = str(runs.folder / f"zero-{stage}.run/checkpoints/step-{STOP:08d}")
        jobs.append(runs.job(f"zero-{stage}-on", zero_stage=stage, resume_from=middle))
        jobs.append(runs.job(f"shared-{stage}", zero_stage=stage, sequence_parallel=2))
    jobs.append(runs.job("recomputed", activation_checkpointing=True, sample_every=3, sample_prompts=["import"],
                         sample_tokens=6, base=str(runs.checkpoint)))  # fmt: skip
    middle = str(runs.folder / f"zero-1.run/checkpoints/step-{STOP:08d}")
    jobs.append(runs.job("moved", zero_stage=3, resume_from=middle))
    jobs.append(runs.job("bf16", precision="bf16"))
    jobs.append(runs.job("more", init_from=str(runs.folder / "zero-1"), steps=1, rows_per_step=4))
    jobs.append(runs.job("further", drafts_from=str(runs.folder / "zero-1"), steps=1, rows_per_step=4))
    jobs.append(runs.job("without a copy", init_from=str(runs.folder / "recomputed"), steps=1, rows_per_step=4))
    jobs.append(runs.job("decoded", **DECODED))
    train_on(2, jobs, runs.logs)
    return runs


def test_drafts_learn_and_the_checkpoint_s_loss_is_not_computed(runs):
    loss, _, validation = runs.losses("zero-1")
    assert loss[STEPS] < loss[1] - 0.05
    assert validation[STEPS] < validation[STOP]
    assert curve(runs.logs, runs.job("zero-1"), "ar_loss") == {}


@pytest.mark.parametrize("name", ["zero-2", "zero-3", "shared-1", "shared-2", "shared-3", "recomputed"])
def test_stages_shared_rows_and_recomputation_change_no_loss(runs, name):
    for ours, first in zip(runs.losses(name), runs.losses("zero-1")):
        assert ours == pytest.approx(first, rel=1e-4)  # sums in another order


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_goes_on_exactly_from_drafts_alone(runs, stage):
    for resumed, unbroken in zip(runs.losses(f"zero-{stage}-on"), runs.losses(f"zero-{stage}")):
        assert resumed == {step: unbroken[step] for step in unbroken if step > STOP}
    newest = whole_checkpoints(str(runs.folder / f"zero-{stage}.run/checkpoints"))[-1]
    names = [name for note in newest.notes for name in note.names]
    assert names
    assert all(name.startswith(DRAFT_WEIGHTS) for name in names)


def test_a_stopped_run_goes_on_at_another_stage(runs):
    for resumed, unbroken in zip(runs.losses("moved"), runs.losses("zero-1")):
        assert resumed == pytest.approx({step: unbroken[step] for step in unbroken if step > STOP}, rel=1e-4)


@pytest.mark.parametrize("name", ["zero-1", "zero-3", "recomputed", "more"])
def test_the_checkpoint_is_in_the_bundle_bit_for_bit(runs, name):
    bundle, checkpoint = load_bundle(runs.folder / name), load_bundle(runs.checkpoint)
    theirs = checkpoint.model.state_dict()
    for weight, value in bundle.model.state_dict().items():
        assert weight.startswith(DRAFT_WEIGHTS) or torch.equal(value, theirs[weight]), weight
    assert torch.equal(score(bundle.model, TEXT).logprob_L, score(checkpoint.model, TEXT).logprob_L)
    assert bundle.end_ids == checkpoint.end_ids
    assert bundle.info.drafts.base_hash == model_info(runs.checkpoint).bundle_hash


def test_greedy_texts_are_those_of_transformers_on_the_checkpoint(runs):
    model, text = runs.model("zero-2"), TEXT[:9]
    expected = their_text(runs.checkpoint, list(text), 24, eos_token_id=None)
    decoder = Decoder(model, DraftConfig(block_len=4), slots=1, context_len=64)
    done = complete(Scheduler(decoder), requests([text], GREEDY))[0]
    assert list(done.token_ids) == expected == list(expected_texts(model, [text], GREEDY)[0])


def test_a_bundle_holds_the_checkpoint_s_files_as_they_are_or_names_their_address(runs):
    import transformers

    copied, named = runs.folder / "zero-1", runs.folder / "recomputed"
    for path in runs.checkpoint.iterdir():
        assert (copied / path.name).read_bytes() == path.read_bytes()
    assert {p.relative_to(named).as_posix() for p in named.rglob("*") if p.is_file()} == {
        DRAFTS, "made_by.json", "tidar.json",
    }  # fmt: skip
    assert read_bundle_info(named).drafts.base_uri == str(runs.checkpoint)
    opened = transformers.AutoModelForCausalLM.from_pretrained(copied)
    assert sum(p.numel() for p in opened.parameters()) == sum(
        p.numel() for p in load_bundle(runs.checkpoint).model.parameters()
    )


def test_drafts_of_a_bundle_are_trained_on(runs):
    begun, further = (runs.model(name).state_dict() for name in ("zero-1", "more"))
    changes = [(further[name] - begun[name]).abs().max() for name in begun if name.startswith(DRAFT_WEIGHTS)]
    assert 0 < max(changes) < 0.1


@pytest.mark.parametrize("name", ["further", "without a copy"])
def test_drafts_from_a_folder_and_a_bundle_that_names_its_checkpoint_are_trained_on_too(runs, name):
    expected = runs.model("more").state_dict()
    for weight, value in runs.model(name).state_dict().items():
        torch.testing.assert_close(value, expected[weight], rtol=0, atol=1e-3)  # "recomputed" sums in another order
        assert name == "without a copy" or torch.equal(value, expected[weight])


def test_bf16_trains_too(runs):
    loss = runs.losses("bf16")[0]
    assert loss[STEPS] < loss[1]


def test_the_dry_run_counts_what_is_trained(runs):
    facts = dry_run(runs.job("new", steps=1))
    model = runs.model("zero-1")
    drafts = sum(p.numel() for name, p in model.named_parameters() if name.startswith(DRAFT_WEIGHTS))
    assert facts["learned_parameters"] == drafts < facts["parameters"]


def changed_base(runs, folder):
    """A checkpoint whose config.json differs in one byte from the checkpoint of the runs."""
    save_checkpoint(folder, load_tokenizer(runs.folder / "shards/tokenizer"), "qwen2", head_dim=8)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    return folder


def test_another_checkpoint_under_the_drafts_is_refused(runs, tmp_path):
    other = changed_base(runs, tmp_path / "other")
    with pytest.raises(ConfigError, match="whose files differ"):
        check_start(runs.job("new", base=str(other)), read_manifest(runs.shards))
    folder = tmp_path / "drafts"
    (folder / "drafts").mkdir(parents=True)
    for path in (runs.folder / "recomputed").rglob("*"):
        if path.is_file():
            (folder / path.relative_to(runs.folder / "recomputed")).write_bytes(path.read_bytes())
    for path in other.iterdir():
        (runs.checkpoint / path.name).rename(tmp_path / path.name)
        (runs.checkpoint / path.name).write_bytes(path.read_bytes())
    try:
        with pytest.raises(BundleError, match="were trained for"):
            load_bundle(folder)
    finally:
        for path in other.iterdir():
            (tmp_path / path.name).rename(runs.checkpoint / path.name)
    assert load_bundle(folder).model.config.drafting


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ar"}, "objective: dual"),
        ({"shape": "tiny", "init_from": None}, "shape is given"),
        ({"alpha": 0.5}, "alpha is given"),
        ({"masking": "random"}, "give full"),
        ({"adapter_places": ["head"]}, "name some of"),
        ({"drafts": "whole"}, "adapter_rank is given"),
        ({"drafts_from": "d", "drafts": "whole", "adapter_rank": 32}, "drafts_from is given and drafts is whole"),
        ({"drafts_from": "d", "init_from": None, "resume_from": "r"}, "there is no init_from"),
    ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path, changes, message):
    values = {"shards": "s", "output": str(tmp_path), "init_from": "c", "drafts": "adapter", "adapter_rank": 4,
              "steps": 1, "rows_per_step": 1, "rows_per_forward": 1}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        TrainJob.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_rank": 8}, "the drafts have rank 4; this job has 8; give it the same"),
        ({"drafts": "whole", "adapter_rank": 32}, "the drafts of a frozen checkpoint"),
    ],
)
def test_drafts_of_another_shape_are_refused(runs, changes, message):
    job = runs.job("new", init_from=str(runs.folder / "zero-1"), **changes)
    with pytest.raises(ConfigError, match=message):
        check_start(job, read_manifest(runs.shards))


def test_drafts_from_a_folder_are_of_the_same_checkpoint_and_shape_and_the_only_ones(runs, tmp_path):
    other, kept = changed_base(runs, tmp_path / "other"), str(runs.folder / "zero-1")
    for changes, message in (
        ({"init_from": str(other)}, "give that checkpoint, or leave drafts_from out"),
        ({"init_from": kept}, "drafts already; leave drafts_from out"),
        ({"adapter_rank": 8}, "the drafts have rank 4; this job has 8; give it the same"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_start(runs.job("new", **{"drafts_from": kept, **changes}), read_manifest(runs.shards))


def equal_weights(model, checkpoint):
    own = dict(model.named_parameters())
    found = [torch.equal(own[name], tensors["weight"])
             for note in checkpoint.notes for name, tensors in read_part(checkpoint, note).items()]  # fmt: skip
    assert len(found) > 10
    return all(found)


def test_checkpoints_are_decoded_and_the_bundle_has_the_weights_of_the_best(runs):
    job = runs.job("decoded", **DECODED)
    rates = curve(runs.logs, job, "held_out_tokens_per_forward")
    first, last = whole_checkpoints(f"{job.output}.run/checkpoints")
    assert {kept.cursor.step: kept.cursor.tokens_per_forward for kept in (first, last)} == rates
    assert first.cursor.tokens_per_forward <= last.cursor.tokens_per_forward  # of equal ones the newest is best
    bundle = load_bundle(runs.folder / "decoded")
    model = bundle.model
    assert equal_weights(model, last)
    assert not equal_weights(model, first)
    prompts = held_out_prompts(ShardReader(runs.shards, "held_out"), 3, model.config.context_len, 16)
    found = tokens_per_forward(model, prompts, block_len=4, max_tokens=16, end_ids=bundle.end_ids)
    assert found == pytest.approx(rates[STEPS])
    for note in first.notes:  # as if the first had decoded better
        path = Path(first.uri, note.file).with_suffix(".json")
        found = json.loads(path.read_text())
        found["cursor"]["tokens_per_forward"] = 3.9
        path.write_text(json.dumps(found))
    shutil.rmtree(job.output)
    train_on(2, [job], runs.logs)
    assert equal_weights(runs.model("decoded"), first)
