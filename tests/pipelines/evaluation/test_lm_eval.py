"""Scores on tasks: known models get known scores, in every mode and batch, from files and folders on disk."""

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks._yaml_loader import load_yaml
from memorised_bundle import PLACES, save_scholar, write_lines, write_task
from paper_data import GSM8K, HUMANEVAL, write_data_set, write_paper_data

from pipelines.evaluation.job import TaskJob
from pipelines.evaluation.lm_eval_model import LmEvalModel
from pipelines.evaluation.lm_eval_tasks import TASK_FOLDER, run_task
from pipelines.evaluation.paper_tasks import PAPER_TASKS, TABLE_2, TABLE_3, check_tasks
from pipelines.evaluation.sandbox.runner import isolation
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.errors import ConfigError, UserError

DATA = Path(__file__).parents[4] / "shared/data"
MODES = ("single-pass", "two-pass", "autoregressive")


@pytest.fixture(scope="module")
def scholar(tmp_path_factory):
    return load_bundle(save_scholar(tmp_path_factory.mktemp("scholar") / "bundle"))


@pytest.fixture
def sandbox():
    try:
        isolation()
    except UserError as error:
        pytest.skip(str(error))


def instances(*arguments, kind="generate_until"):
    return [Instance(kind, {}, given, 0, ("sums", n, 1)) for n, given in enumerate(arguments)]


def test_gsm8k_from_a_file_scores_the_same_in_every_mode_and_batch(scholar, tmp_path):
    job = TaskJob(task="gsm8k", data=write_lines(tmp_path / "sums.jsonl", GSM8K), shots=0, max_tokens=24)
    found = {
        (mode, batch): run_task(LmEvalModel(scholar, mode=mode, batch_size=batch), job)
        for mode in MODES
        for batch in (1, 8, 32)
    }
    assert {(one.score, one.documents, one.metric) for one in found.values()} == {(0.75, 4, "exact_match,strict-match")}
    assert {one.texts for one in found.values()} == {tuple(f" The answer is {n}.\n\n" for n in (5, 7, 9, 10))}
    for (mode, _), one in found.items():
        assert (one.tokens_per_forward > 1.5) if mode == "single-pass" else (one.tokens_per_forward >= 1.0)
    plain = found["autoregressive", 1]
    assert plain.tokens_per_forward == 1.0
    assert {one.tokens for one in found.values()} == {plain.tokens}
    assert sum(found["single-pass", 8].acceptance_histogram) > 0


def test_humaneval_from_a_file_runs_what_the_model_wrote(scholar, tmp_path, sandbox):
    data = write_lines(tmp_path / "programs.jsonl", HUMANEVAL)
    found = run_task(LmEvalModel(scholar), TaskJob(task="humaneval", data=data, max_tokens=24))
    assert (found.score, found.metric, found.isolation) == (pytest.approx(2 / 3), "pass@1", isolation())
    assert found.stderr == pytest.approx((2 / 9 / 3) ** 0.5)
    assert found.texts == tuple(row["canonical_solution"] for row in HUMANEVAL)


CHOICE = """output_type: multiple_choice
doc_to_text: "{{city}} is in"
doc_to_choice: "{{countries}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_planted_choice_is_found_by_likelihood(scholar, tmp_path):
    countries = list(PLACES.values())
    rows = [{"city": city, "countries": countries, "answer": countries.index(PLACES[city])} for city in PLACES]
    task = write_task(tmp_path, "places", CHOICE)
    for wrong in (0, 1):
        rows[0]["answer"] = (countries.index(PLACES["Paris"]) + wrong) % 4
        job = TaskJob(task=task, data=write_lines(tmp_path / "places.jsonl", rows))
        found = run_task(LmEvalModel(scholar), job)
        assert (found.task, found.score, found.metric) == ("places", (4 - wrong) / 4, "acc")
        assert (found.tokens, found.tokens_per_forward, found.isolation) == (0, None, None)


def oracle(bundle, tokens, first):
    """Log-probability of tokens[first:], and whether each is the likeliest: one forward a token."""
    from tidar_core.decoding.autoregressive import score

    total, greedy = 0.0, True
    for end in range(first, len(tokens)):
        scores = score(bundle.model, tuple(tokens[: end + 1]), top=1)
        total += float(scores.logprob_L[-1])
        greedy &= int(scores.top_token_LT[-1, 0]) == tokens[end]
    return total, greedy


def test_likelihoods_are_those_of_one_token_after_another(scholar):
    model, encode = LmEvalModel(scholar), scholar.tokenizer.encode
    pairs = [("Rome is in", " Italy"), ("Rome is in ", "Peru"), ("", "Lima is in Peru"), ("Rome is in", "")]
    found = model.loglikelihood(instances(*pairs, kind="loglikelihood"), disable_tqdm=True)
    eos = scholar.tokenizer.eos_id
    expected = [
        oracle(scholar, encode("Rome is in Italy"), len(encode("Rome is in"))),
        oracle(scholar, encode("Rome is in Peru"), len(encode("Rome is in"))),
        oracle(scholar, [eos, *encode("Lima is in Peru")], 1),
        (0.0, True),
    ]
    for (likelihood, greedy), (total, all_greedy) in zip(found, expected):
        assert likelihood == pytest.approx(total, abs=1e-4)  # sums in fp32, in another order
        assert greedy == all_greedy
    assert [greedy for _, greedy in found[:2]] == [True, False]


def test_a_text_longer_than_the_context_is_read_in_windows_each_token_once(scholar):
    text = "Rome is in Italy\nLima is in Peru\n" * 3
    tokens = scholar.tokenizer.encode(text)
    model = LmEvalModel(scholar, context_len=16)
    assert len(tokens) > 2 * 15
    found = model.loglikelihood_rolling(instances((text,), kind="loglikelihood_rolling"))[0]
    expected, window = 0.0, 15  # 16 positions: the last token is predicted, not read
    padded = [scholar.tokenizer.eos_id, *tokens]
    for first in range(1, len(padded), window):
        last = min(first + window, len(padded))
        begin = max(0, last - 1 - window)
        expected += oracle(scholar, padded[begin:last], first - begin)[0]
    assert found == pytest.approx(expected, abs=1e-3)
    whole = LmEvalModel(scholar).loglikelihood_rolling(instances((text,), kind="loglikelihood_rolling"))[0]
    assert whole == pytest.approx(oracle(scholar, padded, 1)[0], abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_text_ends_before_the_first_stop_string_in_every_mode(scholar, mode):
    model = LmEvalModel(scholar, mode=mode, batch_size=2)
    wishes = [{"until": ["is", "answer"]}, {"until": " 7"}, {"until": []}, {"until": ["never"], "max_gen_toks": 3}]
    found = model.generate_until(instances(*(("Q: 3+4?\nA:", {"max_gen_toks": 24} | wish) for wish in wishes)))
    assert found[:3] == [" The ", " The answer is", " The answer is 7.\n\nQ:"]
    assert found[3] == " The answer is", "three tokens"
    assert not model.scheduler.busy


def test_a_wish_that_nobody_honours_and_an_answer_longer_than_the_context_are_refused(scholar):
    model = LmEvalModel(scholar)
    with pytest.raises(ConfigError, match="generation_kwargs hold num_beams; known are until, max_gen_toks"):
        model.generate_until(instances(("a", {"num_beams": 4})))
    with pytest.raises(ConfigError, match="max_tokens of task sums is 128; the context of 128"):
        model.generate_until(instances(("a", {"max_gen_toks": 128})))


def test_lm_eval_knows_the_model_by_name(scholar, tmp_path):
    assert get_model("tidar") is LmEvalModel
    folder = save_like(scholar, tmp_path)
    model = LmEvalModel.create_from_arg_string(f"bundle={folder},mode=two-pass", {"batch_size": 3, "device": "cpu"})
    assert (model.scheduler.decoder.slots, model.scheduler.planner.mode, model.block_len) == (3, "two-pass", 4)
    assert model.generate_until(instances(("Lima is in", {"until": ["\n"]}))) == [" Peru"]


def save_like(bundle, folder):
    from tidar_core.artifacts.model.bundle import save_bundle

    save_bundle(str(folder / "copy"), bundle.model, bundle.tokenizer, block_len=4, mask_id=bundle.info.mask_id,
                objective="dual", lineage={}, made_by={})  # fmt: skip
    return folder / "copy"


class Reciter(LmEvalModel):
    """Returns the text that `answer` computes from the question: known answers through the whole path of scoring."""

    def generate_until(self, requests, disable_tqdm=False):
        self.requests = requests
        return [self.answer(request.doc) for request in requests]


@pytest.mark.skipif(not DATA.exists(), reason="real prompts are not on this machine")
def test_real_humaneval_passes_its_own_solutions_and_fails_others(scholar, sandbox):
    model = Reciter(scholar)
    job = TaskJob(task="humaneval", data=str(DATA / "HumanEval.jsonl.gz"), limit=12)
    model.answer = lambda doc: doc["canonical_solution"]
    assert run_task(model, job).score == 1.0
    model.answer = lambda doc: "    return None\n" if doc["task_id"] < "HumanEval/1" else doc["canonical_solution"]
    assert run_task(model, job).score == 11 / 12


@pytest.mark.skipif(not DATA.exists(), reason="real prompts are not on this machine")
def test_real_gsm8k_matches_its_own_answers_strictly(scholar):
    model = Reciter(scholar)
    job = TaskJob(task="gsm8k", data=str(DATA / "gsm8k-train-1000.jsonl"), limit=50)
    model.answer = lambda doc: f"So it is. The answer is {doc['answer'].split('#### ')[1]}."
    found = run_task(model, job)
    assert (found.score, found.documents, found.shots) == (1.0, 50, 8)
    model.answer = lambda doc: f"It is {doc['answer'].split('#### ')[1]}."
    assert run_task(model, job).score == 0.0


def subjects(task):
    return [load_yaml(path, resolve_func=False)["dataset_name"] for path in TASK_FOLDER.glob(PAPER_TASKS[task].files)]


@pytest.mark.slow
def test_the_twelve_tasks_of_the_paper_run_from_folders_on_disk(scholar, tmp_path, sandbox):
    folders = write_paper_data(tmp_path, subjects("minerva_math"), subjects("mmlu"))
    assert (*TABLE_2, *TABLE_3) == tuple(folders) == tuple(PAPER_TASKS)
    model = LmEvalModel(scholar)
    found = {}
    for name, folder in folders.items():
        job = TaskJob(task=name, data=folder, max_tokens=8 if name in TABLE_2 else None)
        check_tasks([job], allow_code_execution=True)
        found[name] = run_task(model, job)
    expected_documents = {"minerva_math": 7, "mmlu": 57, "humaneval": 3, "humaneval_plus": 3, "gsm8k": 4,
                          "arc_easy": 2, "arc_challenge": 2}  # fmt: skip
    assert {name: one.documents for name, one in found.items()} == dict.fromkeys(found, 1) | expected_documents
    assert {name: one.shots for name, one in found.items()} == {
        "humaneval": 0, "humaneval_plus": 0, "mbpp": 3, "mbpp_plus": 3, "gsm8k": 8, "minerva_math": 4, "mmlu": 5,
        "arc_easy": 0, "arc_challenge": 0, "hellaswag": 0, "piqa": 0, "winogrande": 5,
    }  # fmt: skip
    assert all((one.tokens > 0) == (name in TABLE_2) for name, one in found.items())
    assert found["humaneval"].score == pytest.approx(2 / 3)
    assert found["arc_challenge"].metric == "acc_norm"


def test_mbpp_is_held_to_its_assertions_after_three_examples(scholar, tmp_path, sandbox):
    row = {"task_id": 11, "text": "Give one.", "code": "", "test_list": ["assert one() == 1"] * 3,
           "test_setup_code": "import math"}  # fmt: skip
    data = write_lines(tmp_path / "mbpp.jsonl", [row, row | {"test_list": ["assert one() == 2"] * 3}])
    model = Reciter(scholar)
    model.answer = lambda doc: "def one():\n    return math.floor(1.5)"
    found = run_task(model, TaskJob(task="mbpp", data=data))
    assert (found.score, found.shots) == (0.5, 3)
    prompt, _ = model.requests[0].args
    assert (prompt.count("[BEGIN]"), prompt.count("[DONE]")) == (4, 3)
    assert prompt.index("similar elements") < prompt.index("non-prime") < prompt.index("Give one.")


def test_every_task_that_cannot_run_is_named_before_any_work(tmp_path):
    tasks = [
        TaskJob(task="humaneval", data=str(tmp_path)),
        TaskJob(task="gsm8k"),
        TaskJob(task="piqa", data="/nowhere/piqa"),
        TaskJob(task="poetry"),
        TaskJob(task=str(tmp_path / "mine.yaml")),
    ]
    with pytest.raises(ConfigError) as caught:
        check_tasks(tasks, allow_code_execution=False)
    assert str(caught.value).split("; ") == [
        "task humaneval runs programs that the model wrote", "set allow_code_execution: true, or leave it out",
        "task gsm8k has no data", "give the path of a copy of the data set openai/gsm8k, or of a JSONL file",
        "data of task piqa: /nowhere/piqa does not exist",
        "put a copy of the data set baber/piqa or a JSONL file there",
        "task 'poetry' is unknown", f"give one of {', '.join(PAPER_TASKS)}, or the path of an lm-eval YAML file",
        f"task file {tmp_path}/mine.yaml is not on this disk", "give the path of an lm-eval YAML file",
    ]  # fmt: skip


def test_data_without_what_the_task_needs_is_one_line(scholar, tmp_path):
    half = write_data_set(
        tmp_path / "winogrande", {"winogrande_xl": {"validation": [{"sentence": "_", "answer": "1"}]}}
    )
    for data in (half, write_lines(tmp_path / "w.jsonl", [{"sentence": "_", "answer": "1"}])):
        with pytest.raises(
            ConfigError, match=r"task winogrande cannot be read from .*; give a whole copy of alle"
        ) as e:
            run_task(LmEvalModel(scholar), TaskJob(task="winogrande", data=data))
        assert "\n" not in str(e.value)
    (tmp_path / "broken.jsonl").write_text('{"question": "a"\n')
    with pytest.raises(ConfigError, match=r"broken\.jsonl line 1 is not JSON"):
        run_task(LmEvalModel(scholar), TaskJob(task="gsm8k", data=str(tmp_path / "broken.jsonl")))


def test_sampled_answers_follow_the_seeded_sampler(scholar):
    model = LmEvalModel(scholar)
    wish = {"until": ["\n"], "do_sample": True, "temperature": 50.0, "max_gen_toks": 12}
    drawn = {model.generate_until(instances(("Lima is in", wish)))[0] for _ in range(2)}
    assert len(drawn) == 1
    assert drawn != {" Peru"}
