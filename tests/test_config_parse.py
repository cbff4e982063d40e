"""YAML text to a tree: YAML 1.2 scalars, lines, and limits that no text gets past."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.emit import yaml_lines
from pipeline.config.parse import MAX_DEPTH, MAX_NODES, Parsed, parse_tree
from pipeline.config.scalars import resolve_scalar, scalar_text
from pipeline.config.tree import Origin, plain


def parsed(text: str) -> Parsed:
    return parse_tree(text, lambda line: Origin(file="a.yaml", line=line))


def problems(text: str) -> list[str]:
    return [str(mistake) for mistake in parsed(text).mistakes]


NUMBERS = {
    "5e-4": 5e-4,
    "-5E-4": -5e-4,
    "1e5": 1e5,
    ".5": 0.5,
    "1.": 1.0,
    "+3": 3,
    "014": 14,
    "0o14": 12,
    "0x1F": 31,
    "-.inf": -math.inf,
}
WORDS = {"~": None, "null": None, "": None, "true": True, "FALSE": False}
TEXTS = ["24:00:00", "1:30", "yes", "no", "on", "off", "y", "1_000", "0b11", "2026-01-01", "1e"]


@pytest.mark.parametrize(("text", "value"), [*NUMBERS.items(), *WORDS.items()])
def test_numbers_and_words_are_those_of_the_yaml_1_2_core_schema(text, value):
    root = parsed(f"key: {text}\n").root
    assert root is not None
    found = plain(root)["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", TEXTS)
def test_everything_else_is_text_also_what_yaml_1_1_took_for_more(text):
    root = parsed(f"key: {text}\n").root
    assert root is not None
    assert plain(root) == {"key": text}


def test_digits_beyond_any_use_are_text_and_cost_no_time():
    assert resolve_scalar("9" * 100_000) == "9" * 100_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3: a: expected each key once, got it again"),
        ("a: {b: 1, b: 1}\n", "a.yaml:1: a.b: expected each key once, got it again"),
        ("a: !!int '5'\n", "a.yaml:1: a: expected a plain value, got the tag"),
        ("a: !!python/object/apply:os.system [ls]\n", "a.yaml:1: a: expected a plain value"),
        ("!x k: 1\n", "a.yaml:1: expected a plain value, got the tag !x"),
        ("? [1]\n: 2\n", "a.yaml:1: expected a word as key, got a list"),
        ("a: {<<: {b: 1}}\n", "a.yaml:1: a: expected a key, got '<<'"),
        ("a: *b\n", "a.yaml:1: a: expected an anchor &b completed above, got none"),
        ("a: &b [*b]\n", "a.yaml:1: a.0: expected an anchor &b completed above, got none"),
        ("a: 1\n---\nb: 1\n", "a.yaml:2: expected one YAML document"),
        ("a:\n\t- b\n", "a.yaml:2: expected YAML, got a syntax error"),
        ("a: 1\nb: \x07\n", "a.yaml:2: expected readable text"),
        ("a: '\ud800'\n", "a.yaml:1: expected readable text"),
        ('a: "\\U99999999"\n', "a.yaml:1: expected YAML"),
    ],
)
def test_what_is_not_a_plain_configuration_is_refused_with_its_line(text, expected):
    (problem,) = problems(text)
    assert problem.startswith(expected)


def test_aliases_repeat_values_with_the_line_of_their_own_key():
    root = parsed("a: &x {b: 1}\nc: *x\n").root
    assert root is not None
    assert plain(root) == {"a": {"b": 1}, "c": {"b": 1}}
    assert [str(node.origin) for _, node in root.children()] == ["a.yaml:1", "a.yaml:2"]


def bomb(fan_out: int, levels: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * fan_out)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "- " * 1000,
        "a: {" * 1000,
        "[x, " * 10 + "x, " * MAX_NODES,
        bomb(fan_out=10, levels=10),
        bomb(fan_out=1, levels=MAX_DEPTH + 2),
    ],
    ids=["brackets", "dashes", "braces", "items", "wide aliases", "deep aliases"],
)
def test_a_text_that_would_blow_up_stops_at_the_limit(text):
    assert parsed(text).root is None
    assert "with aliases unfolded, got more" in problems(text)[-1]


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_is_parsed_or_refused_but_never_crashes(text):
    found = parsed(text)
    assert found.root is not None or found.mistakes


@given(st.text(alphabet="ab:-[]{}&*!|>'\"%?#,\n \t<\\U0", max_size=40))
def test_any_mixture_of_yaml_s_own_signs_never_crashes(text):
    found = parsed(text)
    assert found.root is not None or found.mistakes


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8")),
    st.sampled_from([*NUMBERS, *WORDS, *TEXTS, " a", "a ", "a: b", "- a", "#", "'", "<<"]),
)
KEYS = st.text(st.characters(codec="utf-8"), max_size=12) | st.just("<<")


@given(
    st.dictionaries(
        KEYS,
        st.recursive(
            SCALARS,
            lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_written_data_reads_back_as_it_was(data):
    text = "".join(f"{line.text}\n" for line in yaml_lines(data))
    found = parsed(text)
    assert found.mistakes == []
    assert found.root is not None
    assert (plain(found.root) or {}) == data


@given(SCALARS)
def test_a_written_scalar_is_ascii_and_keeps_its_type(value):
    text = scalar_text(value)
    assert text.isascii()
    root = parsed(f"key: {text}").root
    assert root is not None
    assert type(plain(root)["key"]) is type(value)
