"""Attentive heads to transformers and back: the same logits, and refusals that say why."""

import importlib

import pytest
import torch
from safetensors import safe_open

from pipeline.cli import main
from pipeline.data.augment import transforms
from pipeline.errors import CheckpointError, ExitCode, UsageError
from pipeline.exchange.heads import HeadWeights, hf_head_config, read_head, write_head
from pipeline.exchange.hf_import import read_hf
from pipeline.exchange.layout import Networks
from pipeline.exchange.load import load_encoder
from pipeline.exchange.open import open_networks
from pipeline.exchange.source import ImportOptions
from pipeline.exchange.transfer import ExportRequest, export_networks
from pipeline.models.attentive import AttentiveProbe
from pipeline.models.encoder import EncoderConfig
from tests.probe_data import write_run

NAMES = ("left", "right", "still")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    write_run(folder, (20,))
    write_head(folder / "head.safetensors", _head())
    return folder


@pytest.fixture(scope="module")
def exported(home):
    request = ExportRequest(
        format="hf", frames=4, resolution=32, head=read_head(home / "head.safetensors")
    )
    return export_networks(open_networks(home / "run"), home / "hf", request, lambda *_: None)


def test_transformers_loads_a_head_strictly_and_gives_the_same_logits(home, exported):
    # The head's norms are fitted with 1e-5, transformers computes them with the encoder's 1e-6.
    assert exported.difference.logits < 1e-4
    transforms()
    transformers = importlib.import_module("transformers")
    model, told = transformers.AutoModelForVideoClassification.from_pretrained(
        home / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(told.values())
    assert type(model).__name__ == "VJEPA2ForVideoClassification"
    assert tuple(model.config.id2label[number] for number in range(3)) == NAMES
    video_BCTHW = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model.eval()(video_BCTHW.transpose(1, 2)).logits
        tokens = load_encoder(home / "run")(video_BCTHW)
        # Read back from the folder the head takes transformers' epsilon with it.
        ours = read_head(home / "hf").build()(tokens)
        fitted = read_head(home / "head.safetensors").build()(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fitted, theirs, atol=1e-4, rtol=1e-4)
    assert theirs.std() > 0.01


def test_a_head_comes_back_from_transformers_bit_for_bit(home, exported):
    back, ours = read_head(home / "hf"), _head()
    assert back.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(back.tensors[name], ours.tensors[name]) for name in ours.tensors)
    assert (back.num_heads, back.num_blocks, back.class_names) == (2, 3, NAMES)
    assert (back.norm_eps, ours.norm_eps) == (1e-6, 1e-5)


def test_the_networks_of_a_classifier_are_read_without_its_head(home, exported):
    source = read_hf(home / "hf", ImportOptions())
    assert any("--given-head" in note for note in source.notes)
    expected = load_encoder(home / "run").state_dict()
    for name, tensor in source.encoder("teacher"):
        assert torch.equal(tensor, expected[name])


def test_an_official_probe_is_read_from_its_list_of_classifiers(tmp_path):
    head = _head(width=48, num_heads=16)
    state = {f"module.{name}": tensor for name, tensor in head.tensors.items()}
    state["module.pooler.cross_attention_block.xattn.proj.weight"] = torch.zeros(48, 48)
    torch.save({"classifiers": [state], "epoch": 20, "opt": [None]}, tmp_path / "ssv2.pt")
    read = read_head(tmp_path / "ssv2.pt")
    tokens = torch.randn(2, 5, 48)
    assert torch.equal(read.build()(tokens), head.build()(tokens))
    assert read.norm_eps == 1e-5


def test_every_reason_why_transformers_cannot_have_a_head_is_named():
    networks = Networks(encoder=EncoderConfig(width=48, depth=2, heads=4, mlp_hidden=176))
    with pytest.raises(CheckpointError) as raised:
        hf_head_config(_head(), networks)
    for part in ("2 attention heads, where transformers takes the encoder's 4", "192 wide", "176"):
        assert part in str(raised.value)


def test_what_is_no_head_is_refused_with_what_is_taken(home, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="no head that jepa wrote"):
        read_head(tmp_path / "cut.safetensors")
    with pytest.raises(UsageError, match="expected an attentive head"):
        read_head(home / "run")
    torch.save({"encoder": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no list `classifiers`; it has encoder"):
        read_head(tmp_path / "other.pt")


def test_a_head_goes_into_no_other_format(home, tmp_path, capsys):
    words = ["ckpt", "export", str(home / "run"), str(tmp_path / "out"), "--format", "safetensors"]
    assert main([*words, "--head", str(home / "head.safetensors")]) == ExitCode.USAGE
    assert "--format hf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_written_head_says_what_it_was_fitted_on(home):
    with safe_open(home / "head.safetensors", framework="pt") as file:
        assert "jepa_head" in file.metadata()
    assert read_head(home / "head.safetensors").provenance == {"task": "squares"}


def _head(*, width: int = 48, num_heads: int = 2) -> HeadWeights:
    torch.manual_seed(3)
    probe = AttentiveProbe(width=width, num_classes=3, num_heads=num_heads, num_blocks=3)
    state = {name: t + 0.05 * torch.randn_like(t) for name, t in probe.state_dict().items()}
    return HeadWeights(
        tensors=state,
        num_heads=num_heads,
        norm_eps=1e-5,
        class_names=NAMES,
        provenance={"task": "squares"},
    )
