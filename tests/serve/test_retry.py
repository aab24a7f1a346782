"""A text that nobody has read yet is begun again where its replica died; another ends with one error."""

import asyncio

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, ActorUnavailableError

from serve_apps import retry
from serve_apps.errors import ReplicaLostError, problem_of
from serve_apps.pieces import Failed, Piece, Tally
from tidar_core.errors import CapacityError

ADMITTED = Piece("", None, Tally(prompt_tokens=3))
SOME = Piece("a", None, Tally(3, 1))
HELD_BACK = Piece("", None, Tally(3, 1))
LAST = Piece("b", "stop", Tally(3, 2))
DEATH, ABSENCE = ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)
RESET = AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata(), "Received RST_STREAM with error code 2")


class Stream:
    """What one replica says, in the place of Serve's stream of it."""

    def __init__(self, said):
        self.said, self.cancelled = list(said), False

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for one in self.said:
            if isinstance(one, Exception):
                raise one
            yield one


def ask(*replicas):
    """A way to ask, which gives each time what the next replica says; and those streams."""
    streams = [Stream(said) for said in replicas]
    return iter(streams).__next__, streams


async def collected(asking):
    return [piece async for piece in retry.pieces(asking)]


@pytest.mark.parametrize("death", [DEATH, ABSENCE, RESET])
def test_a_text_of_which_nothing_was_told_is_written_elsewhere(death):
    asking, _ = ask([death], [ADMITTED, death], [ADMITTED, SOME, LAST])
    assert asyncio.run(collected(asking)) == [ADMITTED, ADMITTED, SOME, LAST]


@pytest.mark.parametrize("death", [DEATH, RESET])
@pytest.mark.parametrize("told", [SOME, HELD_BACK])
def test_a_text_that_was_begun_ends_with_one_error_which_no_client_repeats(told, death):
    asking, streams = ask([ADMITTED, told, death], [LAST])
    with pytest.raises(ReplicaLostError, match="what was told of it is all") as caught:
        asyncio.run(collected(asking))
    problem = problem_of(caught.value)
    assert (problem.status, problem.type, problem.code) == (500, "server_error", "replica_lost")
    assert problem.headers == {"x-should-retry": "false"}
    assert not any(stream.cancelled for stream in streams)


def test_a_request_that_three_replicas_died_of_is_not_tried_again():
    asking, streams = ask([DEATH], [DEATH], [DEATH], [LAST])
    with pytest.raises(ReplicaLostError, match="3 replicas have died"):
        asyncio.run(collected(asking))
    assert asking() is streams[3]


def test_a_replica_that_dies_after_the_end_of_a_text_is_not_missed():
    asking, _ = ask([ADMITTED, LAST, DEATH])
    assert asyncio.run(collected(asking)) == [ADMITTED, LAST]


def test_a_refusal_is_an_answer_and_other_errors_are_not_tried_again():
    refused = Failed(CapacityError("full"))
    assert asyncio.run(collected(ask([refused])[0])) == [refused]
    asking, (stream, _) = ask([ZeroDivisionError()], [LAST])
    with pytest.raises(ZeroDivisionError):
        asyncio.run(collected(asking))
    assert stream.cancelled


def test_who_leaves_in_the_middle_cancels_what_he_asked_for():
    asking, (stream,) = ask([ADMITTED, SOME, LAST])

    async def leave():
        pieces = retry.pieces(asking)
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(leave())
    assert stream.cancelled


def test_a_short_answer_is_asked_for_three_times_at_most():
    async def answering(deaths):
        left = iter([DEATH] * deaths)

        async def replica():
            if (death := next(left, None)) is not None:
                raise death
            return "answer"

        return await retry.answer(replica)

    assert asyncio.run(answering(2)) == "answer"
    with pytest.raises(ReplicaLostError):
        asyncio.run(answering(3))
