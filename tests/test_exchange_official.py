"""Official checkpoints: read with the restricted reader alone, strictly, bit for bit."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch

from pipeline.cli import main
from pipeline.errors import CheckpointError, ExitCode
from pipeline.exchange.official import read_official
from pipeline.exchange.open import open_networks
from pipeline.exchange.sizes import Heads, infer_sizes
from pipeline.exchange.source import ImportOptions
from pipeline.exchange.tensors import of_dict
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from tests.exchange_data import CLIP, ENCODER, HEADS, PREDICTOR, networks, official, write_official

OPTIONS = ImportOptions(heads=Heads(encoder=2, predictor=3))


def test_an_official_checkpoint_comes_in_bit_for_bit_with_all_mask_tokens(tmp_path, capsys):
    parts = networks()
    path = write_official(tmp_path / "latest.pt", parts)
    words = [
        "ckpt",
        "import",
        str(path),
        str(tmp_path / "out"),
        "--format",
        "vjepa2",
        *HEADS,
        *CLIP,
    ]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["networks"]["encoder_is"] == "student"
    assert any("opt" in note and "not taken over" in note for note in told["provenance"]["notes"])
    source = open_networks(tmp_path / "out")
    assert source.networks.encoder.dims == ENCODER.dims
    assert source.networks.predictor == PREDICTOR
    found = dict(source.tensors)
    wanted = {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_came_in_goes_out_in_the_official_layout_bit_for_bit(tmp_path):
    path, parts = write_official(tmp_path / "latest.pt"), networks()
    _run("import", path, tmp_path / "ours", "--format", "vjepa2", *HEADS)
    _run("export", tmp_path / "ours", tmp_path / "theirs", "--format", "vjepa2")
    back = torch.load(tmp_path / "theirs" / "checkpoint.pt", weights_only=True)
    wanted = official(parts, table=False)
    for key in ("encoder", "target_encoder", "predictor"):
        assert back[key].keys() == wanted[key].keys()
        assert all(torch.equal(back[key][name], t) for name, t in wanted[key].items())


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module._orig_mod.backbone."])
def test_words_that_wrappers_put_in_front_do_not_matter(tmp_path, prefix):
    content = official(networks(), table=False)
    for key in ("encoder", "target_encoder", "predictor"):
        content[key] = {n.replace("module.backbone.", prefix): t for n, t in content[key].items()}
    torch.save(content, tmp_path / "x.pt")
    found = dict(read_official(tmp_path / "x.pt", OPTIONS).tensors)
    assert torch.equal(found["encoder.norm.weight"], networks()["encoder"]["norm.weight"])


def test_a_teacher_alone_is_named_one_and_not_taken_for_the_student(tmp_path, capsys):
    content = official(networks())
    torch.save({"target_encoder": content["target_encoder"]}, tmp_path / "x.pt")
    _run("import", tmp_path / "x.pt", tmp_path / "out", "--format", "vjepa2", "--heads", "2")
    source = open_networks(tmp_path / "out")
    assert (source.networks.encoder_is, source.networks.predictor) == ("teacher", None)
    words = ["ckpt", "export", str(tmp_path / "out"), str(tmp_path / "x"), "--weights", "student"]
    assert main([*words, "--format", "safetensors"]) == ExitCode.CONFIG
    assert "holds the teacher's weights alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "heads"),
    [("vit_tiny", 3), ("vit_large", 16), ("vit_huge", 16), ("vit_giant_xformers", 22)],
)
def test_released_sizes_are_known_by_their_tensors(size, heads):
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(size=size), attention=AttentionConfig())
    found = infer_sizes(of_dict(encoder.state_dict()), None, Heads(), "x").encoder
    assert found == EncoderConfig(size=size)
    assert found.dims.heads == heads


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module.backbone.blocks.1.mlp.fc3.weight": torch.zeros(2)}, "SwiGLU"),
        ({"module.backbone.norms_block.0.weight": torch.zeros(48)}, "V-JEPA 2.1"),
        ({"module.backbone.blocks.0.attn.qkv.weight": torch.zeros(144, 47)}, "of another shape"),
        ({"module.backbone.other": torch.zeros(1)}, "1 not known here:\n    other"),
        ({"module.backbone.norm.weight": torch.zeros(48).int()}, "no dense tensor"),
        ({"backbone.norm.weight": torch.zeros(48)}, "norm.weight twice"),
        ({"module.backbone.patch_embed.proj.weight": torch.zeros(48, 3, 8, 8)}, "video patch"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, said):
    content = official(networks())
    content["encoder"].update(change)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as raised:
        read_official(tmp_path / "x.pt", OPTIONS)
    assert said in f"{raised.value}\n{raised.value.remedy}".replace("    encoder.", "    ")


def test_missing_tensors_are_all_named(tmp_path):
    content = official(networks())
    for name in ("norm.bias", "blocks.2.norm1.weight"):
        del content["encoder"][f"module.backbone.{name}"]
    del content["predictor"]["module.backbone.predictor_proj.bias"]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="3 missing") as raised:
        read_official(tmp_path / "x.pt", OPTIONS)
    for name in ("encoder.norm.bias", "encoder.blocks.2.norm1.weight", "predictor_proj.bias"):
        assert name in str(raised.value)


def test_heads_are_asked_for_where_tensors_cannot_tell_them(tmp_path, capsys):
    path = write_official(tmp_path / "x.pt")
    words = ["ckpt", "import", str(path), str(tmp_path / "out"), "--format", "vjepa2"]
    assert main(words) == ExitCode.CONFIG
    assert "--heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--heads", "7"]) == ExitCode.CONFIG
    assert "cannot be cut into 7 heads" in capsys.readouterr().err


@pytest.mark.parametrize("uniform_power", [True, False])
def test_a_first_v_jepa_comes_in_with_its_tables_checked_and_its_clip_told(
    tmp_path, capsys, uniform_power
):
    content = official(networks(), table=False)
    for key in ("encoder", "target_encoder"):
        content[key]["module.backbone.pos_embed"] = sincos_table(4, 6, 48, uniform_power)
    if uniform_power:  # the predictor's width of 36 cannot be halved and quartered evenly
        table = sincos_table(4, 6, 36, uniform_power)
        content["predictor"]["module.backbone.predictor_pos_embed"] = table
    torch.save(content, tmp_path / "x.pt")
    words = ["ckpt", "import", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--format", "vjepa2"]
    assert main([*words, "--positions", "sincos", *HEADS]) == 0
    networks_found = open_networks(tmp_path / "out").networks
    assert networks_found.attention.positions == "sincos"
    assert networks_found.attention.uniform_power is uniform_power
    assert (networks_found.frames, networks_found.resolution) == (8, 48)
    export = ["ckpt", "export", str(tmp_path / "out"), str(tmp_path / "hf"), "--format", "hf"]
    assert main(export) == ExitCode.CONFIG
    assert "attention.positions is sincos" in capsys.readouterr().err


def test_a_table_that_is_not_the_fixed_one_is_refused_for_the_first_v_jepa(tmp_path):
    content = official(networks(), table=False)
    table = sincos_table(4, 6, 48, uniform_power=True)
    table[0, 17, 3] += 0.01
    content["encoder"]["module.backbone.pos_embed"] = table
    torch.save(content, tmp_path / "x.pt")
    options = ImportOptions(heads=Heads(encoder=2, predictor=3), positions="sincos")
    with pytest.raises(CheckpointError, match=r"encoder\.pos_embed"):
        read_official(tmp_path / "x.pt", options)


def sincos_table(num_times, edge, width, uniform_power):
    """[1, N, D]: the reference page's formula once more, with loops."""
    dims = [2 * math.ceil(width / 6)] * 3 if uniform_power else [width // 2, width // 4, width // 4]
    rows = []
    for place in itertools.product(range(num_times), range(edge), range(edge)):
        row = []
        for position, dim in zip(place, dims, strict=True):
            angles = [position / 10000 ** (2 * j / dim) for j in range(dim // 2)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row[:width])
    return torch.tensor([rows])


class _Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("place", ["network", "top", "optimiser", "whole"])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(tmp_path, capsys, place):
    canary, content = tmp_path / "canary", official(networks())
    bomb = _Bomb(canary)
    content = {
        "network": {**content, "encoder": {"module.x": bomb}},
        "top": {**content, "note": bomb},
        "optimiser": {**content, "opt": {"state": bomb}},
        "whole": bomb,
    }[place]
    torch.save(content, tmp_path / "evil.pt")
    words = ["ckpt", "import", str(tmp_path / "evil.pt"), str(tmp_path / "out")]
    assert main([*words, "--format", "vjepa2"]) == ExitCode.CONFIG
    assert "could run code" in capsys.readouterr().err
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_not_even_the_environment_can_ask_for_the_unsafe_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"encoder": _Bomb(tmp_path / "canary")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        read_official(tmp_path / "evil.pt", OPTIONS)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"no: checkpoint", b"\0\0\0 ftypisom", b"PK\x03\x04 cut"])
def test_what_is_no_checkpoint_is_refused_in_words(tmp_path, capsys, content):
    (tmp_path / "x.pt").write_bytes(content)
    words = ["ckpt", "import", str(tmp_path / "x.pt"), str(tmp_path / "out")]
    assert main([*words, "--format", "vjepa2"]) == ExitCode.CONFIG
    assert "x.pt is no checkpoint that torch can read" in capsys.readouterr().err


def _run(verb: str, *words) -> None:
    assert main(["ckpt", verb, *(str(word) for word in words)]) == 0
