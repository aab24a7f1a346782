"""The work of a job is known before it starts: steps, memory, refusals; nothing is written."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_folders import change_config, change_tensors, save_folder
from tiny import save_tiny_bundle, save_tiny_shards

from pipelines.jobs import TrainJob, read_job
from pipelines.training.checkpoints import CheckpointStore, Cursor
from pipelines.training.dry_run import dry_run
from pipelines.training.memory import activation_bytes, estimated_memory, parameter_count
from pipelines.training.train_start import refuse_other_run
from pipelines.training.train_step_time import estimated_step, sample_seconds
from tidar_core.errors import BundleError, ConfigError, ShardError, StorageError, UserError, WeightsError
from tidar_core.training.objective import Objective
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

JOBS = Path(__file__).parents[3] / "infra/jobs"
FULL = {"train.full.yaml": "qwen2.5-1.5b", "train.full-8b.yaml": "qwen3-8b"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return save_tiny_shards(tmp_path_factory.mktemp("dry") / "shards")


def job(shards, **changes):
    values = {
        "shards": shards, "output": shards + "-out", "shape": "tiny", "block_len": 4, "steps": 10, "rows_per_step": 12,
        "rows_per_forward": 2, "workers": 2, "checkpoint_every": 5, "log_every": 5, "precision": "fp32",
    }  # fmt: skip
    return TrainJob.model_validate({key: value for key, value in (values | changes).items() if value is not None})


def test_a_dry_run_reports_steps_tokens_and_memory_and_writes_nothing(shards):
    record = dry_run(job(shards))
    assert (record["steps"], record["tokens_per_step"], record["tokens"]) == (10, 12 * 32, 3840)
    assert record["epochs"] == 5
    assert record["forwards_per_step"] == 3
    assert (record["begins_at_step"], record["finished"]) == (0, False)
    assert record["parameters"] == parameter_count(named_shape("tiny", vocab_len=300))
    assert (
        dry_run(job(shards, link_rank=4))["parameters"] - record["parameters"]
        == 2 * 4 * named_shape("tiny", vocab_len=300).vocab_size
    )
    assert set(record["memory_per_worker_gib"]) >= {"weights", "gradients", "optimizer", "activations", "total"}
    assert not list(Path(shards).parent.glob("*-out*"))


def test_the_time_of_a_step_is_estimated_and_names_its_source(shards):
    steps = {rows: dry_run(job(shards, rows_per_step=rows))["train_step"] for rows in (12, 1200)}
    assert (
        steps[12]["estimated_from"]
        == "two layers, 32 tokens and an update, timed on this machine with 1 thread in fp32"
    )
    assert 0 < steps[12]["seconds"] < steps[1200]["seconds"] < 1000 * steps[12]["seconds"]
    assert steps[1200]["hours_of_all_steps"] == pytest.approx(10 * steps[1200]["seconds"] / 3600, abs=1e-3)


def test_a_step_on_gpus_is_estimated_from_their_peak_or_not_at_all(shards):
    model = named_shape("qwen2.5-1.5b")
    changes = {"gpus_per_worker": 1, "precision": "bf16", "rows_per_step": 16, "rows_per_forward": 2}
    known = estimated_step(job(shards, peak_flops=1e15, **changes), model, 4096)
    tokens = 2 * 16 * 4096
    least = 6 * 1.5e9 * tokens / 2 / 0.4e15  # products with the weights alone, on two workers
    assert least < known["seconds"] < 2 * least
    assert known["estimated_from"] == "40% of peak_flops, 1e+15"
    for unknown in (job(shards, **changes), job(shards, peak_flops="measure", **changes)):
        assert estimated_step(unknown, model, 4096)["seconds"] is None
    large = estimated_step(job(shards), named_shape("qwen3-8b"), 4096)
    assert (large["seconds"], "too large" in large["estimated_from"]) == (None, True)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"shards": "/nowhere"}, ShardError, "/nowhere holds no manifest"),
        ({"shape": "tinier"}, ConfigError, "shape is 'tinier'"),
        ({"shape": None, "init_from": "/nowhere"}, ConfigError, "no config.json"),
        ({"shape": None, "resume_from": "/nowhere.run"}, UserError, "no whole checkpoint"),
        ({"sample_every": 5, "sample_prompts": [""]}, ConfigError, "sample_prompts"),
        ({"sample_every": 5, "sample_tokens": 500}, ConfigError, "128 at most"),
        ({"decoded_prompts": 2, "decoded_tokens": 500}, ConfigError, "no held-out row has a prompt that leaves 500"),
        ({"workers": 3, "sequence_parallel": 3}, ConfigError, "3; it must divide the 32 tokens of a row and the 32 of"),
        ({"sequence_parallel": 2, "block_share": 0.3, "block_len": 5}, ConfigError, "row and the 9 of its mask half"),
        ({"workers": 8, "sequence_parallel": 8}, ConfigError, "8; it must divide the model's 4 heads"),
        ({"block_len": 32}, ConfigError, "block_len is 32; rows of .* have 32 tokens"),
        ({"output": __file__}, UserError, "test_dry_run.py exists and holds no tidar.json"),
        ({"output": "/proc/x/y"}, StorageError, "/proc/x/y cannot be read or written: .*; check"),
    ],
)
def test_a_dry_run_refuses_what_training_would_refuse(shards, changes, error, words):
    with pytest.raises(error, match=words) as caught:
        dry_run(job(**({"shards": shards} | changes)))
    assert "\n" not in str(caught.value)


@pytest.fixture
def stopped_run(shards, tmp_path):
    """A checkpoint of step 5 in the run of `tmp_path / "begun"`."""
    begun = job(shards, output=str(tmp_path / "begun"))
    weights = {"embedding.weight": {"weight": torch.zeros(1)}}
    cursor = Cursor(
        step=5, updates=5, run=begun.run, shards="tiny-0", start="w", model=asdict(named_shape("tiny", vocab_len=300))
    )
    store = CheckpointStore(begun.checkpoints, keep_last=1, keep_best=0)
    store.write(weights, cursor, part=0, parts=1)
    store.wait()
    return begun


@pytest.mark.parametrize("content", [None, "{", "[]", '{"job": []}', '{"job": {"command": "import"}}'])
def test_a_bundle_of_others_at_the_output_is_refused_whatever_its_made_by_holds(shards, tmp_path, content):
    bundle = Path(save_tiny_bundle(tmp_path / "bundle"))
    if content is not None:
        (bundle / "made_by.json").write_text(content)
    with pytest.raises(ConfigError, match="holds the bundle of another job or of other shards"):
        dry_run(job(shards, output=str(bundle), precision="auto"))


def test_a_stopped_run_goes_on_by_itself_and_another_job_may_go_on_from_it(shards, stopped_run):
    assert dry_run(stopped_run)["begins_at_step"] == 5
    other = job(shards, shape=None, resume_from=stopped_run.output + ".run", workers=3, zero_stage=3, steps=20)
    record = dry_run(other)
    assert (record["begins_at_step"], record["steps"]) == (5, 20)
    assert record["from"] == stopped_run.checkpoints + "/step-00000005"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 2e-5}, "learning_rate is 2e-05 and was 1e-05 in the run"),
        ({"seed": 1}, "seed is 1 and was 0"),
        ({"block_len": 8}, "block_len is 8 and was 4"),
        ({"steps": 4}, "is already at step 5"),
    ],
)
def test_a_run_goes_on_as_it_began_or_not_at_all(shards, stopped_run, changes, words):
    for begins in ({"output": stopped_run.output}, {"shape": None, "resume_from": stopped_run.output + ".run"}):
        with pytest.raises(ConfigError, match=words) as caught:
            dry_run(job(shards, **(begins | changes)))
        assert "\n" not in str(caught.value)


def no_timing(*_):
    raise AssertionError("nothing is timed here")


@pytest.mark.parametrize(("seconds", "chosen"), [([2.0, 0.5], "bf16"), ([0.5, 2.0], "fp32"), (None, "bf16")])
def test_a_cpu_trains_in_the_precision_that_is_faster_on_it_and_the_reason_is_written(
    shards, monkeypatch, capsys, seconds, chosen
):
    monkeypatch.setattr("pipelines.training.precision.sample_seconds", lambda *_: seconds)
    record = dry_run(job(shards, precision="auto"))
    assert (record["precision"], record["train_step"]["estimated_from"][-4:]) == (chosen, chosen)
    times = "2000 ms in fp32 and 500 ms in bf16" if chosen == "bf16" else "500 ms in fp32 and 2000 ms in bf16"
    assert (times if seconds else "too large for a sample") in capsys.readouterr().err


def test_a_gpu_trains_in_bf16_and_a_continued_run_in_its_own_precision(shards, stopped_run, monkeypatch):
    monkeypatch.setattr("pipelines.training.precision.sample_seconds", no_timing)
    assert dry_run(job(shards, precision="auto", gpus_per_worker=1))["precision"] == "bf16"
    assert dry_run(job(shards, precision="fp32"))["precision"] == "fp32"
    continued = stopped_run.model_copy(update={"precision": "auto"})
    assert (dry_run(continued)["precision"], dry_run(continued)["begins_at_step"]) == ("fp32", 5)


def test_both_precisions_are_timed_on_the_sample(shards, monkeypatch):
    timed = []

    def seconds(job, model, length):
        timed.append((job.precision, model.layers, length))
        return {"fp32": 3.0, "bf16": 1.0}[job.precision]

    monkeypatch.setattr("pipelines.training.train_step_time._forward_backward", seconds)
    jobs, model = [job(shards, precision=name) for name in ("fp32", "bf16")], named_shape("quickstart")
    assert sample_seconds(jobs, model, 1024) == [3.0, 1.0]
    assert timed == [("fp32", 2, 64), ("bf16", 2, 64)]
    assert sample_seconds(jobs, named_shape("qwen3-8b"), 1024) is None


def test_a_run_that_began_before_a_choice_existed_goes_on_without_it(shards, stopped_run):
    path = Path(stopped_run.checkpoints, "step-00000005/part-00000-of-00001.json")
    note = json.loads(path.read_text())
    del note["cursor"]["run"]["random_phase"]
    path.write_text(json.dumps(note))
    with pytest.raises(ConfigError, match="random_phase is True and was False in the run"):
        dry_run(stopped_run)
    assert dry_run(stopped_run.model_copy(update={"random_phase": False}))["begins_at_step"] == 5


def test_a_run_of_whole_drafts_that_began_before_links_had_tables_of_the_checkpoint_goes_on(shards, stopped_run):
    path = Path(stopped_run.checkpoints, "step-00000005/part-00000-of-00001.json")
    note = json.loads(path.read_text())
    del note["cursor"]["run"]["link_shares_tables"]
    path.write_text(json.dumps(note))
    assert dry_run(stopped_run)["begins_at_step"] == 5


@pytest.mark.parametrize("held", [True, False])
def test_a_run_of_an_adapter_that_did_not_record_its_links_tables_goes_on_with_those_of_its_model(shards, held):
    jobs = {
        shares: job(shards, shape=None, init_from="base", drafts="adapter", link_rank=4, link_shares_tables=shares)
        for shares in (True, False)
    }
    run = {name: value for name, value in jobs[held].run.items() if name != "link_shares_tables"}
    model = asdict(replace(named_shape("tiny"), mask_id=None, adapter=jobs[held].adapter, link_rank=4))
    cursor = Cursor(step=5, updates=5, run=run, shards="tiny-0", start="w", model=model)
    checkpoint, manifest = SimpleNamespace(uri="old", cursor=cursor), SimpleNamespace(identity="tiny-0")
    refuse_other_run(jobs[held], checkpoint, manifest)
    with pytest.raises(ConfigError, match=f"link_shares_tables is {not held} and was {held} in the run of old"):
        refuse_other_run(jobs[not held], checkpoint, manifest)


def test_a_run_of_other_shards_is_not_gone_on_with(stopped_run, tmp_path):
    other = save_tiny_shards(tmp_path / "shards", seed=1)
    with pytest.raises(ConfigError, match="trained on other shards"):
        dry_run(job(other, output=stopped_run.output))


def test_weights_that_are_not_read_are_refused_before_anything_runs(shards, tmp_path):
    change_tensors(save_folder(tmp_path, vocab_size=320), **{"score.weight": torch.ones(4)})
    with pytest.raises(WeightsError, match=r"tensor score\.weight of the checkpoint is not part of the model"):
        dry_run(job(shards, shape=None, init_from=str(tmp_path)))
    change_config(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(WeightsError, match="'gptq'; this project reads float weights"):
        dry_run(job(shards, shape=None, init_from=str(tmp_path)))


def test_a_bundle_to_start_from_is_verified_before_anything_runs(shards, tmp_path):
    bundle = save_tiny_bundle(tmp_path / "bundle")
    assert dry_run(job(shards, shape=None, init_from=str(bundle)))["from"] == str(bundle)
    weights = Path(bundle, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        dry_run(job(shards, shape=None, init_from=str(bundle)))


def test_a_model_without_a_row_for_each_id_of_the_shards_tokenizer_is_refused(shards, tmp_path):
    bundle = Path(save_tiny_bundle(tmp_path / "bundle"))
    for name in ("tidar.json", "tokenizer.json"):
        (bundle / name).unlink()
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | {"vocab_size": 299}))
    with pytest.raises(WeightsError, match="300 ids and the model 299 embeddings"):
        dry_run(job(shards, shape=None, init_from=str(bundle)))


def test_parameters_of_published_shapes_are_those_of_their_cards():
    assert parameter_count(named_shape("qwen2.5-1.5b")) == 1_543_714_304
    assert parameter_count(named_shape("qwen3-8b")) == 8_190_735_360


def test_states_are_divided_among_workers_as_zero_divides_them(shards):
    model = named_shape("qwen3-8b")
    count, table = 8_190_735_360, 151_936 * 4096

    def held(**changes):
        estimate = estimated_memory(job(shards, precision="bf16", workers=6, **changes), model, 4096)
        return estimate.weights, estimate.gradients, estimate.optimizer, estimate.offloaded

    assert held(zero_stage=1) == (2 * count, 2 * count + 4 * count, 12 * count // 6, 0)
    assert held(zero_stage=2) == (2 * count, 2 * 500_000_000 + 4 * count // 6, 12 * count // 6, 0)
    assert held(zero_stage=3)[0] == 2 * count // 6 + 2 * table
    assert held(zero_stage=2, offload_optimizer="cpu")[2:] == (0, 12 * count // 6)


def kept_by_forward(config, objective, recompute):
    """Bytes that a forward of 2 rows of 256 keeps for its backward pass."""
    model = TidarModel(config)
    model.init_weights(0)
    model.recompute = recompute
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    trained = Objective(model, dual=objective == "dual", block_len=4)
    ids = torch.randint(0, 500, (2, 256), generator=torch.Generator().manual_seed(0))
    batch = trained.batch(ids, torch.zeros_like(ids))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = trained(batch)
    assert sums.ar_sum > 0
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("objective", ["ar", "dual"])
def test_estimated_activations_of_a_layer_are_about_those_that_a_forward_keeps(shards, objective, recompute):
    small = named_shape("quickstart", vocab_len=500)
    large = replace(small, layers=2 * small.layers)
    train_job = job(shards, objective=objective, activation_checkpointing=recompute)
    estimated = activation_bytes(train_job, large, 256) - activation_bytes(train_job, small, 256)
    kept = kept_by_forward(large, objective, recompute) - kept_by_forward(small, objective, recompute)
    if recompute:
        assert estimated == kept == 4 * 2 * 256 * (2 if objective == "dual" else 1) * small.hidden_size * small.layers
    else:
        assert 0.7 < estimated / kept < 1.4  # attention kernels differ in what they keep


@pytest.mark.parametrize(("file", "billions"), [("train.full.yaml", 50), ("train.full-8b.yaml", 150)])
def test_full_jobs_have_the_papers_budget_and_hyper_parameters(file, billions):
    full = read_job(TrainJob, JOBS / file)
    tokens_per_step = full.rows_per_step * 4096
    assert tokens_per_step == 2_097_152
    assert full.steps * tokens_per_step >= billions * 10**9 > (full.steps - 1) * tokens_per_step
    assert (full.learning_rate, full.min_learning_rate, full.warmup) == (1e-5, 3e-6, 0.01)
    assert (full.block_len, full.alpha, full.precision, full.objective) == (16, 1.0, "bf16", "dual")
    assert full.activation_checkpointing == (file == "train.full-8b.yaml")
    assert full.recipe.masking == "full"


@pytest.mark.parametrize("file", FULL)
def test_full_jobs_fit_into_80_gb(file):
    estimate = estimated_memory(read_job(TrainJob, JOBS / file), named_shape(FULL[file]), 4096)
    assert 20e9 < estimate.total < 72e9  # what the estimate leaves out must fit as well
