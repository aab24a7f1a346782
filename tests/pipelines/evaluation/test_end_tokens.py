"""Any end token of a model ends a text, in every place that decodes."""

import json
from functools import partial
from pathlib import Path

import pytest
from gloo import train_on
from lm_eval.api.instance import Instance
from tiny import save_tiny_bundle, save_tiny_shards, varied_model

from pipelines.evaluation.evaluate import measured
from pipelines.evaluation.job import EvaluateJob
from pipelines.evaluation.lm_eval_model import LmEvalModel
from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import CheckpointStore, Cursor, find_checkpoint
from pipelines.training.continuations import continued
from pipelines.training.dry_run import dry_run
from pipelines.training.train_worker import end_tokens
from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.shards import ShardReader, read_manifest
from tidar_core.artifacts.text.end_tokens import EndTokens
from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.errors import WeightsError

PROMPT = "def save("
LENGTH = 24


def save_again(folder, bundle, ends):
    info = bundle.info
    save_bundle(str(folder), bundle.model, bundle.tokenizer, block_len=info.block_len, mask_id=info.mask_id,
                objective="dual", lineage={}, made_by={}, ends=ends)  # fmt: skip
    return load_bundle(folder)


def continued_for_ever(model, tokenizer):
    """The tokens that the model generates after PROMPT, without an end token."""
    return generate_autoregressive(model, tuple(tokenizer.encode(PROMPT)), SamplingConfig(max_tokens=LENGTH))


def generates_many_tokens(tokenizer, model):
    """Whether the model never ends by itself, generates known tokens only, and varies them after its first token."""
    generated = continued_for_ever(model, tokenizer)
    return set(generated) <= set(range(1, tokenizer.vocab_len)) and len(set(generated)) > 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    tokenizer = load_bundle(save_tiny_bundle(folder / "tiny")).tokenizer
    model = next(
        filter(partial(generates_many_tokens, tokenizer), (varied_model(tokenizer, seed) for seed in range(100)))
    )
    save_bundle(str(folder / "plain"), model, tokenizer, block_len=4, mask_id=model.config.mask_id,
                objective="dual", lineage={}, made_by={})  # fmt: skip
    return load_bundle(folder / "plain")


@pytest.fixture(scope="module")
def generated(plain):
    return continued_for_ever(plain.model, plain.tokenizer)


@pytest.fixture(scope="module", params=["the second", "the third"])
def bundle(request, plain, generated, tmp_path_factory):
    """A bundle with three end tokens, of which the model generates one as its second token or later."""
    place = next(place for place, token in enumerate(generated) if place and token not in generated[:place])
    never = next(token for token in range(1, 300) if token not in generated)
    ids = (0, never, generated[place]) if request.param == "the third" else (0, generated[place], never)
    made = save_again(tmp_path_factory.mktemp("ends") / "bundle", plain, EndTokens(ids))
    return made, list(generated[: place + 1])


@pytest.mark.parametrize("drafts", [True, False])
def test_a_continuation_during_training_ends_at_any_end_token(plain, generated, bundle, drafts):
    made, short = bundle
    for one, expected in ((plain, generated), (made, short)):
        samples = continued(
            one.model, one.tokenizer, [PROMPT], block_len=4, max_tokens=LENGTH, end_ids=one.end_ids, drafts=drafts
        )
        assert samples.texts == [one.tokenizer.decode(expected)]


@pytest.mark.parametrize("mode", ["single-pass", "two-pass", "autoregressive"])
def test_an_answer_in_lm_eval_ends_at_any_end_token_which_is_no_part_of_it(plain, generated, bundle, mode):
    made, short = bundle
    for one, expected in ((plain, generated), (made, short[:-1])):
        arguments = (PROMPT, {"until": [], "max_gen_toks": LENGTH})
        requests = [Instance("generate_until", {}, arguments, 0, ("task", 0, 1))]
        model = LmEvalModel(one, mode=mode)
        assert model.generate_until(requests) == [one.tokenizer.decode(expected)]
        assert model.prefix_token_id == 0  # the token before a text is the token that separates documents


def test_texts_of_a_report_end_at_any_end_token(plain, tmp_path):
    shards = save_tiny_shards(tmp_path / "shards")
    every = save_again(tmp_path / "every", plain, EndTokens(tuple(range(300))))
    job = EvaluateJob(bundle="b", shards=shards, output="o", prompts=2, prompt_len=8, max_tokens=6, repeats=1)
    for bundle, length in ((plain, 6), (every, 1)):
        report = measured(job, bundle, ShardReader(shards, "held_out"), lambda: None)
        assert {len(text) for text in report["texts"]} == {length}
        assert report["greedy_equal"]


def train_job(shards, **changes):
    values = {"shards": shards, "output": shards + "-out", "block_len": 4, "steps": 5, "checkpoint_every": 5,
              "log_every": 5, "rows_per_step": 2, "rows_per_forward": 2}  # fmt: skip
    return TrainJob.model_validate(values | changes)


def test_a_run_keeps_the_end_tokens_of_its_start_in_its_checkpoints(tmp_path, plain):
    shards = save_tiny_shards(tmp_path / "shards")
    manifest = read_manifest(shards)
    start = tmp_path / "start"
    save_again(start, plain, EndTokens((0, 7), '{"eos_token_id": [7, 0]}'))
    begun = end_tokens(train_job(shards, init_from=str(start)), manifest, None)
    assert begun == EndTokens((0, 7), '{"eos_token_id": [7, 0]}')
    store = CheckpointStore(str(tmp_path / "checkpoints"), keep_last=1, keep_best=0)
    kept = {"ids": begun.ids, "generation_config": begun.generation_config}
    for step, ends in ((1, None), (2, kept)):
        cursor = Cursor(step=step, updates=step, run={}, shards="s", start="w", model={}, ends=ends)
        store.write({}, cursor, part=0, parts=1)
        store.wait()
        checkpoint = find_checkpoint(str(tmp_path / "checkpoints"))
        resumed = train_job(shards, resume_from=checkpoint.uri)
        assert end_tokens(resumed, manifest, checkpoint) == (EndTokens((0,)) if ends is None else begun)
    assert end_tokens(train_job(shards, shape="tiny"), manifest, None) == EndTokens((0,))


def test_a_start_whose_end_tokens_are_no_tokens_is_refused_before_anything_runs(tmp_path):
    shards = save_tiny_shards(tmp_path / "shards")
    start = Path(save_tiny_bundle(tmp_path / "start"))
    (start / "tidar.json").unlink()
    (start / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 300]}))
    with pytest.raises(WeightsError, match=r"eos_token_id \[0, 300\]; ids of the tokenizer are needed, 0\.\.299"):
        dry_run(train_job(shards, init_from=str(start)))


@pytest.mark.slow
def test_a_trained_bundle_keeps_the_end_tokens_of_its_start_and_so_does_one_that_goes_on(tmp_path, plain):
    file = json.dumps({"eos_token_id": list(range(300)), "top_p": 0.9})
    save_again(tmp_path / "start", plain, EndTokens(tuple(range(300)), file))
    job = {"shards": save_tiny_shards(tmp_path / "shards"), "block_len": 4, "rows_per_step": 2, "rows_per_forward": 2,
           "checkpoint_every": 1, "log_every": 1, "precision": "fp32"}  # fmt: skip
    watched = {"sample_every": 1, "sample_prompts": [PROMPT], "sample_tokens": 8}
    begun = job | watched | {"output": str(tmp_path / "begun"), "steps": 1, "init_from": str(tmp_path / "start")}
    resumed = job | {"output": str(tmp_path / "resumed"), "steps": 2, "resume_from": str(tmp_path / "begun.run")}
    train_on(1, [TrainJob.model_validate(begun), TrainJob.model_validate(resumed)], tmp_path / "logs")
    for name in ("begun", "resumed"):
        assert load_bundle(tmp_path / name).end_ids == tuple(range(300))
        assert (tmp_path / name / "generation_config.json").read_text() == file
    page = (tmp_path / "logs/begun/samples/step-00000001.md").read_text()
    assert "1.00 tokens per forward" in page  # each text is its first token
