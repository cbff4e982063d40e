"""The report: what it says, that it stands alone, and that it draws what it should."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.cli import main
from pipeline.clip import Grid
from pipeline.config.load import load_config, resolved_yaml
from pipeline.errors import StorageError
from pipeline.report.charts import Chart, Series, Span, svg
from pipeline.report.encoders import clip_plan, draw_feature_maps, whole_clips
from pipeline.report.facts import gather
from pipeline.report.features import feature_map_rows, principal_colours
from pipeline.report.html import duration, number, percent
from pipeline.report.page import render, write_report
from pipeline.report.probes import compare, learning_sentence
from pipeline.run import RunConfig
from pipeline.track.folder import read_probes, update_run_info, write_json
from pipeline.track.mlflow_sink import mlflow_run_id
from tests.probe_data import tiny_encoder, write_run
from tests.run_folder import RunFolder, finished_run
from tests.shards import write_dataset

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Tags must close in order, and nothing may be fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.sources, self.text = [], [], [], []
        self.in_svg = False

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, _tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in checker.sources)
    assert "<script" not in html
    assert not re.search(r"url\((?!#)", html)
    return checker


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("runs") / "demo").path


@pytest.fixture(scope="module")
def page(finished):
    return write_report(finished, out=finished / "page.html").read_text()


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    run = RunFolder(tmp_path / "run").start().steps(1, 3).path
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError) as caught:
        write_report(run, out=tmp_path / "folder")
    assert str(caught.value) == f"Cannot write the report to {tmp_path / 'folder'}: Is a directory"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]


def test_a_name_that_is_no_text_stands_in_the_page_by_its_number(tmp_path):
    run = RunFolder(tmp_path / "bad\udcff" / "run").start().steps(1, 3).path
    assert r"bad\udcff" in write_report(run).read_text()


def test_the_page_is_one_file_of_well_formed_html(page):
    checker = check(page)
    assert checker.headings == [
        "Probe scores", "Loss", "Health of the features", "Feature maps", "Stages",
        "What masks keep, over a clip's time", "Speed",
        "Time", "Schedules", "Events", "Samples left out", "Configuration",
    ]  # fmt: skip
    assert len(page) < 2_000_000


def test_the_page_says_in_words_how_the_run_stands(page):
    text = " ".join(check(page).text)
    assert "Finished at step 120 of 120: all stages are done. It was resumed once." in text
    assert "The features are healthy" in text
    assert "it has learned something that was not there before" in text
    assert "stopped: SIGTERM was received" in text


def test_what_a_run_wrote_cannot_become_markup(page):
    assert "<b>evil</b>" not in page
    assert "&lt;b&gt;evil&lt;/b&gt;" in page


def test_no_two_elements_share_an_id_and_every_reference_is_met(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', page))
    assert wanted <= set(ids)


def test_no_drawn_colour_is_left_that_would_not_follow_the_page(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    colours = {c for d in drawings for c in re.findall(r"(?:stroke|fill): (#\w+)", d)}
    assert len(drawings) > 10
    assert colours == set()


def test_the_stage_table_has_what_each_stage_took(page):
    row = re.search(r"<tr><td>long-64</td>(.*?)</tr>", page)
    assert row is not None
    cells = re.findall(r"<td>(.*?)</td>", row.group(1))
    assert cells[:6] == ["16", "64 px", "512", "30 of 30", "240", "123 k"]


def test_the_shares_of_time_sum_to_everything(finished):
    ledger = gather(finished).ledger
    assert ledger is not None
    parts = [getattr(ledger, n) for n in ledger.__slots__ if n.endswith("_seconds")]
    assert sum(parts) - ledger.wall_seconds == pytest.approx(ledger.wall_seconds)
    assert ledger.starting_seconds == pytest.approx(19.0, abs=1.1)
    # 17 steps after the checkpoint of step 30 were taken again.
    assert ledger.lost_seconds == pytest.approx(17 * 0.21, rel=0.15)
    assert ledger.down_seconds == pytest.approx(65.0, abs=1.1)


def test_what_the_run_chose_is_told_with_the_reason_and_only_the_last_of_a_kind(tmp_path):
    run = RunFolder(tmp_path / "chooser").start().steps(1, 12)
    assert "What the run chose" not in render(gather(run.path))
    for seconds in (600.0, 137.0):
        run.event("save_interval", step=10, seconds_between=seconds, reason="0.9 s a save <b>")
    run.event("attention", step=1, calls="teacher", kernel="sdpa", milliseconds={"math": 3.5})
    run.event("recompute", step=1, stage="long", encoder=7, predictor=0)
    run.event("peak", tflops=None, source="not stated")
    html = render(gather(run.path))
    text = " ".join(check(html).text)
    for told in (
        "2 min 17 s",
        "0.9 s a save <b>",
        "kernel for teacher",
        "math 3.5 ms",
        "encoder 7",
    ):
        assert told in text
    chosen = html[html.index("What the run chose") : html.index("Events")]
    assert "10 min" not in chosen


def test_a_run_that_has_hardly_begun_names_what_is_missing_and_how_to_get_it(tmp_path):
    run = RunFolder(tmp_path / "new").start()
    html = render(gather(run.path))
    text = " ".join(check(html).text)
    assert "No step has been taken yet." in text
    assert f"jepa probe {run.path} --task FILE" in text
    assert "No features have been measured" in text


def test_a_run_without_a_readable_configuration_still_has_a_page(tmp_path):
    run = RunFolder(tmp_path / "old").start().steps(1, 12)
    (run.path / "config.yaml").write_text("name: old\nretired_key: 1\n")
    html = render(gather(run.path))
    check(html)
    assert "Step" not in html.split("</h1>")[0]
    assert "retired_key" in html
    (run.path / "config.yaml").unlink()
    assert "there is no config.yaml" in render(gather(run.path))


def test_a_loss_that_is_not_finite_leaves_a_gap_and_a_page(tmp_path):
    run = RunFolder(tmp_path / "nan").start().steps(1, 5)
    nan = replace(run.report(6, None), loss=float("nan"), skipped=True)
    run.report = lambda step, _rank: replace(nan, step=step)
    run.steps(6, 7)
    check(render(gather(run.path)))


def test_a_collapsed_run_is_called_so(tmp_path):
    run = RunFolder(tmp_path / "flat").start().steps(1, 60, rank=1.01)
    text = " ".join(check(render(gather(run.path))).text)
    assert "The features have collapsed" in text
    assert "nearly all" in text.lower()


def test_probe_points_are_means_over_seeds_by_head_and_step(finished):
    linear = next(c for c in compare(read_probes(finished)) if c.head == "linear")
    assert linear.untrained is not None
    assert linear.untrained.top1 == pytest.approx(0.21)
    assert [point.step for point in linear.trained] == [60, 120]
    assert linear.newest.num_seeds == 3
    assert linear.gain == pytest.approx(0.4225 - 0.21)


def test_a_gain_that_luck_could_give_is_not_called_learning(tmp_path):
    run = RunFolder(tmp_path / "luck").probe("linear", 0, 0.20, num_val=30)
    run.probe("linear", 10, 0.30, num_val=30)
    assert "luck" in learning_sentence(compare(read_probes(run.path)))
    run.probe("knn", 0, 0.20, num_val=3000).probe("knn", 10, 0.30, num_val=3000)
    assert "has learned" in learning_sentence(compare(read_probes(run.path)))
    worse = RunFolder(tmp_path / "worse").probe("knn", 0, 0.5, num_val=3000)
    worse.probe("knn", 10, 0.3, num_val=3000)
    assert "worse" in learning_sentence(compare(read_probes(worse.path)))


GRID = Grid(t=4, h=3, w=5)


def test_colours_are_the_principal_components_in_place():
    # One region of the clip differs from the rest: its tokens get one colour, the others another.
    features = torch.zeros(4, 3, 5, 16)
    features[:, :, :2] = torch.linspace(1, 2, 16)
    features += 1e-3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    colours = principal_colours(features.reshape(-1, 16), GRID)
    assert colours.shape == (4, 3, 5, 3)
    assert colours.dtype == np.uint8
    red = colours[..., 0].astype(int)
    inside, outside = red[:, :, :2], red[:, :, 2:]
    assert abs(inside.mean() - outside.mean()) > 200
    assert max(inside.std(), outside.std()) < 10


def test_colours_do_not_depend_on_a_rotation_of_the_features():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 16, generator=generator) * torch.linspace(3, 0.1, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    one, two = (principal_colours(f, GRID).astype(int) for f in (features, features @ rotation))
    for channel in range(3):
        # A component's sign is arbitrary; its contrast is not.
        same = np.abs(one[..., channel] - two[..., channel]).max()
        flipped = np.abs(255 - one[..., channel] - two[..., channel]).max()
        assert min(same, flipped) <= 2


def test_equal_features_are_grey_and_narrow_ones_do_not_fail():
    assert (principal_colours(torch.ones(60, 16), GRID) == 128).all()
    assert principal_colours(torch.randn(60, 2), GRID).shape == (4, 3, 5, 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with two checkpoints and the shards it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = write_dataset(folder / "shards", 4)
    run_dir = write_run(folder, (0, 3))
    overrides = [f"data.sources.0.path={dataset}", "track.mlflow.enabled=false"]
    config = load_config(run_dir / "config.yaml", RunConfig, overrides).config
    (run_dir / "config.yaml").write_text(resolved_yaml(config))
    update_run_info(run_dir, {"run_id": "r"})
    return run_dir, config


def test_maps_are_drawn_from_the_first_and_the_newest_teacher(trained):
    rows = draw_feature_maps(*trained, num_clips=2)
    assert len(rows) == 2
    for row in rows:
        assert list(row.maps) == ["untrained", "step 3"]
        shapes = {maps.shape[0] for maps in row.maps.values()} | {row.frames_THWC.shape[0]}
        assert len(shapes) == 1
        assert not np.array_equal(row.maps["untrained"], row.maps["step 3"])
    again = draw_feature_maps(*trained, num_clips=2)
    assert np.array_equal(rows[0].maps["step 3"], again[0].maps["step 3"])


def test_a_map_shows_the_features_of_the_encoder_it_names(trained):
    run_dir, config = trained
    (row,) = draw_feature_maps(run_dir, config, num_clips=1)
    plan = clip_plan(config, 3, 1)
    clips = whole_clips(config, plan)
    # Commit 3 was written from a network with seed 3.
    (mine,) = feature_map_rows({"mine": tiny_encoder(3).eval()}, clips, plan.grid)
    assert np.array_equal(mine.maps["mine"], row.maps["step 3"])


def test_the_command_writes_the_page_with_maps_and_prints_its_path_last(trained, capsys):
    run_dir, _ = trained
    assert main(["report", str(run_dir), "--clips", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run_dir / "report.html")
    html = (run_dir / "report.html").read_text()
    check(html)
    assert html.count("data:image/png;base64,") == 3


def test_a_report_is_written_without_maps_when_the_data_has_moved(trained, tmp_path, capsys):
    run_dir, _ = trained
    text = (run_dir / "config.yaml").read_text()
    try:
        (run_dir / "config.yaml").write_text(text.replace("shards", "elsewhere"))
        assert main(["report", str(run_dir), "--out", str(tmp_path / "x.html"), "--json"]) == 0
    finally:
        (run_dir / "config.yaml").write_text(text)
    assert '"feature_maps_left_out": "' in capsys.readouterr().out
    assert "Left out: " in (tmp_path / "x.html").read_text()


def test_a_place_that_cannot_be_written_is_an_error_with_its_exit_code(finished, capsys):
    code = main(["report", str(finished), "--no-feature-maps", "--out", "/nowhere/x.html"])
    assert code == 74
    assert "/nowhere/x.html" in capsys.readouterr().err


def test_a_chart_of_many_steps_stays_small_and_keeps_its_shape():
    steps = np.arange(1, 250_001)
    series = Series(name="loss", steps=steps, values=1 / np.sqrt(steps), smooth=True)
    spans = (
        Span(name="primary", first_step=1, last_step=240_000),
        Span(name="cooldown", first_step=240_001, last_step=250_000),
    )
    text = svg(Chart(title="Loss", series=(series,), spans=spans, wide=True))
    assert len(text) < 100_000
    assert "primary" in text
    assert 'aria-label="Loss: loss"' in text


def test_empty_and_constant_series_can_be_drawn():
    nothing = Series(name="none", steps=[1, 2], values=[float("nan")] * 2)
    constant = Series(name="flat", steps=[1, 2, 3], values=[0.04, 0.04, 0.04000000001])
    for series in (nothing, constant):
        assert svg(Chart(title="t", series=(series,))).startswith("<svg")
        assert svg(Chart(title="t", series=(series,), from_zero=True)).startswith("<svg")


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.25, "0.25 s"), (42.0, "42.0 s"), (142.0, "2 min 22 s"), (7300, "2 h 1 min"),
     (200_000, "2 d 7 h"), (None, "–")],
)  # fmt: skip
def test_time_spans_are_told_in_their_two_largest_units(value, words):
    assert duration(value) == words


def test_numbers_are_told_with_their_unit():
    words = [number(v) for v in (7, 960, 4224, 522_240, 3.2e6, 7.5e9, 0.123456, None)]
    assert words == ["7", "960", "4,224", "522 k", "3.2 M", "7.5 G", "0.123", "–"]
    # No powers of ten: 6.51e+03 tokens a second are hard to compare with 10.7 k.
    assert [number(v) for v in (6510.4, 999.7, 999_999)] == ["6,510", "1,000", "1 M"]
    assert percent(0.1234) == "12.3 %"


def test_a_report_brings_an_mlflow_that_was_down_up_to_date(tmp_path, capsys):
    run = finished_run(tmp_path / "runs" / "late")
    database = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    # As an uploading process leaves it that never got through.
    write_json(run.path / "mlflow.json", {"tracking_uri": database, "state": "down"})
    assert main(["report", str(run.path), "--no-feature-maps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["uploaded"] is True
    client = MlflowClient(database)
    found = client.get_run(mlflow_run_id(run.path))
    assert (found.info.status, found.data.tags["jepa.status"]) == ("FINISHED", "finished")
    steps = {metric.step for metric in client.get_metric_history(found.info.run_id, "loss")}
    assert steps >= set(range(10, 121, 10))
    assert {"config.yaml", "report.html"} == {
        artifact.path for artifact in client.list_artifacts(found.info.run_id)
    }


def test_a_report_of_a_run_that_goes_on_leaves_its_mlflow_alone(tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path / "live").start().steps(1, 12)
    monkeypatch.setattr("pipeline.report.facts.time.time", lambda: run.clock + 1.0)
    write_json(run.path / "mlflow.json", {"tracking_uri": "http://127.0.0.1:9", "state": "up"})
    assert main(["report", str(run.path), "--no-feature-maps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["uploaded"] is False
    assert not (run.path / "mlflow.log").exists()
