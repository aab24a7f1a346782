"""Attention in C reads keys in parts; neither parts, nor chunks, nor threads change a token's bits."""

import pytest
import torch
from attending import Text, by_definition

from tidar_core.kernels import on_cpu
from tidar_core.kernels.compiled import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler works here")
PART = 128
"""Keys of a part, as `attention.c` has it."""
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}
BY_SEQUENCE = "q_BRHD", "k_BRGD", "v_BRGD", "page_table_BN", "prefix_len_B"
SHAPES = {"shared keys": (9, 3, 64), "one key head": (6, 1, 40), "own keys": (2, 2, 96)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return dict(zip(("heads", "kv_heads", "size"), request.param, strict=True))


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
@pytest.mark.parametrize("length", [PART - 1, PART, PART + 1, 3 * PART + 5])
def test_a_prompt_has_the_same_bits_in_chunks_of_any_length(shape, length, dtype):
    text = Text(length, dtype=dtype, **shape)
    whole = text.read()
    torch.testing.assert_close(whole.float(), by_definition(text.call(0, length)), **TOLERANCE[dtype])
    for ends in ((1,), (length - 1,), (40, 41, 100), tuple(range(33, length, 33))):
        assert torch.equal(text.read(*ends), whole)


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_the_last_tokens_of_a_long_prompt_read_one_by_one_have_the_bits_of_the_whole(shape, dtype):
    text = Text(700, dtype=dtype, **shape)
    assert torch.equal(text.read(*range(640, 700)), text.read())


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_the_number_of_threads_changes_no_bit(shape, tokens, dtype):
    text, found, threads = Text(600, dtype=dtype, **shape), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(on_cpu.paged_attention(**text.call(600 - tokens, 600)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_sequences_of_all_lengths_share_a_forward(shape, dtype):
    lengths = (0, 1, PART - 1, PART, PART + 1, 500)
    texts = [Text(length + 3, dtype=dtype, seed=length, **shape) for length in lengths]
    calls = [text.call(length, length + 3) for text, length in zip(texts, lengths, strict=True)]
    places = [len(call["kv_pages"]) for call in calls]
    table = torch.zeros(len(calls), 32, dtype=torch.long)
    for n, call in enumerate(calls):
        own = call["page_table_BN"][0]
        table[n, : len(own)] = own + sum(places[:n])
    together = {name: torch.cat([call[name] for call in calls]) for name in ("q_BRHD", "k_BRGD", "v_BRGD", "kv_pages")}
    together |= {"page_table_BN": table, "prefix_len_B": torch.tensor(lengths)}
    found = on_cpu.paged_attention(**together, own_visible_RR=calls[0]["own_visible_RR"])
    for n, call in enumerate(calls):
        assert torch.equal(found[n], on_cpu.paged_attention(**call)[0])
        torch.testing.assert_close(found[n].float(), by_definition(call)[0], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_parts_of_which_a_token_sees_nothing_add_nothing(shape, dtype):
    """Tokens that see themselves alone have their own values, whatever lies before and behind."""
    text = Text(3 * PART, dtype=dtype, **shape)
    own = text.call(0, 3 * PART, torch.eye(3 * PART).bool())
    share = shape["heads"] // shape["kv_heads"]
    torch.testing.assert_close(on_cpu.paged_attention(**own), text.v.repeat_interleave(share, 2))


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_a_key_that_is_no_number_reaches_those_that_see_it_and_no_others(shape, dtype):
    text = Text(2 * PART, dtype=dtype, **shape)
    before = text.read()
    text.k[0, 40] = float("nan")
    found = on_cpu.paged_attention(**text.call(0, 2 * PART))
    assert torch.equal(found[:, :40], before[:, :40])
    assert found[:, 40:].isnan().all()


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_a_value_that_is_no_number_reaches_nobody_in_a_chunk_before_it(shape, dtype):
    text = Text(2 * PART, dtype=dtype, **shape)
    before = text.read(PART)
    text.v[0, PART + 3] = float("nan")
    found = on_cpu.paged_attention(**text.call(0, PART))
    assert torch.equal(found, before[:, :PART])


@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_results_of_many_parts_are_folded_at_once_with_the_same_bits(shape, dtype):
    """Sixty sequences of 20 tokens behind 3,000 have too many parts to keep the results of all."""
    text = Text(3020, dtype=dtype, **shape)
    call = text.call(3000, 3020)
    many = {name: call[name].repeat(60, *(1,) * (call[name].dim() - 1)) for name in BY_SEQUENCE}
    found = on_cpu.paged_attention(**call | many)
    alone = on_cpu.paged_attention(**call)
    assert torch.equal(found, alone.repeat(60, 1, 1, 1))
