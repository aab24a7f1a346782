"""Pages: each belongs to those who hold it, shared ones are found by what they hold, and none is ever lost."""

import random

import pytest

from tidar_core.decoding.page_pool import NULL_PAGE, PagePool, SequencePages, chain_key, page_count


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_tokens_take_so_many_pages(tokens, pages):
    assert page_count(tokens, 4) == pages


def test_a_pool_hands_out_every_page_once_and_never_the_null_page():
    pool, taken_pages = PagePool(5, 4), SequencePages()
    assert pool.grow(taken_pages, 20)
    assert sorted(taken_pages.ids) == [1, 2, 3, 4, 5]
    assert NULL_PAGE not in taken_pages.ids
    assert pool.available == 0


def test_growth_that_cannot_be_had_whole_takes_nothing():
    pool, first, second = PagePool(5, 4), SequencePages(), SequencePages()
    assert pool.grow(first, 12)
    assert not pool.grow(second, 12)
    assert (second.ids, pool.available) == ([], 2)
    assert pool.grow(first, 12), "pages that are there already need not be had again"
    assert len(first.ids) == 3


def filled(pool, tokens, committed_len=None):
    taken_pages = SequencePages()
    assert pool.grow(taken_pages, len(tokens))
    pool.commit(taken_pages, tokens, len(tokens) if committed_len is None else committed_len)
    return taken_pages


def test_a_prompt_shares_the_full_pages_it_begins_with():
    pool = PagePool(8, 2)
    first = filled(pool, [1, 2, 3, 4, 5])
    shared = pool.share([1, 2, 3, 4, 9, 9])
    assert shared.ids == first.ids[:2]
    assert pool.share([1, 2, 3]).ids == first.ids[:1]
    assert pool.share([2, 2, 3, 4]).ids == []
    assert pool.share([9, 9, 3, 4]).ids == [], "the same tokens after others are another page"


def test_drafts_are_never_shared():
    pool = PagePool(8, 2)
    filled(pool, [1, 2, 3, 4], committed_len=3)
    assert len(pool.share([1, 2, 3, 4]).ids) == 1


def test_a_name_stands_for_all_tokens_up_to_the_end_of_its_page():
    first = chain_key(b"", [1, 2])
    assert chain_key(first, [3, 4]) != chain_key(b"", [3, 4])
    assert chain_key(b"", [1, 2]) == first
    assert chain_key(b"", [12]) != chain_key(b"", [1, 2])


def test_pages_that_nobody_holds_are_kept_until_their_room_is_needed():
    pool = PagePool(4, 2)
    old = filled(pool, [1, 2, 3, 4])
    new = filled(pool, [5, 6])
    old_pages, new_pages = list(old.ids), list(new.ids)
    pool.release(old)
    pool.release(new)
    assert pool.available == 4
    assert pool.share([1, 2, 3, 4]).ids == old_pages
    other = SequencePages()
    assert pool.grow(other, 4)
    assert new_pages[0] in other.ids
    assert pool.share([5, 6]).ids == []


def test_the_longest_unused_is_forgotten_first_and_the_end_of_a_chain_before_its_beginning():
    pool = PagePool(3, 2)
    chain = filled(pool, [1, 2, 3, 4, 5, 6])
    first, second, third = chain.ids
    pool.release(chain)
    taken = []
    for _ in range(3):
        taken_pages = SequencePages()
        pool.grow(taken_pages, 2)
        taken += taken_pages.ids
    assert taken == [third, second, first]


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(2, 2)
    first = filled(pool, [1, 2, 3, 4])
    second = pool.share([1, 2, 3, 4])
    pool.release(first)
    assert pool.available == 0
    pool.release(second)
    assert pool.available == 2
    with pytest.raises(AssertionError, match="without a holder"):
        pool.release(SequencePages(ids=[1]))


@pytest.mark.parametrize("seed", range(5))
def test_after_any_random_history_every_page_is_free_again(seed):
    luck, pool, live = random.Random(seed), PagePool(12, 2), []
    for _ in range(2000):
        act = luck.random()
        if act < 0.4:
            tokens = [luck.randint(0, 2) for _ in range(luck.randint(1, 9))]
            taken_pages = pool.share(tokens[:-1])
            if pool.grow(taken_pages, len(tokens)):
                pool.commit(taken_pages, tokens, len(tokens) - 1)
                live.append((taken_pages, tokens))
            else:
                pool.release(taken_pages)
        elif act < 0.7 and live:
            taken_pages, tokens = luck.choice(live)
            tokens.append(luck.randint(0, 2))
            if pool.grow(taken_pages, len(tokens)):
                pool.commit(taken_pages, tokens, len(tokens) - 1)
            else:
                tokens.pop()
        elif live:
            pool.release(live.pop(luck.randrange(len(live)))[0])
        held = {page for taken_pages, _ in live for page in taken_pages.ids}
        assert pool.held == len(held)
        assert pool.available == 12 - len(held)
    for taken_pages, _ in live:
        pool.release(taken_pages)
    assert pool.available == 12
