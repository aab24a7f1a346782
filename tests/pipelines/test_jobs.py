"""Job files: all that we ship are valid, and a wrong one is refused in one line that names the key."""

from pathlib import Path

import pytest

from pipelines.answers.job import AnswersJob
from pipelines.evaluation.job import EvaluateJob, PublishJob
from pipelines.jobs import PackJob, TrainJob, read_job
from tidar_core.artifacts.store.yaml_file import read_mapping
from tidar_core.errors import ConfigError
from tidar_core.training.recipe import Recipe

JOBS = Path(__file__).parents[2] / "infra/jobs"
KINDS = {"answers": AnswersJob, "pack": PackJob, "train": TrainJob, "evaluate": EvaluateJob, "publish": PublishJob}
TRAIN = "shards: s\noutput: o\nshape: tiny\nsteps: 4\nrows_per_step: 8\nrows_per_forward: 4\n"


@pytest.mark.parametrize("size", ["smoke", "small", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_has_a_valid_job_of_each_size(kind, size):
    job = read_job(KINDS[kind], JOBS / f"{kind}.{size}.yaml")
    assert type(job).model_validate(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TRAIN + "learning_rat: 1.0e-4\n", "unknown key 'learning_rat'"),
        ("output: o\nshape: tiny\nsteps: 4\nrows_per_step: 8\n", "key 'shards' is missing"),
        (TRAIN + "init_from: x\n", "give one of them"),
        (TRAIN.replace("shape: tiny\n", ""), "give one of them"),
        (TRAIN + "resume_from: x\n", "shape 'tiny' and resume_from 'x' given; give one of them"),
        (TRAIN.replace("shape: tiny", "init_from: x\nresume_from: y"), "init_from 'x' and resume_from 'y' given"),
        (TRAIN + "checkpoint_every: 15\n", "must be a multiple of log_every, 10"),
        (TRAIN + "decoded_prompts: 4\nkeep_best: 0\n", "give 1, so that the best checkpoint stays"),
        (TRAIN + "decoded_prompts: 4\nobjective: ar\n", "objective is ar, which trains no drafts"),
        (TRAIN + "peak_flops: fast\n", "peak_flops"),
        (TRAIN + "weights: int8\n", "unknown key 'weights'"),
        (TRAIN + "workers: 3\n", "multiple of workers x rows_per_forward = 3 x 4"),
        (TRAIN + "block_len: 8\nblock_lens: [2, 4]\n", "the longest of them must be block_len, 8"),
        (TRAIN + "sequence_parallel: 2\n", "it must divide workers, 1"),
        (TRAIN + "block_share: 0.0\n", "block_share is 0.0; it must be above 0"),
        (TRAIN + "objective: ar\nmasking: random\n", "only objective: dual has one"),
        (TRAIN + "objective: ar\nrandom_phase: false\n", "the recipe random_phase: False; only objective: dual"),
        (TRAIN + "position_weights: steep\n", "position_weights is 'steep'"),
        (TRAIN + "zero_stage: 4\n", "zero_stage is 4"),
        (TRAIN + "min_learning_rate: 1.0\n", "must not exceed"),
        (TRAIN.replace("steps: 4", "steps: 0"), "steps is 0"),
        ("- a list\n", "must be a mapping"),
        ("a: [1\n", "is not YAML"),
        (TRAIN + "'steps': 9\n", "job.yaml gives the key 'steps' on line 4 and on line 7; remove one of them"),
        (TRAIN + "sample_prompts: [{a: 1, a: 2}]\n", "gives the key 'a' on line 7 and on line 7"),
    ],
)
def test_a_wrong_job_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_job(TrainJob, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("greedy: 0", "greedy and sampled are 0, so no prompt would be answered"),
        ("greedy: 1.5", "greedy is 1.5; input should be less than or equal to 1"),
        ("sampled: 1\ntemperatures: []", r"temperatures is \[\]; sampled answers need a temperature"),
        ("temperatures: [0]", "temperatures.0 is 0; input should be greater than or equal to"),
        ("max_tokens: 2048", "max_tokens is 2048 and context_len 2048; the context must hold a prompt"),
        ("stop: ['']", "stop.0 is ''; string should have at least 1 character"),
        ("answers: 3", "unknown key 'answers'; AnswersJob knows prompts, output, model"),
    ],
)
def test_a_wrong_answers_job_is_refused_in_one_line(tmp_path, line, words):
    path = tmp_path / "job.yaml"
    path.write_text(f"prompts: p\noutput: o\nmodel: m\n{line}\n")
    with pytest.raises(ConfigError, match=words) as caught:
        read_job(AnswersJob, path)
    assert "\n" not in str(caught.value)


def test_tasks_that_nobody_is_to_answer_are_refused(tmp_path):
    path, given_task = (
        tmp_path / "job.yaml",
        "bundle: b\nshards: s\noutput: o\ntasks: [{task: gsm8k}]\ntask_modes: []\n",
    )
    path.write_text(given_task)
    with pytest.raises(ConfigError, match="task_modes is \\[\\] and no service is given"):
        read_job(EvaluateJob, path)
    path.write_text(given_task + "service: http://127.0.0.1:8000/v1\n")
    assert read_job(EvaluateJob, path).task_modes == ()


@pytest.mark.parametrize("kind", ["mixture", "sft"])
def test_a_pack_job_may_name_several_sources_which_take_over_missing_keys(kind):
    job = read_job(PackJob, JOBS / f"pack.{kind}.yaml")
    assert PackJob.model_validate(job.model_dump(mode="json")) == job
    assert [(source.weight, source.documents, source.text_field) for source in job.sources] == {
        "mixture": [(1, "text", "text"), (2.5, "text", "content"), (0.3, "text", "text")],
        "sft": [(2, "conversations", "text"), (0.05, "text", "text")],
    }[kind]


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ("[]", r"corpus is \(\); give a path, or a list of sources"),
        ("[{path: a, weight: 0}]", r"weight is 0; input should be greater than 0"),
        ("[{path: a, wait: 1}]", r"unknown key '.*wait'; Source knows path, weight, documents, text_field"),
        ("[{weight: 1}]", r"key '.*path' is missing"),
    ],
)
def test_a_wrong_mixture_is_refused_in_one_line(tmp_path, corpus, words):
    path = tmp_path / "job.yaml"
    path.write_text(f"corpus: {corpus}\noutput: o\ntokenizer: t\n")
    with pytest.raises(ConfigError, match=words) as caught:
        read_job(PackJob, path)
    assert "\n" not in str(caught.value)


def test_a_job_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_job(TrainJob, tmp_path / "missing.yaml")


def test_the_recipe_of_frozen_drafts_has_defaults_of_its_own_and_each_can_be_set(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(TRAIN)
    whole = read_job(TrainJob, path)
    assert whole.recipe == Recipe(random_phase=True)
    path.write_text(TRAIN.replace("shape: tiny", "init_from: m") + "drafts: adapter\n")
    frozen = read_job(TrainJob, path)
    chosen = {"position_weights": "dpace", "first_weight": 0.1, "distillation": 0.5, "unlinked": 0.3}
    assert frozen.recipe == Recipe(random_phase=True, **chosen)
    assert {name: frozen.run[name] for name in chosen} == chosen  # so a checkpoint keeps what the run really did
    assert (whole.run["distillation"], whole.run["position_weights"]) == (0.0, None)
    off = {"position_weights": "flat", "first_weight": 1.0, "distillation": 0.0, "unlinked": 0.0}
    assert frozen.model_copy(update=off).recipe == Recipe(random_phase=True, position_weights="flat")


def test_a_key_beside_a_merge_key_overrides_what_it_merges(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("kept:\n  inner: &a {x: 1}\n  outer: &b {<<: *a, x: 2}\nlast: {<<: *b, y: 3}\n")
    assert read_mapping(path, "job file", "x.yaml")["last"] == {"x": 2, "y": 3}
