"""A text ends at the first stop string that is complete, however it was cut into chunks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidar_core.decoding.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab🎉", min_size=1, max_size=12)


def read(pieces, strings, include=False):
    """Text that is released after each chunk and at the end, and the string that was found."""
    stops, released = StopStrings(strings, include=include), []
    for piece in pieces:
        released.append(stops.push(piece))
        if stops.found is not None:
            return released, stops.found
    return [*released, stops.flush()], None


def ended_by_hand(text, strings, include):
    """One more character at a time, looking for everything anew."""
    for end in range(1, len(text) + 1):
        for string in sorted(strings, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end if include else end - len(string)], string
    return text, None


@pytest.mark.parametrize(
    ("pieces", "strings", "released", "found"),
    [
        (["one ", "two"], [], ["one ", "two", ""], None),
        (["one STOP two"], ["STOP"], ["one "], "STOP"),
        (["one ST", "OP two"], ["STOP"], ["one ", ""], "STOP"),
        (["one S", "T", "O", "P"], ["STOP"], ["one ", "", "", ""], "STOP"),
        (["one ST", "AY"], ["STOP"], ["one ", "STAY", ""], None),
        (["one ST"], ["STOP"], ["one ", "ST"], None),
        (["aab", "aac"], ["aac"], ["aab"[:3], ""], "aac"),
        (["abc"], ["b", "abc"], ["a"], "b"),  # b is complete first
        (["abc"], ["bc", "abc", "c"], [""], "abc"),  # all at once: the longest
        (["日", "本語", "!"], ["本語!"], ["日", "", ""], "本語!"),
    ],
)
def test_the_text_is_released_up_to_the_first_stop_string(pieces, strings, released, found):
    assert read(pieces, strings) == (released, found)


def test_the_stop_string_is_part_of_the_text_where_the_request_wants_it_and_then_nothing_is_held_back():
    assert read(["one ST", "OP two"], ["STOP"], include=True) == (["one ST", "OP"], "STOP")
    assert read(["one ST", "AY"], ["STOP"], include=True) == (["one ST", "AY", ""], None)


@given(LETTERS, st.lists(LETTERS, max_size=3), st.lists(st.integers(0, 12)), st.booleans())
def test_the_end_depends_on_the_text_alone(text, strings, cuts, include):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    released, found = read([text[a:b] for a, b in pairwise(edges)], strings, include)
    assert ("".join(released), found) == ended_by_hand(text, strings, include)


@given(LETTERS, st.lists(LETTERS, min_size=1, max_size=3))
def test_what_is_held_back_is_exactly_what_may_begin_a_stop_string(text, strings):
    stops = StopStrings(strings)
    released = stops.push(text)
    if stops.found is None:
        tails = [text[len(text) - n :] for n in range(len(text) + 1)]
        beginning = max(t for t in map(len, (tail for tail in tails if any(s.startswith(tail) for s in strings))))
        assert len(text) - len(released) == beginning


def test_strings_that_are_not_looked_for_yet_do_not_end_a_text_but_may_begin_in_it():
    stops = StopStrings(["ab", "bcd"])
    assert stops.push("ab", looked_for=False) == "a"
    assert stops.found is None
    assert stops.push("cd") == ""
    assert stops.found == "bcd"


def test_a_text_that_has_ended_takes_no_more():
    stops = StopStrings(["a"])
    stops.push("a")
    with pytest.raises(AssertionError):
        stops.push("b")
