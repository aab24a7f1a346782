"""The report agrees with an independent count; releases must meet their bars."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_lost_bundle

from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.artifacts.registry import model_registry, runs
from tidar_core.artifacts.shards import ShardReader
from tidar_core.errors import BundleError, ConfigError, GateError, RegistryError
from tidar_core.training.dual_mode import IGNORED, dual_mode_batch
from tidar_core.transformer.attention import DenseAttention

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_losses_are_means_over_held_out_labels(report, evaluate_job):
    bundle = load_bundle(evaluate_job.bundle)
    rows = ShardReader(evaluate_job.shards, "held_out").rows(range(report["held_out_rows"]))
    ar, diffusion = [], []
    for ids, documents in zip(rows.input_ids_BS, rows.document_ids_BS):
        batch = dual_mode_batch(ids[None], documents[None], 4, bundle.info.mask_id)
        with torch.no_grad():
            hidden = bundle.model(batch.token_BL, batch.layout.position, DenseAttention(batch.layout))
            logs = bundle.model.head(hidden)[0].log_softmax(-1)
        for s in range(len(ids)):
            if (target := batch.ar_target_BS[0, s]) != IGNORED:
                ar.append(-float(logs[s, target]))
            if (target := batch.diffusion_target_BM[0, s]) != IGNORED:
                diffusion.append(-float(logs[len(ids) + s, target]))
    assert report["ar_loss"] == pytest.approx(sum(ar) / len(ar), rel=1e-4)
    assert report["diffusion_loss"] == pytest.approx(sum(diffusion) / len(diffusion), rel=1e-4)


def test_greedy_texts_equal_the_plain_loop_on_every_prompt(report):
    assert report["greedy_equal"] is True
    assert report["prompts"] == report["prompts_equal"] >= 2
    assert report["modes"]["autoregressive"]["tokens_per_forward"] == 1.0


def test_acceptance_adds_up(report):
    histogram, by_position = report["acceptance_histogram"], report["acceptance_by_position"]
    assert len(histogram) == len(by_position) == len(report["draft_accuracy"]) == 4
    mean = sum(n * count for n, count in enumerate(histogram, 1)) / sum(histogram)
    assert report["tokens_per_round"] == pytest.approx(mean) == pytest.approx(sum(by_position))
    assert by_position[0] == 1.0
    assert 1.0 <= report["tokens_per_forward"] <= 4.0


def test_the_report_lies_as_json_words_and_pictures(report, evaluate_job):
    folder = Path(evaluate_job.output)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert f"{report['ar_loss']:.4f}" in (folder / "report.md").read_text()
    for picture in ("acceptance.png", "speed.png", "quality.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    parents = json.loads((folder / "made_by.json").read_text())["parents"]
    assert (parents["bundle"], parents["parent"]) == (report["bundle_hash"], report["parent"]["hash"])


def test_the_parent_is_measured_on_the_same_rows_and_prompts(report, ar_bundle, evaluate_job):
    from pipelines.evaluation.evaluate import held_out_losses

    parent = report["parent"]
    assert (parent["hash"], parent["is_start"]) == (read_bundle_info(ar_bundle.output).bundle_hash, True)
    losses = held_out_losses(ar_bundle.output, evaluate_job.shards, rows=report["held_out_rows"], threads=1)
    assert parent["ar_loss"] == pytest.approx(losses["ar_loss"], rel=1e-4)
    assert 0 <= parent["prompts_equal"] <= report["prompts"]
    assert parent["tokens_per_second"] > 0


def test_a_task_scores_what_the_plain_loop_scores_in_every_mode(report):
    (row,) = report["tasks"]
    assert (row["task"], row["metric"], row["documents"]) == ("continuations", "exact_match", 4)
    assert {mode: figures["score"] for mode, figures in row["modes"].items()} == {
        "single-pass": 0.75,
        "autoregressive": 0.75,
    }
    assert row["modes_say_the_same"] is True
    assert 0 <= row["equal_to_parent"] <= row["texts"] == 4
    assert row["modes"]["autoregressive"]["tokens_per_forward"] == 1.0 == row["parent"]["tokens_per_forward"]
    assert row["modes"]["single-pass"]["tokens_per_forward"] >= 1.0


def test_the_report_is_kept_by_mlflow_below_the_training_run(report, evaluate_job):
    from tidar_core.artifacts.registry.mlflow_client import client_of

    uri = evaluate_job.tracking_uri
    trained = runs.find_run(uri, "train", report["bundle_hash"])
    run = client_of(uri).get_run(runs.find_run(uri, "evaluate", report["bundle_hash"]))
    assert trained is not None
    assert run.data.tags["training_run"] == run.data.tags["mlflow.parentRunId"] == trained
    assert run.data.metrics["ar_loss"] == report["ar_loss"]
    assert run.data.metrics["parent/ar_loss"] == report["parent"]["ar_loss"]
    assert run.data.metrics["continuations/single-pass/score"] == 0.75
    (read,) = run.inputs.dataset_inputs
    assert json.loads(read.dataset.source) == {"uri": evaluate_job.shards, "identity": report["shards"]}
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "evaluation")]
    kept = {entry.path for entry in client_of(uri).list_artifacts(run.info.run_id)}
    assert kept >= {"report.json", "report.md", "acceptance.png", "quality.png"}


@pytest.fixture
def publish_job(report, evaluate_job, tmp_path):
    from pipelines.evaluation.job import PublishJob

    return PublishJob(
        bundle=evaluate_job.bundle, report=evaluate_job.output, name="m", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"
    )


def test_a_version_leads_to_its_runs_data_report_and_bars(publish_job, evaluate_job, report):
    from pipelines.evaluation.publish import publish
    from tidar_core.artifacts.registry.mlflow_client import client_of

    uri, info = evaluate_job.tracking_uri, read_bundle_info(publish_job.bundle)
    bars = {"min_scores": {"continuations": 0.7}, "max_ar_loss_over_parent": 1.0, "max_score_drop": 1.0}
    version = publish(publish_job.model_copy(update={"tracking_uri": uri, "name": "lineage"} | bars))
    found = client_of(uri).get_model_version("lineage", str(version))
    assert found.run_id == runs.find_run(uri, "train", info.bundle_hash) is not None
    assert found.tags["evaluation_run"] == runs.find_run(uri, "evaluate", info.bundle_hash)
    assert (found.tags["data_manifest"], found.tags["evaluated_on"]) == (info.lineage["shards"], report["shards"])
    assert found.tags["report"] == evaluate_job.output
    assert "score of continuations is 0.7500, the bar 0.7" in json.loads(found.tags["bars"])
    (listed,) = model_registry.list_versions(uri, "lineage")
    assert (listed.status, listed.bundle_hash, listed.gates["continuations"]) == ("challenger", info.bundle_hash, 0.75)
    assert listed.gates["ar_loss_of_parent"] == report["parent"]["ar_loss"]


def test_a_bundle_that_meets_its_bars_becomes_challenger_then_champion(publish_job):
    from pipelines.evaluation.publish import publish

    version = publish(publish_job)
    assert model_registry.resolve(publish_job.tracking_uri, "models:/m@challenger").version == version == 1
    with pytest.raises(RegistryError, match="champion"):
        model_registry.resolve(publish_job.tracking_uri, "models:/m@champion")
    model_registry.promote(publish_job.tracking_uri, "m", version)
    found = model_registry.find_bundle(publish_job.tracking_uri, "models:/m@champion")
    assert found.info == read_bundle_info(publish_job.bundle)


def test_every_missed_bar_is_named_and_nothing_is_registered(publish_job):
    from pipelines.evaluation.publish import publish

    high = publish_job.model_copy(
        update={"min_tokens_per_forward": 99.0, "max_ar_loss": 0.01, "max_diffusion_loss": 0.02}
    )
    with pytest.raises(GateError, match=r"tokens per forward is .* ar_loss is .* diffusion_loss is"):
        publish(high)
    with pytest.raises(RegistryError, match="no model"):
        model_registry.resolve(publish_job.tracking_uri, "models:/m@challenger")


def test_a_report_about_another_bundle_is_refused(publish_job, ar_bundle):
    from pipelines.evaluation.publish import publish

    with pytest.raises(GateError, match="evaluate this bundle first"):
        publish(publish_job.model_copy(update={"bundle": ar_bundle.output}))


def test_a_model_of_nan_ends_an_evaluation_in_one_line_without_a_report(evaluate_job, tmp_path):
    from pipelines.evaluation.evaluate import evaluate

    lost = save_lost_bundle(tmp_path / "lost")
    job = evaluate_job.model_copy(update={"bundle": str(lost), "parent": None, "output": str(tmp_path / "report")})
    with pytest.raises(BundleError, match="weights that are not finite") as caught:
        evaluate(job)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lost"]


def test_a_missing_report_is_named(publish_job, tmp_path):
    from pipelines.evaluation.publish import publish

    with pytest.raises(ConfigError, match="run evaluate first"):
        publish(publish_job.model_copy(update={"report": str(tmp_path)}))
