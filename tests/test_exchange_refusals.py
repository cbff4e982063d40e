"""What an import or an export must not take, and what it must not replace or give away."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.errors import CheckpointError, ExitCode, UsageError
from pipeline.exchange import transfer
from pipeline.exchange.hf_import import read_hf
from pipeline.exchange.official import read_official
from pipeline.exchange.open import open_networks
from pipeline.exchange.sizes import Heads
from pipeline.exchange.source import ImportOptions
from tests.exchange_data import HEADS, networks, official, write_hf, write_official

OPTIONS = ImportOptions(heads=Heads(encoder=2, predictor=3))


@pytest.fixture
def ours(tmp_path):
    """An imported folder."""
    write_official(tmp_path / "x.pt")
    assert _ckpt("import", tmp_path / "x.pt", tmp_path / "ours", "vjepa2", *HEADS) == 0
    return tmp_path / "ours"


def test_force_spares_a_folder_that_holds_anything_else(ours, tmp_path, capsys):
    write_hf(tmp_path / "theirs")
    assert _ckpt("import", tmp_path / "theirs", tmp_path / "theirs", "hf", "--force") == 2
    assert "is what is read from" in capsys.readouterr().err
    (tmp_path / "theirs" / "notes.txt").write_text("work")
    assert _ckpt("export", ours, tmp_path / "theirs", "safetensors", "--force") == 2
    assert "holds notes.txt" in capsys.readouterr().err
    assert (tmp_path / "theirs" / "notes.txt").read_text() == "work"
    assert _ckpt("export", ours, ours, "safetensors", "--force") == ExitCode.USAGE
    assert open_networks(ours).has_teacher


def test_a_link_is_no_place_for_an_export(ours, tmp_path):
    for name, target in (("link", ours), ("dangling", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
        assert _ckpt("export", ours, tmp_path / name, "safetensors", "--force") == ExitCode.USAGE
        assert (tmp_path / name).is_symlink()
    assert not [path for path in tmp_path.iterdir() if ".old" in path.name or ".pa" in path.name]


def test_the_folder_one_stands_in_can_be_replaced(ours, tmp_path, monkeypatch):
    assert _ckpt("export", ours, tmp_path / "out", "safetensors") == 0
    monkeypatch.chdir(tmp_path / "out")
    assert _ckpt("export", ours, ".", "safetensors", "--force") == 0
    assert open_networks(tmp_path / "out").networks.encoder_is == "teacher"


def test_what_was_there_comes_back_if_the_new_folder_cannot_be_named(ours, tmp_path, monkeypatch):
    assert _ckpt("export", ours, tmp_path / "out", "safetensors") == 0
    before = sorted(tmp_path.iterdir())

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "publish", refuse)
    assert _ckpt("export", ours, tmp_path / "out", "safetensors", "--force") == ExitCode.STORAGE
    assert sorted(tmp_path.iterdir()) == before
    assert open_networks(tmp_path / "out").networks.encoder_is == "teacher"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="expected F64, F32, F16, BF16"):
        open_networks(tmp_path / "hf")


@pytest.mark.parametrize("kind", ["meta", "compressed", "float8", "endless"])
def test_tensors_that_hold_no_plain_numbers_are_refused(tmp_path, kind):
    name, tensor = {
        "meta": ("norm.weight", torch.zeros(48, device="meta")),
        "compressed": ("blocks.0.attn.qkv.weight", torch.ones(144, 48).to_sparse_csr()),
        "float8": ("norm.weight", torch.zeros(48).to(torch.float8_e5m2)),
        "endless": ("blocks.100000000.norm1.bias", torch.zeros(48)),
    }[kind]
    content = official(networks())
    content["encoder"][f"module.backbone.{name}"] = tensor
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no dense tensor|No network has these sizes"):
        read_official(tmp_path / "x.pt", OPTIONS)


@pytest.mark.parametrize(
    "change",
    [
        {"mlp_ratio": float("inf")},
        {"mlp_ratio": float("nan")},
        {"mlp_ratio": "4"},
        {"patch_size": [8, [8]]},
        {"num_hidden_layers": 10**7},
        {"hidden_size": 10**13, "mlp_ratio": 1.0},
        {"crop_size": -1},
        {"frames_per_clip": 0},
    ],
)
def test_sizes_beyond_sense_end_an_import_at_once(tmp_path, change):
    write_hf(tmp_path / "hf", **change)
    with pytest.raises(CheckpointError, match=r"cannot be built|No network has these sizes"):
        open_networks(tmp_path / "hf")


@pytest.mark.parametrize("name", ["..", "", ["x"], {"a": 1}, "a\0.safetensors", "a\\b.safetensors"])
def test_an_index_names_files_and_nothing_else(tmp_path, name):
    path = write_hf(tmp_path / "hf", shards=2) / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"encoder.layernorm.bias": name}}))
    with pytest.raises(CheckpointError, match="names of files in the folder"):
        open_networks(tmp_path / "hf")
    path.write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="is no JSON"):
        open_networks(tmp_path / "hf")


def test_words_that_say_nothing_of_the_source_are_usage_errors(tmp_path):
    write_hf(tmp_path / "hf")
    with pytest.raises(UsageError, match="always rotary"):
        read_hf(tmp_path / "hf", ImportOptions(positions="sincos"))
    with pytest.raises(UsageError, match="expected a folder of transformers"):
        read_hf(write_official(tmp_path / "x.pt"), ImportOptions())
    for flag in ("--frames", "--resolution", "--heads"):
        assert _ckpt("import", tmp_path / "hf", tmp_path / "out", "hf", flag, "0") == ExitCode.USAGE
    assert not (tmp_path / "out").exists()


def test_a_card_tells_no_paths_and_what_an_official_file_holds(ours, tmp_path):
    out = tmp_path / 'a "name"\nin two lines'
    assert _ckpt("export", ours, out, "safetensors") == 0
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    assert '# a "name" in two lines' in card
    assert 'load_encoder("a \\"name\\"\\nin two lines")' in card
    one = tmp_path / "one.pt"
    torch.save({"encoder": official(networks())["encoder"]}, one)
    assert _ckpt("import", one, tmp_path / "one", "vjepa2", "--heads", "2") == 0
    words = ("--weights", "student")
    assert _ckpt("export", tmp_path / "one", tmp_path / "back", "vjepa2", *words) == 0
    card = (tmp_path / "back" / "README.md").read_text()
    assert "`encoder`, `target_encoder`.\n" in card
    assert "`target_encoder` is a copy of `encoder`" in card
    assert "with its predictor" not in card


def _ckpt(verb: str, source, out, format: str, *words: str) -> int:
    return main(["ckpt", verb, str(source), str(out), "--format", format, *words])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_do_not_come_in(value, tmp_path, capsys):
    parts = networks()
    parts["teacher"]["norm.bias"][1] = value
    write_official(tmp_path / "x.pt", parts)
    assert _ckpt("import", tmp_path / "x.pt", tmp_path / "out", "vjepa2", *HEADS) == 78
    assert "teacher.norm.bias holds numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
