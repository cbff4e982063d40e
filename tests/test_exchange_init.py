"""Runs that start from given weights, and probes and exports of runs: the same networks throughout.

Two ranks under ZeRO-3, in fp32 and in bf16: everything is compared for equality, not closeness.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import layout
from pipeline.cli import main
from pipeline.errors import CheckpointError, ExitCode
from pipeline.exchange import load_encoder
from pipeline.exchange.open import commit_tensors, open_networks
from pipeline.report.facts import gather
from pipeline.report.head import state_sentence
from pipeline.track.metrics import read_events
from tests.exchange_data import write_tiny
from tests.probe_data import ssv2_task, write_run, write_ssv2
from tests.ranks import ROOT, run_on_ranks
from tests.shards import write_dataset
from tests.test_engine_run import finish, jepa, write_config

HEADS = ["--heads", "2", "--predictor-heads", "2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Weights in the official layout, imported; and a run's checkpoint of the same size."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("given")
    parts = write_tiny(folder)
    words = ["ckpt", "import", str(folder / "official.pt"), str(folder / "both")]
    assert main([*words, "--format", "vjepa2", *HEADS]) == 0
    words = ["ckpt", "export", str(folder / "both"), str(folder / "one"), "--weights", "student"]
    assert main([*words, "--format", "safetensors"]) == 0
    write_run(folder, (0, 3))
    return folder, parts


@pytest.fixture(scope="module")
def started(given, tmp_path_factory):
    pytest.importorskip("deepspeed", reason="the extra `train` is not installed")
    folder, _ = given
    out = tmp_path_factory.mktemp("started")
    commit = folder / "run" / "checkpoints" / layout.commit_name(3)
    cases = {
        "both": {"path": str(folder / "both"), "precision": "fp32"},
        "half": {"path": str(folder / "both"), "precision": "bf16"},
        "one": {"path": str(folder / "one"), "precision": "fp32"},
        "commit": {"path": str(commit), "precision": "fp32"},
    }
    arguments = {"cases": cases, "wrong": str(folder / "both")}
    return out, run_on_ranks("tests.workers.init_run", 2, out, arguments)


@pytest.mark.parametrize("case", ["both", "half"])
def test_student_is_the_file_and_teacher_its_average_exactly(given, started, case):
    (_, parts), (out, _) = given, started
    held = dict(commit_tensors(layout.list_commits(out / case)[0].path))
    wanted = {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}
    assert held.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(held[name], tensor), name


@pytest.mark.parametrize("case", ["both", "half"])
def test_the_gathered_copies_of_small_parameters_are_the_files_too(given, started, case):
    (_, parts), (_, ranks) = given, started
    for rank in ranks:
        live = rank[case]["live"]
        assert {"encoder.norm.bias", "teacher.norm.bias", "predictor.mask_tokens"} <= live.keys()
        for name, values in live.items():
            part, _, rest = name.partition(".")
            expected = parts[part][rest]
            if case == "half":
                expected = expected.bfloat16().float()
            assert torch.equal(torch.tensor(values), expected), name


def test_without_an_average_the_teacher_is_a_copy_of_the_student_and_that_is_said(given, started):
    (_, parts), (out, ranks) = given, started
    held = dict(commit_tensors(layout.list_commits(out / "one")[0].path))
    for name, tensor in parts["encoder"].items():
        assert torch.equal(held[f"encoder.{name}"], tensor), name
        assert torch.equal(held[f"teacher.{name}"], tensor), name
    assert ranks[0]["one"]["origin"]["teacher"] == "a copy of the student"
    assert ranks[0]["both"]["origin"]["teacher"] == "from the source's average"


def test_a_runs_checkpoint_is_taken_as_well(given, started):
    (folder, _), (out, ranks) = given, started
    held = dict(commit_tensors(layout.list_commits(out / "commit")[0].path))
    saved = dict(open_networks(folder / "run").tensors)
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in saved.items())
    assert ranks[0]["commit"]["origin"]["source_step"] == 3


def test_the_optimiser_is_fresh_and_ranks_agree(started):
    _, ranks = started
    for case in ("both", "half", "one", "commit"):
        assert ranks[0][case]["optimizer_pieces"] == ranks[1][case]["optimizer_pieces"] == 0
        assert ranks[0][case]["losses"] == ranks[1][case]["losses"]


def test_weights_that_do_not_fit_are_refused_on_all_ranks_with_every_difference(started):
    _, ranks = started
    said = ranks[0]["refused"]
    assert said == ranks[1]["refused"]
    assert said.startswith("ConfigError")
    for part in (
        "objective.encoder.depth: this run has 1, the weights 2",
        "objective.encoder.heads: this run has 4, the weights 2",
        "encoder.blocks.1.norm1.weight: this run has no place for it",
        "objective.encoder.width=48 objective.encoder.depth=2",
        "attention.positions=rope attention.rope=tiled",
    ):
        assert part in said


def test_one_call_loads_an_encoder_without_the_libraries_of_training(given):
    folder, _ = given
    code = (
        "import sys; from pipeline.exchange import load_encoder; import torch\n"
        f"encoder = load_encoder({str(folder / 'run')!r})\n"
        "print(tuple(encoder(torch.zeros(1, 3, 4, 32, 32)).shape))\n"
        "print({'deepspeed', 'ray', 'mlflow', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(1, 32, 48)", "set()"]


def test_jepa_train_starts_from_weights_and_tells_everywhere(given, tmp_path):
    folder, parts = given
    write_dataset(tmp_path / "data", 12)
    config = write_config(tmp_path, "begun")
    dry = ["train", str(config), "--dry-run"]
    assert main([*dry, f"init_from={folder / 'nowhere'}"]) == ExitCode.USAGE
    too_many = "objective.predictor.num_mask_tokens=3"
    assert main([*dry, f"init_from={folder / 'both'}", too_many]) == ExitCode.CONFIG
    assert main([*dry, f"init_from={folder / 'both'}"]) == ExitCode.DONE
    assert not (tmp_path / "begun").exists()
    words = [f"init_from={folder / 'both'}", "stages.0.steps=3", "stages.1.steps=1"]
    code, output = finish(jepa("train", config, *words))
    assert code == ExitCode.DONE, output
    run = tmp_path / "begun"
    info = json.loads((run / "run.json").read_text())
    assert info["init_from"]["source"] == str(folder / "both")
    assert "init_from" in [event.name for event in read_events(run)]
    assert "started from the weights of" in state_sentence(gather(run))
    first = load_encoder(run, step=0).state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in parts["teacher"].items())
    last = load_encoder(run).state_dict()
    assert not torch.equal(last["norm.weight"], parts["teacher"]["norm.weight"])
    assert main(["ckpt", "export", str(run), str(tmp_path / "hf"), "--format", "hf"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in (
        "weights of `both` (vjepa2,",
        "| short | 4 | 4 | 32 px | 3 of 3 |",
        "global batch 8",
        "32 clips",
    ):
        assert part in card, part


def test_weights_that_are_not_finite_start_no_run_and_get_no_score(given, tmp_path, capsys):
    folder, _ = given
    write_dataset(tmp_path / "data", 12)
    config = write_config(tmp_path, "never")
    export = ["ckpt", "export", str(folder / "both"), str(tmp_path / "hf"), "--format", "hf"]
    assert main([*export, "--no-check", "--resolution", "32", "--frames", "4"]) == 0
    assert main(["train", str(config), "--dry-run", f"init_from={tmp_path / 'hf'}"]) == 0
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(path)
    tensors["encoder.layernorm.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["train", str(config), "--dry-run", f"init_from={tmp_path / 'hf'}"]) == 78
    assert "norm.bias holds numbers that are not finite" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"norm\.bias holds numbers that are not finite"):
        load_encoder(tmp_path / "hf")


def test_a_probe_of_an_exchange_folder_is_the_probe_of_its_checkpoint(given, tmp_path, capsys):
    folder, _ = given
    write_ssv2(tmp_path / "set", train=9, validation=6)
    task = ssv2_task(tmp_path / "set")
    (tmp_path / "task.yaml").write_text(
        f"name: squares\n"
        f"data: {{kind: ssv2, videos: {task.data.videos}, annotations: {task.data.annotations}}}\n"
        "clip: {frames: 4, fps: 4.0, resolution: 32, views: 1}\n"
    )
    export = ["ckpt", "export", str(folder / "run")]
    assert main([*export, str(tmp_path / "ours"), "--format", "safetensors"]) == 0
    assert main([*export, str(tmp_path / "hf"), "--format", "hf", "--no-check"]) == 0
    capsys.readouterr()
    words = ["--task", str(tmp_path / "task.yaml"), "--no-ray", "--head", "knn", "--json"]
    found = []
    for path in (folder / "run", tmp_path / "ours", tmp_path / "hf"):
        assert main(["probe", str(path), *words]) == 0
        (record,) = json.loads(capsys.readouterr().out)["records"]
        found.append(record)
    run, ours, theirs = found
    assert (run["encoder_digest"], run["step"]) == (ours["encoder_digest"], ours["step"])
    assert [one["top1"] for one in found] == [run["top1"]] * 3
    encoders = [load_encoder(path).state_dict() for path in (folder / "run", tmp_path / "hf")]
    assert all(torch.equal(encoders[1][name], tensor) for name, tensor in encoders[0].items())
    assert theirs["step"] is None
    assert (tmp_path / "hf/probes/squares-imported-teacher.json").is_file()
    assert main(["probe", str(tmp_path / "hf"), *words[:2], "--step", "3"]) == ExitCode.USAGE
