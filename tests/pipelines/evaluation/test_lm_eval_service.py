"""lm-eval's client of a running service, where the environment names a proxy."""

import pytest
from proxies import answering, refusing_proxy
from tiny import save_tiny_bundle

from pipelines.evaluation.job import EvaluateJob
from pipelines.evaluation.lm_eval_service import ServiceModel
from tidar_core.artifacts.model.bundle_info import read_bundle_info


@pytest.mark.parametrize("concurrent", [1, 2])
def test_a_service_on_loopback_is_reached_past_the_proxy(monkeypatch, tmp_path, concurrent):
    bundle = str(save_tiny_bundle(tmp_path / "tiny"))
    card = {"id": "tiny", "bundle_hash": read_bundle_info(bundle).bundle_hash, "mode": "single-pass", "block_len": 4,
            "max_model_len": 64}  # fmt: skip
    text = {"choices": [{"index": 0, "text": "a"}]}
    with answering(lambda path: {"data": [card]} if path == "/v1/models" else text) as server:
        job = EvaluateJob.model_validate(
            {"bundle": bundle, "shards": "s", "output": "o", "service": f"{server}/v1", "task_batch": concurrent}
        )
        with refusing_proxy(monkeypatch) as proxied:
            model = ServiceModel(job)
            assert model.model_call([[1, 2]], generate=True, gen_kwargs={}) == text
            assert proxied == []
