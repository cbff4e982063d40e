"""`jepa compare`: the figures of the runs' own records, differences alone, and a page of curves."""

import json
import re

import pytest

from pipeline.cli import main
from pipeline.report.facts import gather
from tests.run_folder import RunFolder, finished_run
from tests.test_report import check


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    finished_run(folder / "base")
    other = RunFolder(folder / "other", seed=3).start().steps(1, 90)
    other.probe("linear", 0, 0.2).probe("linear", 30, 0.6).probe("linear", 60, 0.5)
    config = other.path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 239", "seed: 7"))
    flat = RunFolder(folder / "flat", seed=4).start().steps(1, 30, rank=1.1)
    return [str(folder / "base"), str(other.path), str(flat.path)]


def test_json_holds_what_the_runs_recorded_and_only_settings_that_differ(runs, capsys):
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["base", "other", "flat"]
    assert found["standing"]["step"] == {
        "base": "120 of 120",
        "other": "90 of 120",
        "flat": "30 of 120",
    }
    assert found["standing"]["health"]["flat"] == "collapsed"
    assert found["scores"]["synthetic linear, best"]["other"] == "60.0 % at step 30"
    assert found["scores"]["synthetic linear, newest"]["other"] == "50.0 % at step 60"
    assert found["scores"]["synthetic attentive, best"]["flat"] == "–"
    assert found["settings"] == {
        "name": {"base": "base", "other": "other", "flat": "flat"},
        "seed": {"base": "239", "other": "7", "flat": "239"},
    }
    assert "30 of 30 steps, 16 frames at 64 px" in found["stages"]["stage 2"]["other"]
    assert found["stages"]["stage 3"]["other"] == "–"


def test_the_page_stands_alone_and_draws_every_run_that_has_the_curve(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "seed" in printed
    assert printed.splitlines()[-1] == str(page)
    html = page.read_text()
    assert check(html).headings == ["Standing", "Scores", "Curves", "Stages", "Settings"]
    labels = re.findall(r'aria-label="([^"]+)"', html)
    assert "Loss: base, other, flat" in labels
    assert "synthetic, linear probe: base, other" in labels
    assert "synthetic, knn probe: base" in labels


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path, capsys):
    RunFolder(tmp_path / "base").start().steps(1, 12)
    assert main(["compare", runs[0], str(tmp_path / "base"), "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["runs"]
    assert len(set(names)) == 2
    assert all(name.endswith("/base") for name in names)


def test_a_run_whose_configuration_cannot_be_read_is_compared_by_the_rest(runs, tmp_path, capsys):
    old = RunFolder(tmp_path / "old").start().steps(1, 12)
    (old.path / "config.yaml").write_text("name: old\nretired_key: 1\n")
    assert main(["compare", runs[0], str(old.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "retired_key" in found["settings"]["configuration"]["old"]
    assert found["standing"]["step"]["old"] == "12 of ?"
    assert gather(old.path).config is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "from 2 to 8 runs to compare, got 0"),
        (["{one}"], 2, "got 1"),
        (["{one}"] * 9, 2, "got 9"),
        (["{one}", "{one}x"], 2, "Did you mean"),
        (["{one}", "{one}", "--html", "/nowhere/x.html"], 74, "/nowhere/x.html"),
    ],
)
def test_mistakes_are_answered(runs, capsys, words, code, said):
    assert main(["compare", *(word.format(one=runs[0]) for word in words)]) == code
    assert said in capsys.readouterr().err
