"""A draft adapter acts on mask tokens alone, learns alone, and leaves the checkpoint as it is."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import documents_row, training_visibility
from tiny import adapted_model, wide_model

from tidar_core.config import AdapterConfig
from tidar_core.decoding.autoregressive import score
from tidar_core.errors import ConfigError
from tidar_core.training.flex_attention import FlexAttention
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import Recipe
from tidar_core.training.sequence_parallel import activation_bytes
from tidar_core.transformer.attention import DenseAttention, PiecewiseAttention
from tidar_core.transformer.draft_adapter import ADAPTER_SCALE, DraftAdapter, freeze
from tidar_core.transformer.layout import training_layout
from tidar_core.transformer.shapes import named_shape

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LENGTHS = (11, 5)
DOCUMENTS = documents_row(*LENGTHS)
IDS = torch.randint(0, 512, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0))


def plain(model):
    """The checkpoint itself: the same weights in a model without an adapter."""
    checkpoint = wide_model(replace(model.config, adapter=None, link_rank=0))
    checkpoint.load_state_dict(model.state_dict(), strict=False)
    return checkpoint.eval()


def hidden_by_token(model, ids, layout, visible):
    """Hidden states [L, E], token by token: each token has its own weights, with the adapter's added for a mask."""
    config, adapter = model.config, model.adapter
    clean_len = len(ids) // 2
    rotation = [half[0, :, 0] for half in model.rotation(layout.position, torch.float32)]
    rows = [model.embedding.weight[token] for token in ids[:clean_len]]
    rows += [adapter.mask + adapter.offset[offset] for offset in layout.offset[0, clean_len:].tolist()]

    def product(linear, low_rank, x, is_mask):
        weight = linear.weight + ADAPTER_SCALE * low_rank.up @ low_rank.down if is_mask else linear.weight
        return weight @ x

    def turned(x, index):
        first, second = x.chunk(2, -1)
        return x * rotation[0][index] + torch.cat([-second, first], -1) * rotation[1][index]

    for layer, low in zip(model.layers, adapter.layers):
        q, k, v = [], [], []
        for i, x in enumerate(rows):
            qkv = product(layer.attention.qkv, low.qkv, layer.attention_norm(x), i >= clean_len)
            heads = qkv.view(-1, config.head_size)
            q.append(turned(layer.attention.q_norm(heads[: config.heads]), i))
            k.append(turned(layer.attention.k_norm(heads[config.heads : config.heads + config.kv_heads]), i))
            v.append(heads[config.heads + config.kv_heads :])
        shared = config.heads // config.kv_heads
        for i, x in enumerate(rows):
            seen = visible[i].nonzero()[:, 0].tolist()
            gathered = []
            for head in range(config.heads):
                scores = torch.stack([q[i][head] @ k[j][head // shared] for j in seen]) * config.head_size**-0.5
                gathered.append(scores.softmax(0) @ torch.stack([v[j][head // shared] for j in seen]))
            x = x + product(layer.attention.output, low.output, torch.cat(gathered), i >= clean_len)
            gate, up = product(layer.mlp.gate_up, low.gate_up, layer.mlp_norm(x), i >= clean_len).chunk(2)
            rows[i] = x + product(layer.mlp.down, low.down, F.silu(gate) * up, i >= clean_len)
    return torch.stack([model.norm(x) for x in rows])


@pytest.mark.parametrize("form", [DenseAttention, PiecewiseAttention, partial(FlexAttention, split=True)])
@torch.no_grad()
def test_hidden_states_are_those_of_weights_that_differ_by_the_kind_of_each_token(form):
    model = adapted_model()
    layout = training_layout(DOCUMENTS, 4)
    ids = torch.cat([IDS, torch.zeros_like(IDS)], 1)
    ours = model.adapted(ids, layout.position, form(layout), layout[:, 16:].offset)[0]
    expected = hidden_by_token(model, ids[0], layout, training_visibility(LENGTHS, 4))
    # fp32, two layers, products summed in another order
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_clean_tokens_pass_as_in_the_checkpoint_bit_for_bit_whatever_their_ids():
    model = adapted_model()
    every_id = tuple(range(512))[:128]
    assert torch.equal(score(model, every_id).logprob_L, score(plain(model), every_id).logprob_L)
    layout = training_layout(DOCUMENTS, 4)
    with torch.no_grad():
        both = model.adapted(torch.cat([IDS, IDS], 1), layout.position, DenseAttention(layout), layout[:, 16:].offset)
        alone = plain(model)(IDS, layout.position[:, :16], DenseAttention(layout[:, :16]))
    assert torch.equal(both[:, :16], alone)


@torch.no_grad()
def test_a_new_adapter_passes_masks_as_tokens_of_the_mean_embedding():
    model = adapted_model()
    model.adapter.start(model.embedding.weight, torch.Generator().manual_seed(3))
    checkpoint, layout = plain(model), training_layout(DOCUMENTS, 4)
    checkpoint.embedding.weight[500] = model.embedding.weight.mean(0)
    masks = torch.full_like(IDS, 500)
    ids = IDS.clamp(max=499)
    ours = model.adapted(torch.cat([ids, masks], 1), layout.position, DenseAttention(layout), layout[:, 16:].offset)
    theirs = checkpoint(torch.cat([ids, masks], 1), layout.position, DenseAttention(layout))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_masks_beyond_the_trained_block_take_the_last_vector():
    adapter = DraftAdapter(adapted_model(block_len=2).config)
    with torch.no_grad():
        adapter.start(torch.randn(9, 32), torch.Generator())
        adapter.offset.copy_(torch.randn(2, 32))
    found = adapter(torch.tensor([0, 1, 2, 7]))
    assert torch.equal(found, adapter.mask + adapter.offset[[0, 1, 1, 1]])


@pytest.mark.parametrize(("recompute", "share"), [(False, 0.6), (True, 0.75)])
def test_the_adapter_alone_gets_gradients_and_the_clean_half_keeps_keys_and_values(recompute, share):
    model = adapted_model(link_rank=4).train()
    model.recompute = recompute
    batch = Objective(model, dual=True, block_len=4, recipe=Recipe()).batch(IDS, DOCUMENTS)
    kept, gradients = {}, {}
    for frozen in (False, True):
        if frozen:
            freeze(model)
        objective = Objective(model, dual=True, block_len=4, attention=PiecewiseAttention)
        with activation_bytes(model) as held:
            sums = objective(batch)
        kept[frozen] = held
        sums.diffusion_sum.backward()
        gradients[frozen] = {name: weight.grad for name, weight in model.named_parameters()}
        model.zero_grad(set_to_none=True)
    assert sums.ar_sum == sums.ar_count == 0
    learned = {name for name, gradient in gradients[True].items() if gradient is not None}
    assert learned == {name for name in gradients[True] if name.startswith(("adapter.", "link."))}
    for name in learned:
        expected = gradients[False][name]
        rounding = 1e-4 * expected.abs().max()  # fp32; norms and gates of frozen layers are computed by other kernels
        torch.testing.assert_close(gradients[True][name], expected, rtol=1e-4, atol=float(rounding))
    assert kept[True][0] < share * kept[False][0]


def test_the_next_token_loss_is_that_of_the_checkpoint():
    model = adapted_model()
    losses = []
    for either in (model, plain(model)):
        objective = Objective(either, dual=False, block_len=4)
        losses.append(objective(objective.batch(IDS, DOCUMENTS)).ar_sum.item())
    assert losses[0] == losses[1] > 0


def test_a_frozen_checkpoint_is_trained_on_masks_alone():
    model = adapted_model()
    with pytest.raises(ConfigError, match="give full"):
        Objective(model, dual=True, block_len=4, recipe=Recipe(masking="random"))
    assert Objective(model, dual=True, block_len=4).recipe.alpha == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "adapter rank is 0"),
        ({"block_len": 0}, "adapter block_len is 0"),
        ({"places": ("qkv", "head")}, "name some of qkv, output"),
        ({"places": ()}, "name some of"),
    ],
)
def test_an_adapter_of_no_use_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**{"rank": 4, "block_len": 4} | fields)


def test_a_model_has_one_kind_of_mask_token():
    with pytest.raises(ConfigError, match="give one"):
        replace(named_shape("tiny"), adapter=AdapterConfig(rank=1, block_len=4))
