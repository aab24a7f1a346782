"""The kernels compute what plain torch computes, and plain torch follows the rule of visibility.

On a CUDA device the kernels run there; elsewhere in Triton's interpreter, on small sizes.
"""

import sys

import pytest
import torch

from tidar_core.kernels import PLAIN, c_kernels, compiled, kernels_for, on_cpu, triton_kernels
from tidar_core.transformer.layout import CLEAN, TokenLayout, decode_layout
from tidar_core.transformer.visibility import dense_visibility, sees

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 matrices as if they were integers; elsewhere it rounds to bfloat16 towards zero.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
PAGE_LEN = 16
# float32: sums of some hundred terms of order 1, in another order.
EXACT = {"rtol": 1e-5, "atol": 1e-5}
# Two roundings to bfloat16 (2^-8 each when rounded, 2^-7 when cut off) of numbers below 4; float16 is finer.
ROUNDED = {"rtol": 2**-6, "atol": 2**-6}
KERNEL_MODULES = ("tidar_core.kernels.fused", "tidar_core.kernels.paged_attention")


@pytest.fixture(scope="module")
def triton_set():
    """The Triton kernels; on a CPU imported anew, so that Triton's interpreter runs them."""
    pytest.importorskip("triton")
    if DEVICE.type == "cuda":
        yield triton_kernels()
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        interpret_triton_s_own(patch)
        for name in KERNEL_MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield triton_kernels()
        for name in KERNEL_MODULES:
            del sys.modules[name]


def interpret_triton_s_own(patch):
    """Whether a function is interpreted is settled at its import, and another test may have imported triton by now."""
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted = {}
    for module in (triton.language, triton.language.standard, triton.language.math):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                found = interpreted.setdefault(function.fn, InterpretedFunction(function.fn))
                patch.setattr(module, name, found)


@pytest.fixture(params=["triton", "c"])
def kernel_set(request):
    """The kernels of one language."""
    if request.param == "triton":
        return request.getfixturevalue("triton_set")
    if DEVICE.type == "cuda" or compiled.library() is None:
        pytest.skip("kernels in C need a CPU and a compiler")
    return c_kernels()


@pytest.fixture
def tiling(triton_set):
    """Makes a `Tiling` of the module that the kernels come from."""
    return sys.modules["tidar_core.kernels.paged_attention"].Tiling


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def forward(prefix_lens, clean_len, groups, block_len, *, heads, kv_heads, size, pages=4, dtype=torch.float32, seed=0):
    """Arguments of `paged_attention`: random rows of one forward behind random prefixes in shuffled pages."""
    batch, rows = len(prefix_lens), clean_len + len(groups) * block_len
    layout = decode_layout(torch.zeros(1, dtype=torch.long, device=DEVICE), clean_len, groups, block_len)[0]
    shuffled = torch.randperm(batch * pages + 2, generator=torch.Generator().manual_seed(seed))
    return {
        "q_BRHD": normal(batch, rows, heads, size, dtype=dtype, seed=seed),
        "k_BRGD": normal(batch, rows, kv_heads, size, dtype=dtype, seed=seed + 1),
        "v_BRGD": normal(batch, rows, kv_heads, size, dtype=dtype, seed=seed + 2),
        "kv_pages": normal(len(shuffled), PAGE_LEN, 2, kv_heads, size, dtype=dtype, seed=seed + 3),
        "page_table_BN": shuffled[: batch * pages].view(batch, pages).to(DEVICE, torch.int32),
        "prefix_len_B": torch.tensor(prefix_lens, device=DEVICE),
        "own_visible_RR": dense_visibility(layout, layout),
    }


def upcast(call):
    """The same arguments in float32."""
    return {name: x.float() if x.is_floating_point() else x for name, x in call.items()}


def gathered_by_the_rule(call, clean_len, groups, block_len):
    """The same values one row at a time: every key the row sees, from contiguous tokens, by `sees`."""
    out = torch.zeros_like(call["q_BRHD"])
    share = out.shape[2] // call["k_BRGD"].shape[2]
    for b, length in enumerate(call["prefix_len_B"].tolist()):
        stored = torch.cat([call["kv_pages"][page] for page in call["page_table_BN"][b].tolist()])[:length]
        keys = torch.cat([stored[:, 0], call["k_BRGD"][b]])
        values = torch.cat([stored[:, 1], call["v_BRGD"][b]])
        rows = decode_layout(torch.tensor([length], device=DEVICE), clean_len, groups, block_len)[0]
        index = torch.arange(length, device=DEVICE)
        prefix = TokenLayout(torch.zeros_like(index), index, index, torch.full_like(index, CLEAN), index)
        everyone = prefix.then(rows)
        for r in range(out.shape[1]):
            seen = [n for n in range(len(keys)) if sees(rows[r], everyone[n])]
            for h in range(out.shape[2]):
                score = keys[seen, h // share] @ call["q_BRHD"][b, r, h] * out.shape[3] ** -0.5
                out[b, r, h] = torch.softmax(score, 0) @ values[seen, h // share]
    return out


PLANS = {
    "autoregressive": (1, (), 3),
    "prefill": (7, (), 3),
    "verify": (3, (), 3),
    "draft": (1, (1,), 3),
    "single-pass": (3, (1, 2, 3), 3),
    "some groups": (4, (2, 4), 4),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_plain_attention_over_pages_follows_the_rule_of_visibility(plan):
    call = forward((0, 5, 16, 33), *plan, heads=4, kv_heads=2, size=8, pages=3)
    torch.testing.assert_close(PLAIN.paged_attention(**call), gathered_by_the_rule(call, *plan), **EXACT)


def test_what_lies_in_pages_past_the_prefix_changes_nothing():
    call = forward((0, 5, 16, 33), 3, (1, 2, 3), 3, heads=4, kv_heads=2, size=8, pages=3)
    before = PLAIN.paged_attention(**call)
    for b, length in enumerate(call["prefix_len_B"].tolist()):
        for slot in range(length, 3 * PAGE_LEN):
            call["kv_pages"][call["page_table_BN"][b, slot // PAGE_LEN], slot % PAGE_LEN] = 1e4
    assert torch.equal(PLAIN.paged_attention(**call), before)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_kernel_gathers_what_plain_torch_gathers_whatever_the_plan(kernel_set, plan):
    call = forward((0, 15, 16, 17, 64), *plan, heads=4, kv_heads=2, size=8)
    torch.testing.assert_close(kernel_set.paged_attention(**call), PLAIN.paged_attention(**call), **EXACT)


@pytest.mark.parametrize("size", [8, 64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1), (6, 1)])
def test_the_kernel_serves_any_head_width_and_any_heads_per_key(kernel_set, heads, kv_heads, size):
    call = forward((31, 0), 2, (1, 2), 2, heads=heads, kv_heads=kv_heads, size=size, pages=2)
    torch.testing.assert_close(kernel_set.paged_attention(**call), PLAIN.paged_attention(**call), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize(("tile_m", "tile_n"), [(16, 16), (32, 32), (16, 64)])
def test_how_the_work_is_cut_changes_nothing(triton_set, tiling, tile_m, tile_n, splits):
    call = forward((0, 1, 47, 64), 3, (1, 2, 3), 3, heads=4, kv_heads=1, size=16)
    cut = tiling(tile_m, tile_n, splits, warps=4, stages=2)
    torch.testing.assert_close(triton_set.paged_attention(**call, tiling=cut), PLAIN.paged_attention(**call), **EXACT)


def test_tiles_that_no_row_sees_are_passed_over(triton_set, tiling):
    plan = 8, tuple(range(1, 9)), 8  # 72 rows: a tile of 16 holds at most four groups
    call = forward((20,), *plan, heads=1, kv_heads=1, size=16, pages=2)
    visible = call["own_visible_RR"]
    assert not visible[-16:, 16:48].any()
    call["v_BRGD"][:, 16:48] = float("nan")  # would reach every row of a tile that is multiplied with weight 0
    gathered = triton_set.paged_attention(**call, tiling=tiling(16, 16, 1, warps=4, stages=2))
    call["v_BRGD"][:, 16:48] = 0
    torch.testing.assert_close(gathered[:, -16:], PLAIN.paged_attention(**call)[:, -16:], **EXACT)


@pytest.mark.parametrize("splits", [1, 3])
def test_an_empty_page_table_leaves_the_rows_of_the_forward(triton_set, tiling, splits):
    call = forward((0, 0), 3, (3,), 3, heads=4, kv_heads=2, size=8)
    call["page_table_BN"] = call["page_table_BN"][:, :0]
    cut = tiling(16, 16, splits, warps=4, stages=2)
    torch.testing.assert_close(triton_set.paged_attention(**call, tiling=cut), PLAIN.paged_attention(**call), **EXACT)


def test_the_kernel_takes_views_and_either_kind_of_integer(kernel_set):
    call = forward((9, 40), 3, (1, 2, 3), 3, heads=4, kv_heads=2, size=16, pages=3)
    expected = PLAIN.paged_attention(**call)
    joined = torch.cat([call["q_BRHD"], call["k_BRGD"], call["v_BRGD"]], 2)
    call["q_BRHD"], call["k_BRGD"], call["v_BRGD"] = joined.split([4, 2, 2], 2)
    call["page_table_BN"] = torch.nn.functional.pad(call["page_table_BN"].long(), (0, 5))[:, :3]
    call["prefix_len_B"] = call["prefix_len_B"].int()
    call["kv_pages"] = torch.stack([call["kv_pages"]] * 2)[1]
    torch.testing.assert_close(kernel_set.paged_attention(**call), expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_half_precision_is_summed_in_single_precision(triton_set, tiling, dtype, splits):
    call = forward((0, 17, 64), 3, (1, 2, 3), 3, heads=4, kv_heads=2, size=64, dtype=dtype)
    gathered = triton_set.paged_attention(**call, tiling=tiling(16, 16, splits, warps=4, stages=2))
    assert gathered.dtype == dtype
    torch.testing.assert_close(gathered.float(), PLAIN.paged_attention(**upcast(call)), **ROUNDED)


def test_tilings_fill_a_device_of_132_processors(triton_set):
    choose = sys.modules["tidar_core.kernels.paged_attention"].choose_tiling
    qwen = {"head_size": 128, "item_bytes": 2, "processors": 132}
    assert choose(query_rows=6, pairs=2, max_context=16384, **qwen).splits == 64
    assert choose(query_rows=6, pairs=2, max_context=0, **qwen).splits == 1
    assert choose(query_rows=4, pairs=256, max_context=4096, **qwen).splits == 1
    dense = choose(query_rows=1632, pairs=2, max_context=4096, **qwen)
    assert dense.tile_m == 128
    assert 100 <= 2 * 13 * dense.splits <= 132
    assert choose(query_rows=132, pairs=8, max_context=4096, **qwen).tile_m == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 48), (1, 1, 128), (5, 640)])
def test_the_norm_and_the_residual_before_it(kernel_set, shape, with_residual, dtype):
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1) if with_residual else None
    weight = 1 + 0.1 * normal(shape[-1])
    found = kernel_set.add_rms_norm(x, residual, weight, 1e-6)
    expected = PLAIN.add_rms_norm(x, residual, weight, 1e-6)
    tolerance = EXACT if dtype == torch.float32 else ROUNDED
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (6, 1, 64), (2, 2, 96)])
def test_heads_are_normed_rotated_and_stored(kernel_set, heads, kv_heads, size, with_norm, dtype):
    batch, rows, clean_len = 3, 7, 4
    qkv = normal(batch, rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    angle = normal(batch, rows, size // 2, seed=1).repeat(1, 1, 2)
    weight = (1 + 0.1 * normal(heads + kv_heads, size, seed=2)).to(dtype) if with_norm else None
    slots = torch.randperm(5 * PAGE_LEN, generator=torch.Generator().manual_seed(4))[: batch * clean_len]
    kept, expected_pages = (normal(5, PAGE_LEN, 2, kv_heads, size, dtype=dtype, seed=5) for _ in range(2))
    rest = (angle.cos().to(dtype), angle.sin().to(dtype))
    found, expected = (
        kernels.rotate_and_store(
            qkv.clone(), weight, *rest, pages, slots.view(batch, clean_len).to(DEVICE), eps=1e-6, heads=heads
        )
        for kernels, pages in ((kernel_set, kept), (PLAIN, expected_pages))
    )
    tolerance = EXACT if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-4}  # five roundings with a norm
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(kept, expected_pages, **tolerance)
    untouched = torch.ones(5 * PAGE_LEN, dtype=torch.bool)
    untouched[slots] = False
    before = normal(5, PAGE_LEN, 2, kv_heads, size, dtype=dtype, seed=5)
    assert torch.equal(kept.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 96), (1, 1, 32), (3, 2300)])
def test_the_gate_of_the_feed_forward_network(kernel_set, shape, dtype):
    gate_up = normal(*shape, dtype=dtype)
    tolerance = EXACT if dtype == torch.float32 else ROUNDED
    torch.testing.assert_close(kernel_set.silu_mul(gate_up), PLAIN.silu_mul(gate_up), **tolerance)


@pytest.mark.skipif(compiled.library() is None, reason="no C compiler works here")
@pytest.mark.parametrize("size", [32, 40, 64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (6, 1)])
def test_the_c_attention_in_bf16_is_within_the_rounding_of_its_weights_and_results(heads, kv_heads, size):
    call = forward((31, 0, 64), 20, (1, 2), 2, heads=heads, kv_heads=kv_heads, size=size, dtype=torch.bfloat16)
    call = {name: x.cpu() for name, x in call.items()}
    expected = PLAIN.paged_attention(**upcast(call))
    torch.testing.assert_close(c_kernels().paged_attention(**call).float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.skipif(compiled.library() is None, reason="no C compiler works here")
@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_the_c_kernels_give_a_token_the_same_bits_alone_and_beside_tokens_that_it_does_not_see(dtype, size):
    """Clean tokens of one forward, with masks behind them and other sequences beside, and read one by one.

    Heads of 64 go through matrix instructions in bf16, where the processor has some.
    """
    own, heads, kv_heads = c_kernels(), 4, 2
    call = forward((5, 40), 4, (1, 2, 3, 4), 4, heads=heads, kv_heads=kv_heads, size=size, pages=4, dtype=dtype)
    call = {name: x.cpu() for name, x in call.items()}
    together = own.paged_attention(**call)
    for b, length in enumerate((5, 40)):
        pages = call["kv_pages"].clone()
        for n in range(4):
            token = {name: call[name][b : b + 1, n : n + 1] for name in ("q_BRHD", "k_BRGD", "v_BRGD")}
            alone = own.paged_attention(
                **token, kv_pages=pages, page_table_BN=call["page_table_BN"][b : b + 1],
                prefix_len_B=torch.tensor([length + n]), own_visible_RR=torch.ones(1, 1, dtype=torch.bool),
            )  # fmt: skip
            assert torch.equal(alone[0, 0], together[b, n])
            page, place = call["page_table_BN"][b, (length + n) // PAGE_LEN], (length + n) % PAGE_LEN
            pages[page, place] = torch.stack([token["k_BRGD"], token["v_BRGD"]])[:, 0, 0]
    x, residual, weight = (normal(40, 100, dtype=dtype, seed=seed).cpu() for seed in (1, 2, 3))
    for found, expected in zip(own.add_rms_norm(x, residual, weight[0], 1e-5), (0, 1), strict=True):
        alone = [own.add_rms_norm(x[n : n + 1], residual[n : n + 1], weight[0], 1e-5)[expected] for n in range(40)]
        assert torch.equal(torch.cat(alone), found)
    assert torch.equal(torch.cat([own.silu_mul(x[n : n + 1]) for n in range(40)]), own.silu_mul(x))


@pytest.mark.skipif(compiled.library() is None, reason="no C compiler works here")
@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
@pytest.mark.parametrize("length", [40, 100, 150, 240])
def test_a_short_prompt_has_the_same_bits_with_and_without_masks_behind_it(length, dtype):
    """So a text that begins with it is the same with and without drafts, in bf16 too."""
    call = forward((0,), length, (length,), 8, heads=9, kv_heads=3, size=64, pages=1, dtype=dtype)
    call = {name: x.cpu() for name, x in call.items()} | {"page_table_BN": torch.zeros(1, 0, dtype=torch.long)}
    alone = call | {name: call[name][:, :length] for name in ("q_BRHD", "k_BRGD", "v_BRGD")}
    alone["own_visible_RR"] = call["own_visible_RR"][:length, :length]
    shared = ("page_table_BN", "prefix_len_B", "own_visible_RR")
    beside, alone = (
        on_cpu.Gathering(*(x[name] for name in shared), PAGE_LEN)(*(x[n] for n in x if n not in shared))
        for x in (call, alone)
    )
    assert torch.equal(beside[:, :length], alone)


def test_rotation_is_the_model_s_own():
    from tiny import wide_model

    from tidar_core.transformer.shapes import named_shape

    model = wide_model(named_shape("tiny"))
    config, attention = model.config, model.layers[0].attention
    hidden, position = normal(2, 5, config.hidden_size).cpu(), torch.tensor([[3, 4, 5, 4, 5], [0, 1, 2, 1, 2]])
    rotation = model.rotation(position, hidden.dtype)
    handed = []
    attention(hidden, rotation, lambda layer, q, k, v: handed.extend((q, k, v)) or q)
    pages = torch.zeros(2, PAGE_LEN, 2, config.kv_heads, config.head_size)
    weights = [attention.q_norm.weight.expand(config.heads, -1), attention.k_norm.weight.expand(config.kv_heads, -1)]
    with torch.no_grad():
        found = PLAIN.rotate_and_store(
            attention.qkv(hidden), torch.cat(weights), rotation[0][:, :, 0], rotation[1][:, :, 0], pages,
            torch.tensor([[1], [17]]), eps=config.norm_eps, heads=config.heads,
        )  # fmt: skip
    torch.testing.assert_close(found, tuple(handed))
    torch.testing.assert_close(pages[:, 1], torch.stack([found[1][:, 0], found[2][:, 0]], 1))


def test_a_cpu_gets_the_c_kernels_where_a_compiler_works_and_the_plain_functions_elsewhere(monkeypatch):
    if compiled.library() is not None:
        assert kernels_for("cpu", torch.bfloat16) == c_kernels()
    assert kernels_for("cpu", torch.float16) is PLAIN
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert kernels_for("cpu", torch.float32) is PLAIN


def test_the_baseline_that_is_timed_beside_the_kernel_computes_the_same():
    from tidar_core.kernels.workloads import DRAFT_PLANS, Case, Workload, own_calls, sdpa_calls

    for rows in DRAFT_PLANS:
        workload = Workload(Case("tiny", rows, 32, 2), prefix_lens=[32, 20], dtype=torch.float32, device=str(DEVICE))
        ours, baseline = own_calls(workload, PLAIN.paged_attention)[0](), sdpa_calls(workload)[0]()
        baseline = baseline.view(2, 2, 2, rows, 8).permute(0, 3, 1, 2, 4).reshape(ours.shape)
        torch.testing.assert_close(ours, baseline, **EXACT)
