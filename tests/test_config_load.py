"""Loading: what a file and overrides become, and every mistake named where it stands."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from data_prep.settings import PrepSettings
from launch.site import Site
from pipeline.conduct.settings import ConductConfig
from pipeline.config.load import MAX_BYTES, Loaded, load_config, resolved_yaml
from pipeline.config.section import Section
from pipeline.errors import ConfigError, ExitCode, UsageError
from pipeline.plan.cluster import Cluster
from pipeline.probe.tasks import TaskConfig


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Slow(Section):
    kind: Literal["slow"] = "slow"
    patience: int = 1


class Fast(Section):
    kind: Literal["fast"] = "fast"
    speed: int = 1


class Part(Section):
    name: str
    steps: int = Field(default=10, gt=0)
    rate: float = 0.5


class Whole(Section):
    """A schema with one of every kind of key a run has."""

    folder: Path
    seed: int = 0
    size: Literal["small", "large"] = "small"
    window: tuple[float, float] = (0.75, 1.5)
    layers: tuple[Annotated[int, Field(ge=0)], ...] = (1, 2)
    parts: tuple[Part, ...] = Field(default=(), max_length=3)
    some: tuple[Part, ...] = Field(default=(Part(name="one"),), min_length=1)
    named: dict[str, Part] = Field(default={})
    mode: Annotated[Slow | Fast, Field(discriminator="kind")] = Slow(patience=5)
    part: Part = Part(name="only", steps=3)
    spare: Part | None = None
    width: int | None = None
    is_on: bool = True
    colour: Colour = Colour.RED
    duration: str = "1:30"

    @model_validator(mode="after")
    def _seed_is_lucky(self) -> Self:
        if self.seed == 13:
            raise ValueError("expected a lucky seed")
        return self


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a text as the file run.yaml of an otherwise empty current folder."""
    monkeypatch.chdir(tmp_path)

    def from_text(text: str, *overrides: str) -> Loaded[Whole]:
        Path("run.yaml").write_text(text)
        return load_config(Path("run.yaml"), Whole, overrides)

    return from_text


def mistakes(load, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code is ExitCode.CONFIG
    first, *lines = str(caught.value).split("\n")
    assert first.startswith(f"{len(lines)} mistake")
    return [line.removeprefix("  ") for line in lines]


def test_yaml_lists_texts_and_integers_become_tuples_paths_enums_and_floats(load):
    config = load(
        "folder: data/clips\nwindow: [1, 2.5]\nlayers: [3]\ncolour: blue\n"
        "parts:\n- {name: a, rate: 1}\n- name: b\n  steps: 20\nnamed: {x: {name: c}}\n"
    ).config
    assert config.folder == Path("data/clips")
    assert config.window == (1.0, 2.5)
    assert isinstance(config.window[0], float)
    assert config.layers == (3,)
    assert config.colour is Colour.BLUE
    assert config.parts == (Part(name="a", rate=1.0), Part(name="b", steps=20))
    assert config.named == {"x": Part(name="c")}


def test_an_empty_file_gives_the_defaults_and_names_what_is_required(load):
    assert mistakes(load, "") == ["run.yaml:1: folder: expected a path, got nothing"]
    assert load("", "folder=x").config == Whole(folder=Path("x"))


MISTAKES = {
    "seed: '3'": "seed: expected a whole number, got the text '3'; did you mean 3?",
    "seed: 1e3": "seed: expected a whole number, got 1000.0; did you mean 1000?",
    "seed: true": "seed: expected a whole number, got true",
    "seed: 1_0": "seed: expected a whole number, got the text '1_0'; did you mean 10?",
    "is_on: no": "is_on: expected true or false, got the text 'no'; did you mean false?",
    "is_on: 1": "is_on: expected true or false, got 1",
    "duration: 90": "duration: expected a text, got 90",
    "width: None": "width: expected a whole number or null, got the text 'None'; "
    "did you mean null?",
    "size: larg": "size: expected 'small' or 'large', got the text 'larg'; did you mean 'large'?",
    "colour: Blu": "colour: expected 'red' or 'blue', got the text 'Blu'; did you mean 'blue'?",
    "window: [1]": "window.1: expected a number, got nothing",
    "window: [1, 2, 3]": "window: expected a list of 2: a number; a number, got a list of 3",
    "layers: [1, -1]": "layers.1: expected a whole number at least 0, got -1",
    "parts: [{steps: 3}]": "parts.0.name: expected a text, got nothing",
    "parts: [{name: a}, {name: b}, {name: c}, {name: d}]": "parts: "
    "expected a list, each item a mapping with the keys of Part "
    "(of length at most 3), got a list of 4",
    "some: [{name: 3}]": "some.0.name: expected a text, got 3",
    "some: []": "some: expected a list, each item a mapping with the keys of Part "
    "(of length at least 1), got a list of 0",
    "part: {name: a, steps: 0}": "part.steps: expected a whole number above 0, got 0",
    "part: {name: a, rate: .inf}": "part.rate: expected a finite number, got .inf",
    "part: 3": "part: expected a mapping with the keys of Part, got 3",
    "sed: 3": "sed: expected a known key, got 'sed'; did you mean 'seed'?",
    "steps: 3": "steps: expected a known key, got 'steps'; did you mean 'parts.N.steps'?",
    "part: {name: a, q: 1}": "part.q: expected one of name, steps, rate, got 'q'",
    "mode: {kind: fats}": "mode.kind: expected 'slow' or 'fast', got the text 'fats'; "
    "did you mean 'fast'?",
    "mode: {speed: 3}": "mode.kind: expected 'slow' or 'fast', got nothing",
    "mode: {kind: fast, patience: 3}": "mode.patience: expected a known key, got 'patience', "
    "which needs kind=slow",
    "named: {x: {name: 3}}": "named.x.name: expected a text, got 3",
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.items())
def test_a_mistake_says_place_key_expectation_value_and_nearest_word(load, text, expected):
    assert mistakes(load, f"folder: x\n{text}\n") == [f"run.yaml:2: {expected}"]


def test_the_line_is_the_key_s_own_inside_lists_and_mappings(load):
    found = mistakes(load, "folder: x\nparts:\n- name: a\n  steps: 3\n- name: b\n  stesp: 3\n")
    assert found == [
        "run.yaml:6: parts.1.stesp: expected a known key, got 'stesp'; did you mean 'steps'?"
    ]


def test_a_section_s_own_check_is_reported_like_any_mistake(load):
    assert mistakes(load, "folder: x\nseed: 13\n") == ["run.yaml:1: expected a lucky seed"]


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_lines(load):
    text = "sed: 1\nwindow: [a, b]\nfolder: x\nfolder: y\npart: !!python/name:os {name: a}\n"
    found = mistakes(load, text, "seed=1.5", "nonsense", "parts.3.steps=1", "spare={nam: }")
    places = [line.split(": ")[:2] for line in found]
    assert places == [
        ["run.yaml:1", "sed"],
        ["run.yaml:2", "window.0"],
        ["run.yaml:2", "window.1"],
        ["run.yaml:4", "folder"],
        ["run.yaml:5", "part"],
        ["override nonsense", "expected key=value or key.sub=value"],
        ["override parts.3.steps=1", "parts.3"],
        ["override seed=1.5", "seed"],
        ["override spare={nam", "}"],
        ["override spare={nam", "}"],
    ]


def test_overrides_reach_sections_lists_and_values_written_nowhere(load):
    loaded = load(
        "folder: x\nparts:\n- name: a\n- name: b\n",
        "parts.1.steps=7",
        "spare.name=extra",
        "layers=[4, 5]",
        "layers.0=6",
        "part.rate=2",
        "seed=1",
        "seed=2",
        "width=",
    )
    config = loaded.config
    assert config.parts == (Part(name="a"), Part(name="b", steps=7))
    assert config.spare == Part(name="extra")
    assert config.layers == (6, 5)
    assert config.part == Part(name="only", steps=3, rate=2.0)
    assert config.seed == 2
    assert config.width is None


def test_an_override_of_an_aliased_list_item_leaves_its_twin_alone(load):
    config = load("folder: x\nparts: [&one {name: a}, *one]\n", "parts.1.steps=7").config
    assert config.parts == (Part(name="a"), Part(name="a", steps=7))


@pytest.mark.parametrize(
    "overrides", [("mode.kind=fast", "mode.speed=3"), ("mode.speed=3", "mode.kind=fast")]
)
def test_overrides_can_choose_another_alternative_in_any_order(load, overrides):
    assert load("folder: x\n", *overrides).config.mode == Fast(speed=3)


def test_origins_name_lines_overrides_and_leave_out_defaults(load):
    origins = load("folder: x\n\nparts:\n- name: a\n  steps: 3\n", "part.rate=2").origins
    assert {key: str(origin) for key, origin in origins.items()} == {
        "folder": "run.yaml:1",
        "parts": "run.yaml:3",
        "parts.0": "run.yaml:4",
        "parts.0.name": "run.yaml:4",
        "parts.0.steps": "run.yaml:5",
        "part.rate": "override",
    }


def test_resolved_yaml_says_every_field_and_loads_back_to_an_equal_configuration(load):
    config = load(
        "folder: 'yes: no'\nparts: [{name: '1e3'}]\nnamed: {on: {name: \"\\t\\u2028\"}}\n"
    ).config
    text = resolved_yaml(config)
    assert all(f"{name}:" in text for name in Whole.model_fields)
    assert load(text).config == config


def test_relative_paths_stay_relative_to_the_current_folder(tmp_path):
    (tmp_path / "run.yaml").write_text("folder: clips\n")
    assert load_config(tmp_path / "run.yaml", Whole).config.folder == Path("clips")


def test_a_missing_file_names_its_neighbours(load):
    Path("runs").mkdir()
    Path("runs/config.yaml").touch()
    Path("tiny-cpu.yaml").touch()
    with pytest.raises(UsageError, match=r"no file at tiny_cpu\.yaml; did you mean tiny-cpu\.yaml"):
        load_config(Path("tiny_cpu.yaml"), Whole)
    with pytest.raises(UsageError, match=r"the folder runs; did you mean runs/config\.yaml\?"):
        load_config(Path("runs"), Whole)
    with pytest.raises(UsageError, match="the folder nowhere does not exist"):
        load_config(Path("nowhere/run.yaml"), Whole)


@pytest.mark.parametrize(
    "schema", [Cluster, ConductConfig, PrepSettings, Site, TaskConfig], ids=lambda s: s.__name__
)
def test_a_wrong_file_of_another_kind_is_not_sent_to_the_keys_or_files_of_runs(load, schema):
    Path("wrong.yaml").write_text("nonsens: 1\n")
    with pytest.raises(ConfigError) as wrong:
        load_config(Path("wrong.yaml"), schema)
    assert schema.keys_are_in in wrong.value.remedy
    assert "`jepa config schema`" not in wrong.value.remedy
    with pytest.raises(UsageError) as missing:
        load_config(Path("tiny-cpuu.yaml"), schema)
    assert "tiny-cpu.yaml" not in str(missing.value)
    with pytest.raises(UsageError, match=r"tiny-cpu\.yaml"):
        load_config(Path("tiny-cpuu.yaml"), Whole)


def test_a_file_that_is_no_configuration_is_refused_with_its_line(load):
    Path("huge.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="at most 256 KiB"):
        load_config(Path("huge.yaml"), Whole)
    Path("latin.yaml").write_bytes("folder: x\n# é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: expected UTF-8 text, got byte 0xe9"):
        load_config(Path("latin.yaml"), Whole)
    assert mistakes(load, "- 1\n") == [
        "run.yaml:1: expected keys and values (key: value), got a list of 1"
    ]
    broken = mistakes(load, "folder: [x\nseed: 3\n", "seed=[")
    assert [line.split(": ")[0] for line in broken] == ["run.yaml:2", "override seed=["]


def test_a_wrong_file_with_thousands_of_keys_is_answered_with_a_short_list(load):
    text = "".join(f"key_{number}: 1\n" for number in range(300))
    with pytest.raises(ConfigError) as caught:
        load(text)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("301 mistakes")
    assert lines[-1] == "  … and 201 more"
