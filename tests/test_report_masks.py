"""The picture of what masks keep, in the report and beside a plan."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.commands.plan import plan
from pipeline.config.load import load_config
from pipeline.errors import StorageError
from pipeline.report.masks import masks_section
from pipeline.run import RunConfig

torch.set_num_threads(1)

TINY = Path("pipeline/configs/tiny-cpu.yaml")


def test_every_stage_and_mask_is_drawn_under_every_rule_and_the_runs_own_is_named():
    config = load_config(TINY, RunConfig, ("masks.truncate=fixed",)).config
    page = masks_section(config)
    assert page.count("<svg") == 3 * 2
    for rule in ("min", "fixed (this run)", "none"):
        assert page.count(f">{rule}</text>") == 3 * 2
    assert "time step of the clip" in page


def test_the_table_shows_that_min_keeps_the_start_and_the_others_every_time_alike():
    config = load_config(TINY, RunConfig, ("stages.0.micro_batch=8",)).config
    rows = re.findall(r"<tr><td>short-64</td><td>1</td>(.*?)</tr>", masks_section(config))
    late = {
        re.split("[,<]", row.removeprefix("<td>"))[0]: int(re.findall(r"(\d+)% of it", row)[0])
        for row in rows
    }
    assert late["min"] < 18
    assert late["fixed"] == pytest.approx(25, abs=3)
    assert late["none"] == 25


def test_a_plan_writes_the_picture_of_a_run_that_has_not_begun(tmp_path, capsys):
    page = tmp_path / "masks.html"
    plan(TINY, masks=page)
    assert page.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["masks.html"]
    assert "Tokens kept" in capsys.readouterr().out
    with pytest.raises(StorageError, match="cannot be written"):
        plan(TINY, masks=tmp_path / "no-such-folder" / "masks.html")
