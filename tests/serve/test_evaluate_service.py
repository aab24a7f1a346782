"""An evaluation over HTTP: a running service gets the scores that its bundle gets in process."""

import json

import pytest
from memorised_bundle import PLACES, save_scholar, write_lines, write_task
from paper_data import GSM8K, HUMANEVAL
from serving import running_service

from pipelines.evaluation.job import EvaluateJob, TaskJob
from pipelines.evaluation.lm_eval_model import LmEvalModel
from pipelines.evaluation.lm_eval_service import ServiceModel
from pipelines.evaluation.lm_eval_tasks import run_task
from pipelines.evaluation.sandbox.runner import isolation
from pipelines.evaluation.task_scores import SERVICE, service_model, service_scores, task_entries
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.errors import ConfigError, UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHOICE = """output_type: multiple_choice
doc_to_text: "{{city}} is in"
doc_to_choice: "{{countries}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """The service's: one that knows a few answers by heart."""
    return save_scholar(tmp_path_factory.mktemp("scholar") / "scholar")


@pytest.fixture(scope="module")
def service(ray_cluster, bundle):
    """Base address of a service of this bundle."""
    with running_service(bundle) as address:
        yield address


@pytest.fixture
def job(service, bundle):
    def make(**changes):
        values = {"bundle": bundle, "shards": "s", "output": "o", "service": f"{service}/v1", "task_batch": 2}
        return EvaluateJob.model_validate(values | changes)

    return make


def same(over_http, in_process):
    names = ("task", "metric", "score", "documents", "texts", "tokens", "forwards", "acceptance_histogram")
    assert {name: getattr(over_http, name) for name in names} == {name: getattr(in_process, name) for name in names}


def test_a_service_has_the_scores_of_its_bundle_in_process_for_the_same_forwards(job, bundle, tmp_path):
    tasks = [TaskJob(task="gsm8k", data=write_lines(tmp_path / "sums.jsonl", GSM8K), shots=0, max_tokens=24)]
    try:
        isolation()
        tasks.append(TaskJob(task="humaneval", data=write_lines(tmp_path / "h.jsonl", HUMANEVAL), max_tokens=24))
    except UserError:
        pass  # programs cannot run here
    loaded = load_bundle(bundle)
    for concurrent in (1, 2):
        over_http = job(task_batch=concurrent, tasks=tuple(tasks), task_modes=())
        found = service_scores(over_http, service_model(over_http), lambda: None)
        assert found[0].score == 0.75
        assert found[0].tokens_per_forward > 1.5
        for score, task in zip(found, tasks, strict=True):
            same(score, run_task(LmEvalModel(loaded), task))
    assert {name for row in task_entries({SERVICE: found}) for name in row["modes"]} == {"service"}


def test_likelihoods_over_http_choose_what_they_choose_in_process(job, bundle, tmp_path):
    countries = list(PLACES.values())
    rows = [{"city": city, "countries": countries, "answer": countries.index(PLACES[city])} for city in PLACES]
    rows[0]["answer"] = 1 - rows[0]["answer"]
    places = TaskJob(task=write_task(tmp_path, "places", CHOICE), data=write_lines(tmp_path / "places.jsonl", rows))
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "Rome is in Italy\nLima is in Peru\n"}])
    rolling = TaskJob(task=write_task(tmp_path, "rolling", ROLLING), data=texts)
    loaded, service = load_bundle(bundle), ServiceModel(job())
    found = run_task(service, places)
    assert (found.score, found.tokens) == (0.75, 0)
    same(found, run_task(LmEvalModel(loaded), places))
    # sums in fp32, in another order
    assert run_task(service, rolling).score == pytest.approx(run_task(LmEvalModel(loaded), rolling).score, rel=1e-4)


def test_a_service_of_another_bundle_none_at_all_and_a_key_that_is_missing_are_refused_in_one_line(
    job, other_bundle, service, monkeypatch
):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for changes, words in (
        ({"bundle": other_bundle}, "name the bundle that is served"),
        ({"service": service}, "does not list its models"),
        ({"service": "127.0.0.1:9"}, "service is 127.0.0.1:9; give the address"),
        ({"service": "http://127.0.0.1:9/v1"}, r"Connection refused.*; give the address of a running service"),
        ({"service_model": "other"}, "service_model is other; .* serves scholar; give one of them"),
        ({"service_key_env": "NO_SUCH_KEY"}, "service_key_env is NO_SUCH_KEY, which is not set"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            service_model(job(**changes))
        assert "\n" not in str(caught.value)


def test_the_key_goes_with_every_request_and_into_no_file(job, monkeypatch):
    monkeypatch.setenv("TIDAR_TEST_KEY", "hush-hush")
    service_job = job(service_key_env="TIDAR_TEST_KEY")
    assert ServiceModel(service_job).header["Authorization"] == "Bearer hush-hush"
    assert "hush-hush" not in json.dumps(service_job.model_dump(mode="json"))
    monkeypatch.setenv("OPENAI_API_KEY", "another-secret")
    assert "another-secret" not in str(ServiceModel(job()).header)


def test_a_question_that_the_service_refuses_ends_in_one_line(job, tmp_path):
    service = ServiceModel(job())
    service.max_retries = 1
    task = write_task(tmp_path, "odd", 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "a"\n'
                      "generation_kwargs: {until: [x], max_gen_toks: 4, temperature: -1}\n"
                      "metric_list: [{metric: exact_match}]\n")  # fmt: skip
    with pytest.raises(ConfigError, match=r"did not answer a question \(ClientResponseError: 400") as caught:
        run_task(service, TaskJob(task=task, data=write_lines(tmp_path / "odd.jsonl", [{"q": "Lima"}])))
    assert "\n" not in str(caught.value)
