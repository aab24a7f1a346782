"""What a log says of a job that runs in the cluster."""

from pipelines.cluster.remote_progress import log_line


def test_a_line_says_how_far_how_well_and_how_much_longer():
    numbers = {"ar_loss": 2.34567, "tokens_per_second": 123456.0, "eta_seconds": 3 * 3600 + 62.4}
    assert log_line("train dual", 120, 23842, "steps", numbers) == (
        "train dual: 120/23842 steps ar_loss 2.346 tokens_per_second 1.235e+05 left 3:01:02"
    )
    assert log_line("evaluate", 1, 2, "parts", {}) == "evaluate: 1/2 parts"
