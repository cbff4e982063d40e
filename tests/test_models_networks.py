"""Encoder and predictor against a slow implementation written here, and what they promise."""

import math
from importlib.util import find_spec

import pytest
import torch
from pydantic import ValidationError

from pipeline.clip import Grid, MaskSet
from pipeline.errors import ConfigError
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.positions import sincos_positions
from pipeline.models.predictor import Predictor, PredictorConfig

torch.set_num_threads(1)
CONFIG = EncoderConfig(width=56, heads=2, depth=2, mlp_hidden=80, patch_size=4)
PREDICTOR = PredictorConfig(width=32, heads=2, depth=2, num_mask_tokens=3)
FRAMES, HEIGHT, WIDTH = 6, 12, 20
GRID = Grid(t=3, h=3, w=5)


def make_encoder(seed=0, config=CONFIG, **options):
    torch.manual_seed(seed)
    encoder = Encoder(config, attention=AttentionConfig(**options))
    return shaken(encoder)


def make_predictor(seed=1, **options):
    torch.manual_seed(seed)
    return shaken(Predictor(PREDICTOR, encoder_width=56, attention=AttentionConfig(**options)))


def shaken(module):
    """Biases, norms and mask tokens off their zeros and ones, so that a lost one shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


def video(batch=2):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, FRAMES, HEIGHT, WIDTH, generator=generator)


def mask(batch=2, num_context=11, num_target=20):
    generator = torch.Generator().manual_seed(8)
    order = torch.stack([torch.randperm(45, generator=generator) for _ in range(batch)])
    return MaskSet(
        context_BK=order[:, :num_context].sort(1).values,
        target_BK=order[:, num_context : num_context + num_target].sort(1).values,
    )


# --- the slow reference: one clip, one token and one head at a time -------------------------------


def slow_rope(vector, index, grid, mode):
    """Head vector [hd] of the token `index`, element by element, in float64."""
    out = vector.clone()
    dim = 2 * ((len(vector) // 3) // 2)
    rest = index % (grid.h * grid.w)
    places = (index // (grid.h * grid.w), rest // grid.w, rest % grid.w)
    half = dim // 2
    for axis, place in enumerate(places):
        for i in range(0, dim, 2):
            even, odd = vector[axis * dim + i], vector[axis * dim + i + 1]
            j = (i % half, (i + 1) % half) if mode == "tiled" else (i // 2, i // 2)
            a, b = (place * 10000.0 ** (-k / half) for k in j)
            out[axis * dim + i] = even * math.cos(a) - odd * math.sin(a)
            out[axis * dim + i + 1] = odd * math.cos(b) + even * math.sin(b)
    return out


def slow_linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def slow_norm(x, state, name):
    centred = x - x.mean(dim=1, keepdim=True)
    spread = torch.sqrt(centred.square().mean(dim=1, keepdim=True) + 1e-6)
    return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def slow_block(x, state, name, heads, places):
    """One pre-norm block on [N, D], in float64; `places` are token indices, grid and layout."""
    indices, grid, mode = places
    width = x.shape[1]
    qkv = slow_linear(slow_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
    hd = width // heads
    mixed = torch.zeros_like(x)
    for head in range(heads):
        cut = slice(head * hd, (head + 1) * hd)
        q, k, v = (qkv[:, part * width : (part + 1) * width][:, cut] for part in range(3))
        q = torch.stack([slow_rope(row, n, grid, mode) for row, n in zip(q, indices, strict=True)])
        k = torch.stack([slow_rope(row, n, grid, mode) for row, n in zip(k, indices, strict=True)])
        mixed[:, cut] = torch.softmax(q @ k.T / math.sqrt(hd), dim=-1) @ v
    x = x + slow_linear(mixed, state, f"{name}.attn.proj")
    hidden = slow_linear(slow_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + slow_linear(hidden, state, f"{name}.mlp.fc2")


def slow_encode(encoder, clip, keep, mode):
    """Features [K, D] of the tokens `keep` of one clip [3, T, H, W]."""
    state = {name: value.double() for name, value in encoder.state_dict().items()}
    weight = state["patch_embed.proj.weight"].flatten(1)
    rows = []
    for n in keep:
        t, h, w = n // 15, n % 15 // 5, n % 5
        cube = clip.double()[:, 2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
        rows.append(weight @ cube.flatten() + state["patch_embed.proj.bias"])
    x = torch.stack(rows)
    for layer in range(CONFIG.dims.depth):
        x = slow_block(x, state, f"blocks.{layer}", CONFIG.dims.heads, (keep, GRID, mode))
    return slow_norm(x, state, "norm")


def slow_predict(predictor, context, context_index, target_index, mask_token):
    """Predictions [Kt, D] for one clip, without any sorting."""
    state = {name: value.double() for name, value in predictor.state_dict().items()}
    inner = slow_linear(context.double(), state, "predictor_embed")
    queries = [state["mask_tokens"][mask_token, 0, 0] for _ in target_index]
    x = torch.cat((inner, torch.stack(queries)))
    places = [*context_index, *target_index], GRID, "tiled"
    for layer in range(PREDICTOR.depth):
        x = slow_block(x, state, f"predictor_blocks.{layer}", PREDICTOR.heads, places)
    targets = slow_norm(x[len(context_index) :], state, "predictor_norm")
    return slow_linear(targets, state, "predictor_proj")


@pytest.mark.parametrize("rope", ["tiled", "interleaved"])
def test_masked_encoding_equals_the_slow_reference(rope):
    encoder, clips, keep = make_encoder(rope=rope), video(), mask().context_BK
    fast = encoder(clips, keep)
    for clip, kept, got in zip(clips, keep.tolist(), fast, strict=True):
        slow = slow_encode(encoder, clip, kept, rope)
        torch.testing.assert_close(got, slow.float(), atol=5e-5, rtol=5e-5)


def test_encoding_without_a_mask_is_encoding_of_all_tokens():
    encoder, clips = make_encoder(), video()
    every = torch.arange(45).expand(2, -1)
    assert torch.equal(encoder(clips), encoder(clips, every))


def test_prediction_equals_the_slow_reference_on_a_grid_that_is_not_square():
    predictor, masks = make_predictor(), mask()
    context = torch.randn(2, 11, 56, generator=torch.Generator().manual_seed(9))
    fast = predictor(context, masks, GRID, mask_token=2)
    for clip in range(2):
        indices = masks.context_BK[clip].tolist(), masks.target_BK[clip].tolist()
        slow = slow_predict(predictor, context[clip], *indices, 2)
        torch.testing.assert_close(fast[clip], slow.float(), atol=5e-5, rtol=5e-5)


def test_permuted_targets_permute_the_predictions():
    predictor, masks = make_predictor(), mask()
    context = torch.randn(2, 11, 56, generator=torch.Generator().manual_seed(9))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(10))
    permuted = MaskSet(context_BK=masks.context_BK, target_BK=masks.target_BK[:, order])
    plain = predictor(context, masks, GRID)
    assert torch.equal(predictor(context, permuted, GRID), plain[:, order])
    assert (plain[:, order] - plain).abs().max() > 1e-3


def test_predictions_depend_on_the_context():
    predictor, masks = make_predictor(), mask()
    context = torch.randn(2, 11, 56, generator=torch.Generator().manual_seed(9))
    other = context.clone()
    other[0, 4] += 1.0
    changed = predictor(other, masks, GRID) - predictor(context, masks, GRID)
    assert changed[0].abs().max() > 1e-3
    assert changed[1].abs().max() == 0


def test_only_the_mask_token_in_use_gets_a_gradient():
    predictor, masks = make_predictor(), mask()
    predictor(torch.randn(2, 11, 56), masks, GRID, mask_token=1).square().mean().backward()
    gradient = predictor.mask_tokens.grad.flatten(1)
    assert gradient.shape == (3, 32)
    assert (gradient[[0, 2]] == 0).all()
    assert gradient[1].abs().max() > 0


def test_gradients_are_equal_with_and_without_activation_checkpointing():
    gradients = []
    for recompute in (False, True):
        encoder, predictor, masks = make_encoder(), make_predictor(), mask()
        encoder.num_recomputed_blocks = predictor.num_recomputed_blocks = 2 * recompute
        predicted = predictor(encoder(video(), masks.context_BK), masks, GRID)
        predicted.square().mean().backward()
        parameters = [*encoder.parameters(), *predictor.parameters()]
        gradients.append([parameter.grad for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_keeps_fewer_tensors_for_the_backward_pass():
    kept = {}
    for recompute in (False, True):
        encoder = make_encoder()
        encoder.num_recomputed_blocks = 2 * recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            encoder(video())
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False] / 2


@pytest.mark.parametrize("head_dim", [28, 32, 64, 80])
def test_sdpa_and_the_plain_formula_agree(head_dim):
    config = EncoderConfig(width=2 * head_dim, heads=2, depth=2, patch_size=4)
    sdpa, plain = (make_encoder(config=config, backend=name) for name in ("sdpa", "math"))
    torch.testing.assert_close(sdpa(video()), plain(video()), atol=2e-5, rtol=2e-5)


def test_layers_are_the_blocks_outputs_through_the_final_norm():
    encoder, clips = make_encoder(), video()
    second, first = encoder(clips, layers=(1, 0))
    shallow = Encoder(CONFIG.model_copy(update={"depth": 1}), attention=AttentionConfig())
    shallow.load_state_dict(encoder.state_dict(), strict=False)
    assert torch.equal(second, encoder(clips))
    assert torch.equal(first, shallow(clips))
    with pytest.raises(ConfigError, match=r"0 to 1, got \[2\]"):
        encoder(clips, layers=(0, 2))


def test_bfloat16_networks_stay_near_the_float32_ones_and_in_their_dtype():
    encoder, predictor, masks = make_encoder(), make_predictor(), mask()
    with torch.no_grad():
        exact = predictor(encoder(video(), masks.context_BK), masks, GRID)
        encoder, predictor = encoder.bfloat16(), predictor.bfloat16()
        features = encoder(video(), masks.context_BK)
        rounded = predictor(features, masks, GRID)
    assert features.dtype == rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed):
        torch.manual_seed(seed)
        return Encoder(CONFIG, attention=AttentionConfig()).state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_initialisation_has_the_reference_spreads():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=192, heads=3, depth=4), attention=AttentionConfig())
    predictor = Predictor(PREDICTOR, encoder_width=192, attention=AttentionConfig())
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer, block in enumerate(encoder.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
        scaled = pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.02)
        assert block.attn.proj.weight.std().item() == scaled
        assert block.mlp.fc2.weight.std().item() == scaled
        assert (block.norm1.weight == 1).all()
    biases = [value for name, value in encoder.state_dict().items() if name.endswith("bias")]
    assert all((bias == 0).all() for bias in biases)
    assert (predictor.mask_tokens == 0).all()


def test_parameter_names_are_those_of_the_released_state_dicts():
    block = [
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
        "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias",
    ]  # fmt: skip
    names = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    names |= {f"blocks.{layer}.{name}" for layer in range(2) for name in block}
    assert set(make_encoder().state_dict()) == names
    names = {f"predictor_blocks.{layer}.{name}" for layer in range(2) for name in block}
    names |= {f"predictor_{m}.{w}" for m in ("embed", "norm", "proj") for w in ("weight", "bias")}
    assert set(make_predictor().state_dict()) == names | {"mask_tokens"}


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        ({"width": 100, "heads": 4}, "96 or 104"),
        ({"width": 8, "heads": 2}, "24"),
        ({"width": 30, "heads": 2}, "28 or 32"),
    ],
)
def test_a_width_that_does_not_fit_its_heads_names_the_nearest_right_widths(overrides, nearest):
    with pytest.raises(ValidationError, match=f"nearest right width is {nearest}"):
        EncoderConfig(**overrides)
    with pytest.raises(ValidationError, match=f"nearest right width is {nearest}"):
        PredictorConfig(**overrides)


def test_a_clip_that_cannot_be_cut_into_tokens_names_the_nearest_right_sizes():
    with pytest.raises(ConfigError, match="multiple of patch_size 4, got 18") as caught:
        CONFIG.grid(frames=6, resolution=18)
    assert "16 or 20" in caught.value.remedy
    with pytest.raises(ConfigError, match="multiple of tubelet_size 2, got 5") as caught:
        make_encoder()(torch.zeros(1, 3, 5, 16, 16))
    assert "4 or 6" in caught.value.remedy


def test_a_mask_token_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="mask token from 0 to 2, got 3"):
        make_predictor()(torch.randn(2, 11, 56), mask(), GRID, mask_token=3)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_that_is_not_installed_says_what_to_do():
    with pytest.raises(ConfigError, match="flash_attn") as caught:
        make_encoder(backend="flash2")
    assert "jepa-pipeline[gpu]" in caught.value.remedy


LEVELS = CONFIG.model_copy(update={"depth": 4, "levels": (1, 3)})
DENSE = PREDICTOR.model_copy(update={"predict_context": True})


def test_levels_are_the_named_blocks_outputs_each_through_its_own_norm():
    encoder, clips = make_encoder(config=LEVELS), video()
    levels = encoder(clips, levels=True)
    assert levels.shape == (2, 45, LEVELS.levels_width) == (2, 45, 112)
    outputs = {}
    for layer in LEVELS.levels:
        encoder.blocks[layer].register_forward_hook(
            lambda _m, _i, out, layer=layer: outputs.update({layer: out})
        )
    encoder(clips)
    normed = [norm(outputs[n]) for norm, n in zip(encoder.norms_block, (1, 3), strict=True)]
    assert torch.equal(levels, torch.cat(normed, dim=-1))
    assert torch.equal(encoder(clips), normed[1])
    assert torch.equal(encoder(clips, layers=(1,))[0], normed[0])
    assert not any(name.startswith("norm.") for name in encoder.state_dict())
    with pytest.raises(ConfigError, match=r"among the levels \[1, 3\], got \[2\]"):
        encoder(clips, layers=(2, 3))


def test_an_encoder_without_levels_gives_its_features_as_the_only_level():
    encoder, clips = make_encoder(), video()
    assert torch.equal(encoder(clips, levels=True), encoder(clips))


@pytest.mark.parametrize("levels", [(1,), (3, 1), (1, 1, 3), (2, 4)])
def test_levels_that_do_not_rise_to_the_last_block_are_refused(levels):
    with pytest.raises(ValidationError, match="rise to the last block, 3"):
        EncoderConfig(width=56, heads=2, depth=4, levels=levels)


def test_the_context_is_predicted_by_an_output_layer_of_its_own():
    torch.manual_seed(4)
    predictor = shaken(Predictor(DENSE, encoder_width=56, levels=2, attention=AttentionConfig()))
    context = torch.randn(2, 11, 112, generator=torch.Generator().manual_seed(9))
    target, again = predictor(context, mask(), GRID)
    assert (target.shape, again.shape) == ((2, 20, 112), (2, 11, 112))
    plain = Predictor(PREDICTOR, encoder_width=56, levels=2, attention=AttentionConfig())
    missing = plain.load_state_dict(predictor.state_dict(), strict=False)
    assert missing.unexpected_keys == [
        "predictor_proj_context.weight",
        "predictor_proj_context.bias",
    ]
    assert torch.equal(plain(context, mask(), GRID), target)
    # With the roles' output layers exchanged the context comes out of the other one.
    plain.predictor_proj.load_state_dict(predictor.predictor_proj_context.state_dict())
    swapped = MaskSet(context_BK=mask().target_BK, target_BK=mask().context_BK)
    assert plain(torch.zeros(2, 20, 112), swapped, GRID).shape == again.shape
    names = {name for name in predictor.state_dict() if name.startswith("predictor_embed")}
    assert names == {f"predictor_embed.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}


def test_the_predicted_context_is_in_the_order_in_which_it_came():
    torch.manual_seed(4)
    predictor = shaken(Predictor(DENSE, encoder_width=56, attention=AttentionConfig()))
    context = torch.randn(2, 11, 56, generator=torch.Generator().manual_seed(9))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(10))
    permuted = MaskSet(context_BK=mask().context_BK[:, order], target_BK=mask().target_BK)
    plain = predictor(context, mask(), GRID)[1]
    assert torch.equal(predictor(context[:, order], permuted, GRID)[1], plain[:, order])
    assert (plain[:, order] - plain).abs().max() > 1e-3


def test_sincos_positions_are_added_once_and_heads_are_not_turned():
    encoder, clips = make_encoder(positions="sincos"), video()
    seen = []
    encoder.blocks[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs))
    encoder(clips)
    x, rotary, _ = seen[0]
    table = sincos_positions(torch.arange(45), GRID, 56, uniform_power=True)
    assert torch.equal(x, encoder.patch_embed(clips) + table)
    assert rotary is None


def test_patches_are_embedded_as_the_convolution_does():
    encoder, clips = make_encoder(), video()
    conv = encoder.patch_embed.proj
    expected = torch.nn.functional.conv3d(clips, conv.weight, conv.bias, stride=conv.stride)
    expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(clips), expected, atol=1e-5, rtol=1e-5)


def test_recomputed_blocks_can_be_changed_between_steps_within_the_depth():
    encoder, kept = make_encoder(), []
    for number in (0, 1, 2):
        encoder.num_recomputed_blocks = number
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            encoder(video())
        kept.append(sum(sizes))
    assert kept[0] > kept[1] > kept[2]
    with pytest.raises(ConfigError, match="0 to 2 recomputed blocks, got 3"):
        encoder.num_recomputed_blocks = 3
