"""A release reports only measured values, and every stage of it refuses a model of nan."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny import save_tiny_bundle, save_tiny_shards

from pipelines.evaluation.evaluate import measured
from pipelines.evaluation.job import EvaluateJob, PublishJob
from pipelines.evaluation.publish import publish
from pipelines.evaluation.report import markdown, report_metrics, write_report
from tidar_core.artifacts.model import bundle as bundles
from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.shards import ShardReader
from tidar_core.errors import BundleError, ConfigError, GateError, RegistryError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle and shards of its tokenizer."""
    folder = tmp_path_factory.mktemp("release")
    save_tiny_bundle(folder / "bundle")
    save_tiny_shards(folder / "shards")
    return folder


def evaluation(folder, **changes):
    values = {"bundle": str(folder / "bundle"), "shards": str(folder / "shards"), "output": str(folder / "report"),
              "prompts": 2, "prompt_len": 2, "max_tokens": 6, "batch": 2, "repeats": 1}  # fmt: skip
    return EvaluateJob.model_validate(values | changes)


def report_of(job, bundle=None):
    found = measured(job, bundle or load_bundle(job.bundle), ShardReader(job.shards, "held_out"), lambda: None)
    del found["texts"]
    return found | {"parent": None, "tasks": [], "service": None}


@pytest.fixture(scope="module")
def report(folder):
    return report_of(evaluation(folder))


def publishing(folder, report, **changes):
    path = folder / "report.json"
    path.write_text(json.dumps(report))
    values = {"bundle": str(folder / "bundle"), "report": str(path), "name": "m",
              "tracking_uri": f"sqlite:///{folder}/mlflow.db"}  # fmt: skip
    return PublishJob.model_validate(values | changes)


def test_a_healthy_bundle_is_published_and_promoted(folder, report):
    job = publishing(folder, report, name="it's healthy")
    version = publish(job)
    assert model_registry.promote(job.tracking_uri, "it's healthy", version) == version


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_report_with_a_figure_that_is_not_finite_is_refused_by_name_whatever_the_bars(folder, report, value):
    lost = report | {"ar_loss": value, "modes": {"single-pass": {"over_ar_spread": [1.0, value]}}}
    with pytest.raises(
        GateError, match=rf"2 figures .*: ar_loss {value}, modes.single-pass.over_ar_spread\[1\] {value}"
    ):
        publish(publishing(folder, lost, name="lost", require_greedy_equal=False))
    with pytest.raises(RegistryError, match="no model"):
        model_registry.list_versions(f"sqlite:///{folder}/mlflow.db", "lost")


@pytest.mark.parametrize("content", ["[]", "{}", "1"])
def test_a_file_that_is_no_report_is_one_line(folder, content):
    with pytest.raises(ConfigError, match="names no bundle_hash and shards"):
        publish(publishing(folder, json.loads(content)))


def test_means_over_no_labels_and_no_verifications_are_not_measured(folder, tmp_path):
    job = evaluation(folder, max_tokens=1, output=str(tmp_path / "report"))
    bundle, reader = load_bundle(job.bundle), ShardReader(job.shards, "held_out")

    class Unlabelled:
        """The same rows, none of whose tokens is to be trained."""

        manifest, uri, rows_of = reader.manifest, reader.uri, staticmethod(reader.rows)

        def __len__(self):
            return len(reader)

        def rows(self, indices):
            rows = self.rows_of(indices)
            return replace(rows, trained_BS=torch.zeros_like(rows.input_ids_BS, dtype=torch.bool))

    found = measured(job, bundle, Unlabelled(), lambda: None) | {"parent": None, "tasks": [], "service": None}
    names = ("ar_loss", "diffusion_loss", "tokens_per_forward", "tokens_per_round", "acceptance_by_position")
    assert [found[name] for name in names] == [None] * 5
    assert found["draft_accuracy"] == [None] * 4
    assert "| diffusion loss (nats per token) | not measured |" in markdown(found).splitlines()
    assert not report_metrics(found).keys() & set(names)
    write_report(job, found)
    bars = {"max_ar_loss": 9.0, "max_diffusion_loss": 9.0}
    with pytest.raises(GateError) as caught:
        publish(publishing(folder, json.loads((tmp_path / "report/report.json").read_text()), **bars))
    for name in ("tokens per forward", "ar_loss", "diffusion_loss"):
        assert f"{name} was not measured" in str(caught.value)


def spoil(model, how):
    with torch.no_grad():
        if how == "nan":
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        elif how == "one infinite weight":
            model.layers[1].mlp.down.weight[0, 0] = math.inf
        else:
            model.layers[0].mlp.gate_up.weight.mul_(1e21)


SPOILED = [
    ("nan", r"weights that are not finite, in \d+ of \d+ tensors, such as "),
    ("one infinite weight", "in 1 of .*, such as layers.1.mlp.down.weight"),
    ("too large", "finite weights whose logits are not finite in float32"),
]


@pytest.mark.parametrize(("how", "words"), SPOILED)
def test_a_model_that_is_not_finite_is_neither_written_nor_loaded(folder, tmp_path, monkeypatch, how, words):
    model, tokenizer, info = (lambda b: (b.model, b.tokenizer, b.info))(load_bundle(folder / "bundle"))
    spoil(model, how)
    fields = {"block_len": 4, "mask_id": info.mask_id, "objective": "dual", "lineage": {}, "made_by": {}}
    with pytest.raises(BundleError, match=words) as caught:
        save_bundle(str(tmp_path / "lost"), model, tokenizer, **fields)
    assert "\n" not in str(caught.value)
    assert "diverged" not in str(caught.value)  # the model may come from elsewhere, or be damaged
    assert not (tmp_path / "lost").exists()
    with monkeypatch.context() as patch:
        patch.setattr(bundles, "require_finite", lambda *_: None)
        save_bundle(str(tmp_path / "lost"), model, tokenizer, **fields)
    with pytest.raises(BundleError, match=words):
        load_bundle(tmp_path / "lost")


def test_losses_that_are_not_finite_end_an_evaluation_by_name(folder):
    job = evaluation(folder)
    bundle = load_bundle(job.bundle)
    spoil(bundle.model, "nan")
    with pytest.raises(
        BundleError, match=r"no finite loss on held-out rows .*\(ar_loss nan, diffusion_loss nan\); a finite"
    ):
        report_of(job, bundle)
