"""The text deltas of one request, and the messages in which they leave the engine."""

import time
from multiprocessing.connection import Pipe

import pytest
from tiny import wide_model

from serve_apps.messages.engine_calls import TextDeltas
from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.request_timing import TimingRecorder
from serve_apps.messages.text_delta import GenerationFailed, TextDelta, UsageCounts
from serve_apps.replica.decode_loop import DecodeLoop
from serve_apps.replica.delta_receiver import DeltaReceiver
from serve_apps.replica.engine_server import _Outbox
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep, Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.transformer.shapes import named_shape


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["plain words, then more plain words"], 270)


def receiver_of(tokenizer, sent, check_end=lambda: None, **fields):
    request = GenerationRequest(request_id="r", prompt="x", sampling=SamplingConfig(max_tokens=99), **fields)
    return DeltaReceiver(
        tokenizer, request, (5,), sent.append, block_len=4, fingerprint="f", tool_form=None, timing=TimingRecorder(),
        check_end=check_end,
    )  # fmt: skip


def step(tokens, reason=None):
    return DecodeStep("r", tuple(tokens), reason, 1, 1, 1)


def test_a_stop_string_ends_the_text_with_the_step_that_completes_it(tokenizer):
    sent = []
    receiver = receiver_of(tokenizer, sent, stop=("b",))
    assert [receiver.take(step(tokenizer.encode(text))) for text in "ab"] == [False, True]
    receiver.deliver(last=True)
    (delta,) = sent
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.forwards) == ("a", "stop", "b", 2)


def test_steps_that_are_delivered_together_are_one_delta_and_text_that_is_not_streamed_waits_for_the_end(tokenizer):
    counts = []
    for streamed in (True, False):
        sent = []
        receiver = receiver_of(tokenizer, sent, pieces=streamed)
        receiver.deliver(last=False)
        for text in "abc":
            for _ in range(2):
                receiver.take(step(tokenizer.encode(text)))
            receiver.deliver(last=False)
        receiver.take(step(tokenizer.encode("d"), "length"))
        receiver.deliver(last=True)
        assert "".join(delta.text for delta in sent) == "aabbccd"
        counts.append(len(sent))
    assert counts == [5, 2]


def test_an_error_ends_its_own_text_and_no_other(tokenizer):
    sent = []

    def fail():
        raise ZeroDivisionError

    receiver = receiver_of(tokenizer, sent, check_end=fail)
    assert receiver.take(step(tokenizer.encode("a"), "stop"))
    receiver.deliver(last=True)
    (failed,) = sent
    assert isinstance(failed, GenerationFailed)
    assert isinstance(failed.error, ZeroDivisionError)


class Sequence:
    """Receiver that counts its deliveries in a list of all of them."""

    def __init__(self, name, deliveries):
        self.name, self.deliveries, self.ended = name, deliveries, False

    def take(self, _):
        return False

    def deliver(self, *, last):
        self.deliveries.append(self.name)
        self.ended = last


@pytest.mark.parametrize("last", [False, True])
def test_an_error_while_a_delta_is_made_ends_its_own_text_once(tokenizer, monkeypatch, last):
    sent = []
    receiver = receiver_of(tokenizer, sent, pieces=True)

    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(receiver._text, "take", fail)
    receiver.take(step(tokenizer.encode("a"), "length" if last else None))
    receiver.deliver(last=last)
    if not last:
        assert receiver.take(step(tokenizer.encode("b")))
        receiver.deliver(last=True)
    (failed,) = sent
    assert isinstance(failed, GenerationFailed)
    assert isinstance(failed.error, ZeroDivisionError)


def test_deliveries_of_one_forward_are_flushed_together():
    model = wide_model(named_shape("tiny", vocab_len=300))
    messages, deliveries = [], []

    def flush():
        if deliveries:
            messages.append(sorted(deliveries))
            deliveries.clear()

    loop = DecodeLoop(Scheduler(Decoder(model, DraftConfig(block_len=4), slots=2)), flush=flush)
    sequences = [Sequence(name, deliveries) for name in "ab"]
    for sequence in sequences:
        sampling = SamplingConfig(max_tokens=60)
        loop.start(Request(request_id=sequence.name, prompt=(5, 6), sampling=sampling), sequence)
    while not all(sequence.ended for sequence in sequences):
        assert loop._thread.is_alive()
        time.sleep(0.001)
    loop.stop()
    assert ["a", "b"] in messages
    assert all(len(set(message)) == len(message) for message in messages)


def test_the_engine_sends_all_deltas_of_a_flush_in_one_message():
    ours, theirs = Pipe()
    outbox, delta = _Outbox(theirs), TextDelta("a", None, UsageCounts(1, 2))
    outbox.flush()
    outbox.add(1, delta)
    outbox.add(2, delta)
    outbox.flush()
    assert ours.recv() == TextDeltas([(1, delta), (2, delta)])
    assert not ours.poll()
