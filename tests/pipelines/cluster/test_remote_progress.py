"""Progress of a job that runs in the cluster."""

import pytest

from pipelines.cluster.remote_progress import remote_progress, report_line, report_progress, report_start


@pytest.mark.ray
def test_the_last_report_of_a_task_is_shown_with_figures_that_were_measured_before_it(ray_cluster, capsys):
    with remote_progress("train dual", total=3, unit="steps") as reports:
        report_progress(reports, 1, {"validation_loss": 2.5, "ar_loss": 3.0})
        report_progress(reports, 2, {"ar_loss": 2.25})
    assert capsys.readouterr().err.splitlines()[-1] == "train dual: 2/3 steps validation_loss 2.5 ar_loss 2.25"


@pytest.mark.ray
def test_a_line_is_shown_once_and_a_start_only_if_it_is_not_the_first(ray_cluster, capsys):
    with remote_progress("train dual", total=3, unit="steps") as reports:
        report_start(reports, "again")
        report_progress(reports, 1, {})
        report_line(reports, "worker 1 failed: OSError: no [disk]")
        report_start(reports, "again")
        report_progress(reports, 2, {})
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("train")] == ["worker 1 failed: OSError: no [disk]", "again"]
    assert lines[-1] == "train dual: 2/3 steps"
