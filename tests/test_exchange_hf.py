"""transformers loads what we write, strictly, and computes the same; what it has we read."""

import json

import numpy as np
import pytest
import torch

from pipeline.cli import main
from pipeline.clip import MaskSet
from pipeline.data.augment import evaluation_views, normalise, transforms
from pipeline.errors import CheckpointError, ConfigError, ExitCode
from pipeline.exchange import load_encoder, tensors
from pipeline.exchange.difference import measure
from pipeline.exchange.hf_export import hf_config
from pipeline.exchange.layout import Networks
from pipeline.exchange.load import build_predictor
from pipeline.exchange.open import open_networks
from pipeline.exchange.sizes import expected_shapes
from pipeline.exchange.source import Source
from pipeline.exchange.tensors import joined, of_dict
from pipeline.exchange.transfer import import_networks
from pipeline.models.encoder import EncoderConfig
from tests.exchange_data import (
    CLIP,
    ENCODER,
    FRAMES,
    HEADS,
    PREDICTOR,
    RESOLUTION,
    networks,
    write_hf,
    write_official,
)

# Kernels sum in other orders; the largest difference seen is 3.1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def transformers():
    transforms()  # torchvision needs help beside a CPU-only torch
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An official checkpoint, imported and exported for transformers."""
    folder = tmp_path_factory.mktemp("hf")
    write_official(folder / "latest.pt")
    _run("import", folder / "latest.pt", folder / "ours", "--format", "vjepa2", *HEADS, *CLIP)
    _run("export", folder / "ours", folder / "hf", "--format", "hf", "--no-check")
    return folder


def test_transformers_loads_the_export_strictly_and_gives_the_same_features(folder, transformers):
    model, told = transformers.AutoModel.from_pretrained(folder / "hf", output_loading_info=True)
    assert type(model).__name__ == "VJEPA2Model"
    assert not any(told.values()), told
    # Longer than the config says, too: positions in time go on.
    for frames in (FRAMES, 2 * FRAMES):
        video_BCTHW = torch.randn(2, 3, frames, RESOLUTION, RESOLUTION)
        grid = ENCODER.grid(frames, RESOLUTION)
        order = torch.stack([torch.randperm(grid.num_tokens) for _ in range(2)])
        mask = MaskSet(context_BK=order[:, :9].sort(1).values, target_BK=order[:, 9:20])
        ours_BND = load_encoder(folder / "ours")(video_BCTHW)
        index = mask.context_BK.unsqueeze(-1).expand(-1, -1, ours_BND.shape[-1])
        predictor = build_predictor(open_networks(folder / "ours"))
        guess_BKD = predictor(ours_BND.gather(1, index), mask, grid, mask_token=1)
        with torch.no_grad():
            theirs = model.eval()(
                video_BCTHW.transpose(1, 2),
                context_mask=[mask.context_BK],
                target_mask=[mask.target_BK],
            )
        features = float((theirs.last_hidden_state - ours_BND).abs().max())
        guesses = float((theirs.predictor_output.last_hidden_state - guess_BKD).abs().max())
        print(f"{frames} frames: encoder {features:.2e}, predictor {guesses:.2e}")  # noqa: T201
        assert max(features, guesses) <= TOLERANCE
        assert float(ours_BND.std()) > 0.1


def test_the_export_measures_the_difference_itself_and_writes_it_into_the_card(
    folder, transformers, tmp_path, capsys
):
    words = ["ckpt", "export", str(folder / "ours"), str(tmp_path / "hf"), "--format", "hf"]
    assert main([*words, "--weights", "student", "--license", "mit", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 <= told["difference"]["encoder"] <= TOLERANCE
    assert 0 <= told["difference"]["predictor"] <= TOLERANCE
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"encoder {told['difference']['encoder']:.2e}" in card
    assert transformers.__version__ in card
    assert card.startswith('---\nlibrary_name: "transformers"')
    assert 'license: "mit"' in card


def test_a_difference_that_is_no_rounding_is_an_error(folder, transformers):
    source = open_networks(folder / "ours")
    student = source.tensors.below("encoder.").above("encoder.")
    others = joined(student, source.tensors.below("predictor.").above("predictor."))
    with pytest.raises(CheckpointError, match="computes something else"):
        measure(folder / "hf", source.networks, others)  # which holds the teacher


def test_the_video_processor_prepares_clips_as_our_evaluation_does(folder, transformers):
    processor = transformers.AutoVideoProcessor.from_pretrained(folder / "hf")
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (FRAMES, 12, 20, 3), dtype=np.uint8)
    frames_THWC = np.ascontiguousarray(small.repeat(6, axis=1).repeat(6, axis=2))
    (view_CTHW,) = evaluation_views(frames_THWC, RESOLUTION)
    ours_TCHW = normalise(view_CTHW).transpose(0, 1)
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    theirs_TCHW = processor(frames_TCHW, return_tensors="pt")["pixel_values_videos"][0]
    assert theirs_TCHW.shape == ours_TCHW.shape
    # One level of 255, in units of the smallest deviation: rounding while resizing.
    assert float((theirs_TCHW - ours_TCHW).abs().max()) <= 1 / 255 / 0.224
    assert float((theirs_TCHW - ours_TCHW).abs().mean()) < 1e-3


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_transformers_comes_in_bit_for_bit(tmp_path, shards):
    parts = networks()
    write_hf(tmp_path / "theirs", parts, shards=shards)
    _run("import", tmp_path / "theirs", tmp_path / "ours", "--format", "hf")
    source = open_networks(tmp_path / "ours")
    assert (source.networks.encoder.dims, source.networks.predictor) == (ENCODER.dims, PREDICTOR)
    assert (source.networks.frames, source.networks.resolution) == (FRAMES, RESOLUTION)
    found = dict(source.tensors)
    for part in ("encoder", "predictor"):
        for name, tensor in parts[part].items():
            assert torch.equal(found.pop(f"{part}.{name}"), tensor), name
    assert found == {}


def test_ours_to_transformers_and_back_is_bit_for_bit_and_again_the_same_file(folder, tmp_path):
    _run("import", folder / "hf", tmp_path / "back", "--format", "hf")
    back, teacher = dict(open_networks(tmp_path / "back").tensors), networks()["teacher"]
    for name, tensor in teacher.items():
        assert torch.equal(back[f"encoder.{name}"], tensor), name
    _run("export", tmp_path / "back", tmp_path / "again", "--format", "hf", "--no-check")
    first, second = (path / "model.safetensors" for path in (folder / "hf", tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    assert (folder / "hf/config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_large_networks_are_written_in_several_files_that_transformers_reads(
    folder, transformers, tmp_path, monkeypatch
):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 100_000)
    _run("export", folder / "ours", tmp_path / "hf", "--format", "hf")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    _run("import", tmp_path / "hf", tmp_path / "ours", "--format", "hf")
    found = dict(open_networks(tmp_path / "ours").tensors)
    assert torch.equal(found["encoder.norm.bias"], networks()["teacher"]["norm.bias"])


def test_a_folder_of_transformers_is_read_as_it_is(folder):
    video_BCTHW = torch.randn(1, 3, FRAMES, RESOLUTION, RESOLUTION)
    direct, ours = load_encoder(folder / "hf"), load_encoder(folder / "ours")
    assert torch.equal(direct(video_BCTHW), ours(video_BCTHW))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"model_type": "vit"}, "model_type is 'vit'"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"num_hidden_layers": 4}, "encoder.layer.3.attention.query.weight"),
        ({"hidden_size": "48"}, "cannot be built"),
        ({"num_attention_heads": 5}, "cannot be cut into 5 heads"),
        ({"pred_num_mask_tokens": 2}, "predictor.embeddings.mask_tokens"),
    ],
)
def test_a_config_that_means_something_else_is_refused(tmp_path, change, said):
    write_hf(tmp_path / "hf", **change)
    with pytest.raises(CheckpointError) as raised:
        open_networks(tmp_path / "hf")
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    write_hf(tmp_path / "hf", shards=2)
    index = {"weight_map": {"encoder.layernorm.bias": name}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names of files in the folder"):
        open_networks(tmp_path / "hf")


def test_a_missing_shard_and_a_damaged_exchange_folder_are_told(tmp_path, folder):
    write_hf(tmp_path / "hf", shards=2)
    (tmp_path / "hf" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002\.safetensors is missing"):
        open_networks(tmp_path / "hf")
    _run("export", folder / "ours", tmp_path / "ours", "--format", "safetensors")
    weights = tmp_path / "ours" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="its digest differs"):
        load_encoder(tmp_path / "ours")


def test_what_transformers_cannot_say_is_refused_with_every_reason(tmp_path, folder):
    path = tmp_path / "exchange" / "exchange.json"
    _run("export", folder / "ours", path.parent, "--format", "safetensors")
    source = open_networks(path.parent)
    attention = source.networks.attention.model_copy(update={"rope": "interleaved"})
    changed = source.networks.model_copy(update={"attention": attention, "predictor": None})
    with pytest.raises(CheckpointError) as raised:
        hf_config(changed, frames=FRAMES, resolution=RESOLUTION)
    assert "attention.rope is interleaved" in str(raised.value)
    assert "no predictor" in str(raised.value)
    assert raised.value.remedy == "Export them with --format safetensors."
    with pytest.raises(ConfigError, match="multiple of patch_size"):
        hf_config(source.networks, frames=FRAMES, resolution=RESOLUTION + 1)


def test_networks_of_several_levels_are_exchanged_but_not_said_to_transformers(tmp_path):
    encoder = EncoderConfig(**ENCODER.model_dump() | {"levels": (0, 2)})
    predictor = PREDICTOR.model_copy(update={"predict_context": True})
    given = Networks(encoder=encoder, predictor=predictor, frames=FRAMES, resolution=RESOLUTION)
    weights = {name: torch.randn(shape) for name, shape in expected_shapes(given).items()}
    source = Source(networks=given, tensors=of_dict(weights), provenance={"format": "jepa"})
    import_networks(source, tmp_path / "out", force=False, report=lambda *_: None)
    opened = open_networks(tmp_path / "out")
    assert opened.networks == given
    assert torch.equal(
        build_predictor(opened).predictor_proj_context.weight,
        weights["predictor.predictor_proj_context.weight"],
    )
    with pytest.raises(
        CheckpointError, match=r"encoder\.levels is \(0, 2\); predictor\.predict_con"
    ):
        hf_config(given, frames=FRAMES, resolution=RESOLUTION)


def test_an_export_that_is_there_is_kept_unless_forced_and_nothing_else_is_removed(
    folder, tmp_path, capsys
):
    words = ["ckpt", "export", str(folder / "ours"), str(tmp_path / "x"), "--format", "safetensors"]
    assert main(words) == 0
    assert main(words) == ExitCode.USAGE
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    words[3] = str(tmp_path / "precious")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("work")
    assert main([*words, "--force"]) == ExitCode.USAGE
    assert (tmp_path / "precious" / "file").read_text() == "work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "x"]


def _run(verb: str, *words) -> None:
    assert main(["ckpt", verb, *(str(word) for word in words)]) == 0
