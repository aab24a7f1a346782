"""The command that compares train steps."""

import json

import pytest
import torch

from pipelines.training.train_bench import main, peak_memory


def test_the_bench_prints_all_objectives_for_each_row_length_and_dtype(capsys):
    small = "--shape tiny --row-lens 32 64 --tokens 128 --repeats 1 --documents 2 --block-len 4 --threads 1"
    small += " --adapter-rank 4"
    main(small.split())
    facts = json.loads(capsys.readouterr().out)
    assert (facts["shape"], facts["block_len"], facts["documents"]) == ("tiny", 4, 2)
    assert [(p["dtype"], p["row_len"], p["rows"]) for p in facts["points"]] == [
        ("fp32", 32, 4), ("fp32", 64, 2), ("bf16", 32, 4), ("bf16", 64, 2)
    ]  # fmt: skip
    for point in facts["points"]:
        ratio = point["ar_tokens_per_second"] / point["dual_tokens_per_second"]
        assert point["dual_over_ar"] == pytest.approx(ratio)
        assert point["dual_activation_mib"] > 1.5 * point["ar_activation_mib"]
        frozen = point["dual_tokens_per_second"] / point["frozen_tokens_per_second"]
        assert point["frozen_over_dual"] == pytest.approx(frozen)
        assert point["frozen_activation_mib"] < 0.8 * point["dual_activation_mib"]


@pytest.mark.slow
def test_peak_memory_is_of_one_process_for_each_objective():
    ballast = torch.ones(2**28)  # 1 GiB that the children do not hold
    peaks = peak_memory("tiny", "fp32", row_len=32, rows=2, documents=2, block_len=4, adapter_rank=4, threads=1)
    assert set(peaks) == {"ar_peak_gib", "dual_peak_gib", "frozen_peak_gib", "frozen_over_dual_peak"}
    ratio = peaks.pop("frozen_over_dual_peak")
    assert ratio == peaks["frozen_peak_gib"] / peaks["dual_peak_gib"]
    assert 0.05 < min(peaks.values()) <= max(peaks.values()) < ballast.nbytes / 2**30
