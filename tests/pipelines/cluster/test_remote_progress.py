"""Progress of a job that runs in the cluster."""

import pytest
import ray

from pipelines.cluster.remote_progress import remote_progress, report_progress


@pytest.mark.ray
def test_the_last_report_of_a_task_is_shown_with_figures_that_were_measured_before_it(ray_cluster, capsys):
    with remote_progress("train dual", total=3, unit="steps") as reports:
        report_progress(reports, 1, {"validation_loss": 2.5, "ar_loss": 3.0})
        report_progress(reports, 2, {"ar_loss": 2.25})
        ray.get(reports.latest.remote())
    assert capsys.readouterr().err.splitlines()[-1] == "train dual: 2/3 steps validation_loss 2.5 ar_loss 2.25"
