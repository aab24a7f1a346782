"""Captured steps, replayed by address on a CPU: whatever happens between two replays, the texts are the plain ones."""

import gc
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from decoding import GREEDY, expected_texts, prefilled, prompts, requests
from replay import StandInRecorder
from tiny import wide_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.cuda_graphs import CudaRecorder, StepGraphs
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, FixedMode, StepPlan
from tidar_core.planning.candidate_plans import few_candidates, timed_plans
from tidar_core.transformer.shapes import named_shape

pytestmark = pytest.mark.usefixtures("plain_kernels")
K = 4
SAMPLED = SamplingConfig(max_tokens=12, temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=6)


@pytest.fixture(scope="module")
def long_model():
    return wide_model(replace(named_shape("tiny"), context_len=320))


def capturing(model, *, rows=3, kind="argmax", **settings):
    """A decoder whose steps are captured, and the stand-in that captures them."""
    decoder = Decoder(model, DraftConfig(block_len=K, kind=kind), slots=rows, **settings)
    recorder = StandInRecorder()
    decoder._graphs = StepGraphs(decoder._runner, recorder)
    return decoder, recorder


def forget_everything():
    """Empty every cache of the core."""
    modules = [module for name, module in sys.modules.items() if name.startswith("tidar_core.")]
    for cached in {value for module in modules for value in vars(module).values() if hasattr(value, "cache_clear")}:
        cached.cache_clear()
    gc.collect()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, beta=0.5), replace(GREEDY, logprobs=2)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["argmax", "sampled"])
def test_replayed_steps_give_the_results_of_plain_steps(model, mode, sampling, kind):
    decoder, recorder = capturing(model, kind=kind, context_len=64, page_len=4, pages=36)
    plain = Decoder(model, DraftConfig(block_len=K, kind=kind), slots=3, context_len=64, page_len=4, pages=36)
    texts = requests(prompts(5, 12, 3, 8), sampling)
    done, known = (complete(Scheduler(d, FixedMode(mode, K)), texts) for d in (decoder, plain))
    assert [c.token_ids for c in done] == [c.token_ids for c in known]
    assert [len(c.logprobs) for c in done] == [len(c.logprobs) for c in known]
    assert recorder.made_bytes


def test_captured_steps_outlive_prompts_of_more_lengths_than_any_cache_holds(long_model):
    decoder, _ = capturing(long_model, rows=1)
    scheduler, sampling = Scheduler(decoder, FixedMode("single-pass", K)), replace(GREEDY, max_tokens=6)
    texts = prompts(5, *range(1, 300))
    first = complete(scheduler, requests(texts[:1], sampling))[0]
    captured = decoder._graphs.captured
    for text in requests(texts[1:], replace(sampling, max_tokens=1)):
        complete(scheduler, [text])
    for length in range(1, 300):
        decoder._runner.tensors_of(StepPlan(length))
    forget_everything()
    assert complete(scheduler, requests(texts[:1], sampling))[0].token_ids == first.token_ids
    assert tuple(first.token_ids) == expected_texts(long_model, texts[:1], sampling)[0]
    assert decoder._graphs.captured == captured, "the steps were replayed, not captured again"


def test_prefills_of_any_length_push_no_decode_step_out_of_the_cache(long_model):
    decoder, _ = capturing(long_model, rows=1)
    scheduler, stepper = Scheduler(decoder), decoder._runner
    mine = stepper.tensors_of(StepPlan(K, (1,)))
    for i, text in enumerate(requests(prompts(*range(1, 280)), replace(GREEDY, max_tokens=1))):
        prefilled(scheduler, replace(text, request_id=f"{i}"))
    assert stepper.tensors_of(StepPlan(K, (1,))) is mine
    assert stepper._tensors_of_prefill.cache_info().currsize <= 16


@pytest.mark.parametrize("scored", [False, True])
def test_no_captured_shape_keeps_memory_of_its_own(model, scored):
    decoder, recorder = capturing(model, rows=4, context_len=64, page_len=4)
    scheduler, graphs = Scheduler(decoder), decoder._graphs
    for request in requests(prompts(5, 12, 3, 8), replace(GREEDY, logprobs=1 if scored else None)):
        prefilled(scheduler, request)
    state = decoder._state.snapshot()
    for sampling in (GREEDY, SAMPLED):
        decoder._state.gather_sampling([sampling] * 4)
        for batch in (1, 2, 4):
            for plan in timed_plans(few_candidates(K)):
                with torch.inference_mode():
                    graphs.step(batch, plan, 3, scored=scored)
                    decoder._state.restore(state)
    assert graphs.captured == len(recorder.kept_bytes) > 30
    assert set(recorder.kept_bytes) == {0}
    assert min(recorder.made_bytes) > 0


def test_a_captured_step_computes_a_power_of_two_of_slots(model):
    decoder, _ = capturing(model, rows=6, context_len=64)
    plain = Decoder(model, DraftConfig(block_len=K), slots=6, context_len=64)
    assert [decoder.computed_slots(batch) for batch in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert [plain.computed_slots(batch) for batch in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_the_outcomes_of_all_shapes_lie_in_the_same_memory(model):
    decoder, _ = capturing(model, rows=4, context_len=64, page_len=4)
    with torch.inference_mode():
        found = [decoder._graphs.step(b, p, 0, scored=True) for b in (1, 4) for p in timed_plans(few_candidates(K))]
    assert len({outcome.accepted_emitted.untyped_storage().data_ptr() for outcome in found}) == 1
    assert len({outcome.ar_logits.untyped_storage().data_ptr() for outcome in found}) == 1
    assert found[0].ar_logits.untyped_storage().nbytes() == 4 * K * model.config.vocab_size * 4


class FakeCuda:
    """As much of torch.cuda as a capture calls; it knows how many captures run at once."""

    def __init__(self):
        self.captures, self.running, self.most = [], 0, 0

    def into(self, monkeypatch):
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device: stream,
            "stream": lambda stream: nullcontext(),
            "graph_pool_handle": object,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def graph(self, graph, **settings):
        self.captures.append(settings)
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.01)
        yield
        self.running -= 1


def test_two_owners_capture_on_their_own_streams_and_pools_one_at_a_time_and_disturb_no_other_thread(monkeypatch):
    cuda = FakeCuda()
    cuda.into(monkeypatch)
    recorders = [CudaRecorder(torch.device("cuda")) for _ in range(2)]
    threads = [Thread(target=r.record, args=(lambda: None, lambda: None)) for r in recorders for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(cuda.captures), cuda.most) == (6, 1)
    assert {settings["capture_error_mode"] for settings in cuda.captures} == {"thread_local"}
    assert len({id(settings["stream"]) for settings in cuda.captures}) == 2
    assert len({id(settings["pool"]) for settings in cuda.captures}) == 2
