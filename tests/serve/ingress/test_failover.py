"""A text of which nothing was sent is begun again where its replica died; another ends with one error."""

import asyncio

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, ActorUnavailableError

from serve_apps.api.errors import ReplicaLostError, problem_of
from serve_apps.ingress import failover
from serve_apps.messages.text_delta import GenerationFailed, TextDelta, UsageCounts
from tidar_core.errors import CapacityError

ADMITTED = TextDelta("", None, UsageCounts(prompt_tokens=3))
SOME = TextDelta("a", None, UsageCounts(3, 1))
HELD_BACK = TextDelta("", None, UsageCounts(3, 1))
LAST = TextDelta("b", "stop", UsageCounts(3, 2))
DEATH, ABSENCE = ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)
TOO_LARGE = AioRpcError(
    StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata(), "SERVER: Received message larger than max (5 vs. 4)"
)
LOST, CLOSED = (
    AioRpcError(code, Metadata(), Metadata(), "the channel is closed")
    for code in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
)
RESET = AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata(), "Received RST_STREAM with error code 2")


class Stream:
    """Items of one replica, in the place of Serve's stream."""

    def __init__(self, items):
        self.items, self.cancelled = list(items), False

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for one in self.items:
            if isinstance(one, Exception):
                raise one
            yield one


def calls_of(*replicas):
    """A call that returns the stream of the next replica each time; and all streams."""
    streams = [Stream(items) for items in replicas]
    return iter(streams).__next__, streams


async def collected(call):
    return [piece async for piece in failover.Text(call).deltas()]


def again(attempt, *pieces):
    return [piece._replace(attempt=attempt) for piece in pieces]


@pytest.mark.parametrize("death", [DEATH, ABSENCE, RESET, LOST, CLOSED])
@pytest.mark.parametrize("received", [(), (ADMITTED,), (ADMITTED, HELD_BACK), (SOME,)])
def test_a_text_of_which_nothing_was_sent_is_generated_elsewhere_whatever_its_replica_had_sent(death, received):
    call, streams = calls_of([death], [*received, death], [ADMITTED, SOME, LAST])
    assert asyncio.run(collected(call)) == again(1, *received) + again(2, ADMITTED, SOME, LAST)
    assert not any(stream.cancelled for stream in streams)


def test_what_a_dead_replica_wrote_counts_for_nothing_once_another_writes():
    async def read():
        text = failover.Text(calls_of([SOME, DEATH], [SOME, LAST])[0])
        return [(piece.text, text.counts(piece), text.counts(SOME)) async for piece in text.deltas()]

    assert asyncio.run(read()) == [("a", True, True), ("a", True, False), ("b", True, False)]


@pytest.mark.parametrize("death", [DEATH, RESET])
def test_a_text_of_which_something_was_sent_ends_with_one_error_which_no_client_repeats(death):
    call, streams = calls_of([ADMITTED, SOME, death], [LAST])

    async def send():
        text = failover.Text(call)
        async for piece in text.deltas():
            text.sent = bool(piece.text)

    with pytest.raises(ReplicaLostError, match="what was sent of it is all") as caught:
        asyncio.run(send())
    problem = problem_of(caught.value)
    assert (problem.status, problem.type, problem.code) == (500, "server_error", "replica_lost")
    assert problem.headers == {"x-should-retry": "false"}
    assert not any(stream.cancelled for stream in streams)


def test_a_request_that_three_replicas_died_of_is_not_tried_again():
    call, streams = calls_of([DEATH], [DEATH], [DEATH], [LAST])
    with pytest.raises(ReplicaLostError, match="3 replicas have died"):
        asyncio.run(collected(call))
    assert call() is streams[3]


@pytest.mark.parametrize(
    "code", [code for code in StatusCode if code not in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)]
)
def test_a_grpc_error_of_a_live_replica_is_no_death(code):
    error = AioRpcError(code, Metadata(), Metadata(), TOO_LARGE.details())
    call, (stream, _) = calls_of([error], [LAST])
    with pytest.raises(AioRpcError) as caught:
        asyncio.run(collected(call))
    assert caught.value is error
    assert stream.cancelled
    assert problem_of(error).code is None

    async def replica():
        raise error

    with pytest.raises(AioRpcError):
        asyncio.run(failover.answer(replica))


def test_a_replica_that_dies_after_the_end_of_a_text_is_not_missed():
    call, _ = calls_of([ADMITTED, LAST, DEATH])
    assert asyncio.run(collected(call)) == [ADMITTED, LAST]


def test_a_refusal_is_an_answer_and_other_errors_are_not_tried_again():
    refused = GenerationFailed(CapacityError("full"))
    assert asyncio.run(collected(calls_of([refused])[0])) == [refused]
    call, (stream, _) = calls_of([ZeroDivisionError()], [LAST])
    with pytest.raises(ZeroDivisionError):
        asyncio.run(collected(call))
    assert stream.cancelled


def test_a_reader_that_leaves_in_the_middle_cancels_its_call():
    call, (stream,) = calls_of([ADMITTED, SOME, LAST])

    async def leave():
        pieces = failover.Text(call).deltas()
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(leave())
    assert stream.cancelled


@pytest.mark.parametrize("death", [DEATH, ABSENCE, RESET, LOST, CLOSED])
def test_a_short_call_is_tried_three_times_at_most(death):
    async def answering(deaths):
        left = iter([death] * deaths)

        async def replica():
            for lost in left:
                raise lost
            return "answer"

        return await failover.answer(replica)

    assert asyncio.run(answering(2)) == "answer"
    with pytest.raises(ReplicaLostError):
        asyncio.run(answering(3))
