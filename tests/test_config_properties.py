"""Promises of configuration that hold for every mutation of every shipped run."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.emit import yaml_lines
from pipeline.config.fields import ITEM, leaves
from pipeline.config.load import SHIPPED_CONFIGS, load_config, resolved_data, resolved_yaml
from pipeline.config.scalars import scalar_text
from pipeline.config.tree import Plain
from pipeline.errors import ConfigError
from pipeline.run import RunConfig

SHIPPED = sorted(SHIPPED_CONFIGS.glob("*.yaml"))
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Key = tuple[str | int, ...]


@cache
def resolved(path: Path) -> dict[str, object]:
    return resolved_data(load_config(path, RunConfig).config)


def keys_of(data: Plain, above: Key = ()) -> list[Key]:
    """Keys of all values that hold no others."""
    if isinstance(data, (dict, list)) and data:
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        return [key for name, value in pairs for key in keys_of(value, (*above, name))]
    return [above]


def sections_of(data: Plain, above: Key = ()) -> list[Key]:
    """Keys of all mappings, the whole included."""
    if not isinstance(data, (dict, list)):
        return []
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    below = [key for name, value in pairs for key in sections_of(value, (*above, name))]
    return [above, *below] if isinstance(data, dict) else below


def at(data: Plain, key: Key) -> Plain:
    for part in key:
        data = data[part]
    return data


def write(folder: Path, data: dict[str, object]) -> tuple[Path, list[str]]:
    lines = [line.text for line in yaml_lines(data)]
    path = folder / "run.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path, lines


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_run_loads_and_its_resolved_form_loads_back_equal(path, tmp_path):
    loaded = load_config(path, RunConfig)
    (tmp_path / "config.yaml").write_text(resolved_yaml(loaded.config))
    again = load_config(tmp_path / "config.yaml", RunConfig)
    assert again.config == loaded.config
    assert {".".join(map(str, key)) for key in keys_of(resolved(path))} <= again.origins.keys()


@quick
@given(data=st.data())
def test_an_unknown_key_anywhere_in_a_file_is_named_with_its_line(data, tmp_path):
    config = deepcopy(resolved(data.draw(st.sampled_from(SHIPPED))))
    section = data.draw(st.sampled_from(sections_of(config)))
    known = data.draw(st.sampled_from(sorted(at(config, section)) or ["key"]))
    position = data.draw(st.integers(0, len(known)))
    wrong = known[:position] + data.draw(st.sampled_from("zq_7")) + known[position:]
    at(config, section)[wrong] = 1
    path, lines = write(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        load_config(path, RunConfig)
    number = next(
        n for n, line in enumerate(lines, 1) if line.strip(" -") == f"{scalar_text(wrong)}: 1"
    )
    dotted = ".".join(map(str, (*section, wrong)))
    assert f"{path}:{number}: {dotted}: expected" in str(caught.value)
    assert repr(wrong) in str(caught.value)


@quick
@given(data=st.data())
def test_a_mapping_where_a_value_belongs_is_named_with_its_line(data, tmp_path):
    config = deepcopy(resolved(data.draw(st.sampled_from(SHIPPED))))
    key = data.draw(st.sampled_from(keys_of(config)))
    at(config, key[:-1])[key[-1]] = {"surprise": 1}
    path, lines = write(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        load_config(path, RunConfig)
    number = next(n for n, line in enumerate(lines, 1) if line.strip(" -") == "surprise: 1")
    dotted = ".".join(map(str, key))
    found = [line for line in str(caught.value).split("\n") if f": {dotted}" in line]
    assert found, str(caught.value)
    assert any(f"{path}:{near}:" in line for line in found for near in (number - 1, number))


@quick
@given(data=st.data())
def test_a_wrong_override_anywhere_is_named_with_its_own_text(data):
    path = data.draw(st.sampled_from(SHIPPED))
    key = data.draw(st.sampled_from(keys_of(resolved(path))))
    broken = data.draw(st.sampled_from(["misspelt", "beneath", "value"]))
    dotted = ".".join(map(str, key))
    override = {
        "misspelt": f"{dotted}zz=1",
        "beneath": f"{dotted}.zz=1",
        "value": f"{dotted}={{surprise: 1}}",
    }[broken]
    with pytest.raises(ConfigError) as caught:
        load_config(path, RunConfig, ["seed=1", override])
    (mistake, *_) = str(caught.value).split("\n")[1:]
    assert mistake.startswith(f"  override {override}: {'.'.join(map(str, key[:-1]))}")


@quick
@given(data=st.data())
def test_overriding_a_key_with_its_own_value_changes_nothing(data):
    path = data.draw(st.sampled_from(SHIPPED))
    keys = st.sampled_from([key for key in keys_of(resolved(path)) if key])
    overrides = []
    for key in data.draw(st.lists(keys, min_size=1, max_size=4)):
        (line,) = yaml_lines({".".join(map(str, key)): at(resolved(path), key)})
        overrides.append(line.text.replace(": ", "=", 1))
    assert resolved_data(load_config(path, RunConfig, overrides).config) == resolved(path)


def test_every_key_of_the_schema_has_a_sentence():
    silent = [doc.key for doc in leaves(RunConfig) if not doc.sentence.endswith((".", ":"))]
    assert silent == []


def test_the_schema_names_every_key_that_a_resolved_run_has():
    known = {doc.key for doc in leaves(RunConfig)}
    for path in SHIPPED:
        for key in keys_of(resolved(path)):
            names = [ITEM if isinstance(part, int) else part for part in key]
            while names and names[-1] == ITEM:
                names.pop()
            assert ".".join(names) in known
