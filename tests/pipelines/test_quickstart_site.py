"""The folder of a quickstart after a run that was killed: what is damaged is made again."""

import json

import pytest
from tiny import save_tiny_bundle

from pipelines.evaluation.job import EvaluateJob
from pipelines.quickstart.site import Site
from tidar_core.artifacts.model.bundle_info import read_bundle_info


@pytest.fixture
def site(tmp_path):
    return Site.of(tmp_path / "workdir")


def evaluation(site):
    save_tiny_bundle(site.path("bundle"))
    return EvaluateJob(bundle=site.path("bundle"), shards=site.path("shards"), output=site.path("report"))


def test_a_report_about_the_present_bundle_is_reused(site):
    job = evaluation(site)
    assert site.finished_report(job) is None
    report = {"bundle_hash": read_bundle_info(job.bundle).bundle_hash, "ar_loss": 2.0}
    (site.workdir / "report").mkdir()
    (site.workdir / "report/report.json").write_text(json.dumps(report))
    assert site.finished_report(job) == report
    (site.workdir / "report/report.json").write_text(json.dumps(report | {"bundle_hash": "other"}))
    assert site.finished_report(job) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 10**5], ids=["empty", "cut", "list", "{}", "deep"])
def test_a_damaged_report_or_comparison_is_made_again(site, content):
    job = evaluation(site)
    (site.workdir / "report").mkdir()
    for place in ("report/report.json", "compared-train.json"):
        (site.workdir / place).write_text(content)
        assert site.kept_figures(site.path(place), job.bundle) is None
    assert site.finished_report(job) is None


def test_a_job_file_appears_whole_or_not_at_all(site, monkeypatch):
    monkeypatch.setattr("pipelines.quickstart.site.yaml.safe_dump", lambda *_, **__: 1 / 0)
    values = {"bundle": "b", "shards": "s", "output": "o"}
    with pytest.raises(ZeroDivisionError):
        site.job("evaluate", EvaluateJob, **values)
    assert list((site.workdir / "jobs").iterdir()) == []
    monkeypatch.undo()
    made = site.job("evaluate", EvaluateJob, **values)
    assert site.job("evaluate", EvaluateJob, **values | {"bundle": "other"}) == made
