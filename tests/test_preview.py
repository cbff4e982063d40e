"""The contact sheet shows what the loop trains on, not a second idea of it."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.config.load import SHIPPED_CONFIGS, load_config
from pipeline.data.loader import make_loader
from pipeline.masks.collate import collate_plan
from pipeline.report.preview import stage_previews, with_dataset
from pipeline.run import RunConfig
from pipeline.stages import Share, micro_batch_plans
from tests.shards import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("preview") / "dataset", 12)


@pytest.fixture(scope="module")
def run(dataset: Path) -> RunConfig:
    return with_dataset(load_config(SHIPPED_CONFIGS / "demo.yaml", RunConfig).config, dataset)


def test_the_strips_are_the_frames_and_masks_that_training_gets(run: RunConfig):
    previews = list(stage_previews(run, num_clips=2))
    assert [preview.title.split(":")[0] for preview in previews] == [s.name for s in run.stages]
    share = Share(global_batch=run.global_batch, rank=0, world_size=1)
    plans = micro_batch_plans(run.stages, share, 1, 1, run.masks, run.grid)
    data = run.data.model_copy(update={"workers": 0})
    loader = make_loader(
        data,
        plans=(next(plans),),
        collate=lambda clips, plan: collate_plan(clips, plan, run.seed),
        seed=run.seed,
    )
    batch = next(loader)
    plain = previews[0].rows[0]
    assert batch.keys[0] in plain.label
    first_frame_HWC = batch.video_BCTHW[0, :, 0].permute(1, 2, 0).numpy()
    times = plain.frames_THWC.shape[1] // first_frame_HWC.shape[0]
    assert np.array_equal(plain.frames_THWC[0, ::times, ::times], first_frame_HWC)
    masked = previews[0].rows[1].frames_THWC[0, ::times, ::times]
    same_HW = (masked == first_frame_HWC).all(axis=-1)
    first_moment = batch.masks[0].context_BK[0] < batch.grid.h * batch.grid.w
    patch = first_frame_HWC.shape[0] // batch.grid.h
    for token in batch.masks[0].context_BK[0][first_moment].tolist():
        row, column = divmod(token, batch.grid.w)
        assert same_HW[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].all()


def test_the_verb_draws_a_picture_and_refuses_a_folder_without_a_dataset(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "sheet.png"
    config = str(SHIPPED_CONFIGS / "demo.yaml")
    words = ["prep", "preview", str(dataset), "--config", config, "--clips", "1"]
    assert main([*words, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out
    assert main(["prep", "preview", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
