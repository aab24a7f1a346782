"""Progress in a log: whole lines, seldom enough to be read."""

import pytest

from pipelines.cluster.console import figure, size, stderr
from pipelines.cluster.progress import job_progress, log_line

LONG = "a title that is longer than the eighty columns which a terminal without a size is taken to have, by far"


def test_a_line_holds_units_figures_and_the_time_left():
    numbers = {"ar_loss": 2.34567, "tokens_per_second": 123456.0, "eta_seconds": 3 * 3600 + 62.4}
    assert log_line("train dual", 120, 23842, "steps", numbers) == (
        "train dual: 120/23842 steps ar_loss 2.346 tokens_per_second 123,456 left 3:01:02"
    )
    assert log_line("evaluate", 1, 2, "parts", {}) == "evaluate: 1/2 parts"


def test_a_log_gets_one_unbroken_line_for_each_state_and_always_the_last(capsys):
    with job_progress(LONG, total=3, unit="steps", line_seconds=0) as show:
        for done in (1, 1, 2):
            show(done, {"ar_loss": 2.0})
    assert capsys.readouterr().err.splitlines() == [f"{LONG}: {n}/3 steps ar_loss 2" for n in (1, 2)]


def test_a_log_gets_the_last_state_alone_when_a_job_is_shorter_than_the_time_between_lines(capsys):
    def fail():
        with job_progress("pack [1]", total=3, unit="units") as show:
            show(1, {})
            show(2, {"MB": 1.5})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err == "pack [1]: 2/3 units MB 1.5\n"


def test_the_console_of_a_log_wraps_no_line(capsys):
    stderr.print(LONG * 3)
    assert capsys.readouterr().err == f"{LONG * 3}\n"


def test_figures_have_four_digits_and_bytes_a_unit():
    assert [figure(value) for value in (1234567, 1234567.8, 0.000012345, 2.0)] == [
        "1,234,567", "1,234,568", "1.234e-05", "2",
    ]  # fmt: skip
    assert [size(count) for count in (3 * 2**30, 3 * 2**20, -(2**30))] == ["3.00 GiB", "3.0 MiB", "-1.00 GiB"]
