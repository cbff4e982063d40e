"""The command line: what is imported, what is printed, and the exit code of every way to fail."""

import ast
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config.load import SHIPPED_CONFIGS
from pipeline.errors import ConfigError, DataError, ExitCode, StorageError

TINY = str(SHIPPED_CONFIGS / "tiny-cpu.yaml")
JEPA = Path(sys.executable).with_name("jepa")
HEAVY = ("torch", "numpy", "deepspeed", "ray", "mlflow", "av", "pydantic", "ruamel")


def fail_as(kind: str, *, json: bool = False) -> int | None:
    """Ends in the way that `kind` names; registered as the verb `fail` by the tests below."""
    if kind == "interrupted":
        raise KeyboardInterrupt
    if kind == "extra":
        importlib.import_module("deepspeed_that_is_not_there")
    failures = {
        "config": ConfigError("expected 1, got 2", remedy="Write 1."),
        "data": DataError("too many bad videos"),
        "storage": StorageError("no space on /x"),
        "bug": ZeroDivisionError("division by zero"),
        "pipe": BrokenPipeError("a worker died"),
    }
    if kind in failures:
        raise failures[kind]
    return {"saved": ExitCode.SAVED_RUN_AGAIN, "nothing": None}[kind]


@pytest.fixture
def fail(monkeypatch, capsys):
    """Runs `jepa fail KIND`; gives exit code, standard output and standard error."""
    verb = cli.Verb(words="fail", function=f"{__name__}:fail_as", help="Fail.")
    monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, verb))

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["fail", *arguments])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.words)
def test_every_verb_of_the_table_exists_as_a_function_with_a_docstring(verb):
    module, _, name = verb.function.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{verb.words}: no module {module}"
    body = ast.parse(Path(spec.origin).read_text()).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    assert ast.get_docstring(functions[name])


@pytest.mark.parametrize("arguments", [["--help"], [], ["config"], ["--version"], ["shwo"]])
def test_help_and_usage_errors_import_no_verb_and_nothing_heavy(arguments):
    program = (
        "import sys; from pipeline import cli; code = cli.main(sys.argv[1:]); "
        f"loaded = [name for name in {HEAVY} if name in sys.modules]; "
        "verbs = [name for name in sys.modules if name.startswith('pipeline.commands')]; "
        "sys.exit(f'loaded {loaded + verbs}' if loaded + verbs else code)"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (ExitCode.USAGE if arguments == ["shwo"] else 0), done.stderr


def test_help_answers_within_half_a_second_of_processor_time():
    command = [sys.executable, "-m", "pipeline.cli", "--help"]
    seconds = []
    for _ in range(3):  # The fastest is the program's own; the others share the machine.
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(seconds) < 0.5


def test_the_overview_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert {word for verb in cli.VERBS for word in verb.words.split()} <= set(
        overview.replace(",", " ").replace(".", " ").split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "expected a command, got 'trian'; did you mean `jepa train`?"),
        (["config", "shwo"], "did you mean `jepa config show`?"),
        (["verify"], "did you mean `jepa ckpt verify`?"),
        (["xyzzy"], "there are train, plan, config"),
        (["config", "show"], "CONFIG requires an argument"),
        (["config", "show", TINY, "--jsn"], "Did you mean --json?"),
        (["config", "schema", "extra"], "extra"),
        (["config", "show", "nowhere.yaml"], "no file at nowhere.yaml"),
    ],
)
def test_a_usage_error_exits_2_and_names_the_nearest_right_word(arguments, message, capsys):
    assert cli.main(arguments) == ExitCode.USAGE
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("error: ") == output.err.count("what to do: ") == 1
    assert output.out == ""


def test_a_verb_s_own_usage_error_points_to_its_help(capsys):
    assert cli.main(["plan", TINY, "--gpus", "0"]) == ExitCode.USAGE
    assert "what to do: See `jepa plan --help`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"), [("config", 78), ("data", 65), ("storage", 74), ("saved", 75), ("nothing", 0)]
)
def test_a_verb_s_error_or_result_is_the_exit_code(fail, kind, code):
    assert fail(kind)[0] == code


def test_an_error_is_a_message_and_a_remedy_on_standard_error(fail):
    code, out, err = fail("config")
    assert (code, out) == (ExitCode.CONFIG, "")
    assert err == "error: expected 1, got 2\nwhat to do: Write 1.\n"


def test_with_json_standard_output_holds_the_error_as_one_document(fail):
    code, out, err = fail("config", "--json")
    assert json.loads(out) == {
        "error": {
            "type": "ConfigError",
            "exit_code": code,
            "message": "expected 1, got 2",
            "remedy": "Write 1.",
        }
    }
    assert err.startswith("error: expected 1, got 2")


def test_an_unexpected_exception_is_a_bug_with_traceback_and_remedy(fail):
    code, _, err = fail("bug")
    assert code == ExitCode.BUG
    assert "Traceback" in err
    assert "raise failures[kind]" in err
    assert "error: unexpected ZeroDivisionError: division by zero\nwhat to do: " in err


def test_a_broken_pipe_to_somebody_else_is_not_mistaken_for_a_closed_terminal(fail):
    code, _, err = fail("pipe")
    assert code == ExitCode.BUG
    assert "a worker died" in err


def test_an_interrupt_from_the_keyboard_exits_130_with_a_line(fail):
    assert fail("interrupted") == (130, "", "interrupted from the keyboard\n")


def test_a_missing_library_names_the_extra_to_install(fail, monkeypatch):
    monkeypatch.setitem(cli.EXTRAS, "deepspeed_that_is_not_there", "train")
    code, _, err = fail("extra")
    assert code == ExitCode.USAGE
    assert "needs deepspeed_that_is_not_there" in err
    assert "pip install 'jepa-pipeline[train]'" in err


@pytest.mark.parametrize("arguments", [["config", "schema"], ["--help"]], ids=["plain", "rich"])
def test_output_that_nobody_reads_ends_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = run_alone(arguments, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.NOBODY_READS, b"")


def test_an_error_that_nobody_reads_keeps_its_exit_code():
    reading, writing = os.pipe()
    os.close(reading)
    done = run_alone(["trian", "--json"], stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == ExitCode.USAGE


def test_a_full_disk_below_the_output_is_a_refusal_of_storage():
    with Path("/dev/full").open("wb") as full:
        done = run_alone(["--help"], stdout=full)
    assert done.returncode == ExitCode.STORAGE
    assert b"standard output cannot be written: No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_closed_output_ends_no_command_and_no_file_takes_its_place(tmp_path):
    out = tmp_path / "out"
    script = f"{JEPA} --help >&- 2>&- <&-; echo $? > {out}"
    subprocess.run(["bash", "-c", script], check=True)
    assert out.read_text() == "0\n"


def test_a_terminal_without_a_sign_gets_its_number(tmp_path):
    path = tmp_path / "größe.yaml"
    path.write_text(Path(TINY).read_text())
    done = run_alone(["config", "show", str(path)], env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe.yaml:5" in done.stdout


def test_a_folder_that_is_gone_is_named_as_such(tmp_path):
    gone = tmp_path / "gone"
    script = f"mkdir {gone} && cd {gone} && rmdir {gone} && exec {JEPA} config show x.yaml"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    assert done.returncode == ExitCode.USAGE
    assert b"the current one has been removed" in done.stderr


def run_alone(arguments, *, env=None, **streams) -> subprocess.CompletedProcess[bytes]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([JEPA, *arguments], env=env, check=False, **streams)


def test_config_verbs_print_text_and_json(capsys, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(Path(TINY).read_text().replace("seed: 239", "seed: 1"))
    assert cli.main(["config", "show", TINY, "seed=7", "stages.0.steps=30"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("name: tiny-cpu")
    assert "seed: 7 " in shown
    assert cli.main(["config", "show", TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["seed"] == 239
    assert cli.main(["config", "diff", TINY, str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"key": "seed", "left": "239", "right": "1"}]
    assert cli.main(["config", "schema"]) == 0
    assert "\nseed: a whole number" in capsys.readouterr().out


def test_a_wrong_configuration_exits_78_with_every_mistake(capsys):
    wrong = ["sed=7", "global_batch=0", "seed=9223372036854775808"]
    assert cli.main(["config", "show", TINY, *wrong]) == ExitCode.CONFIG
    output = capsys.readouterr().err
    assert "seed: expected a whole number at least 0 and below 9223372036854775808" in output
    assert "override sed=7: sed: expected a known key, got 'sed'; did you mean 'seed'?" in output
    assert "override global_batch=0: global_batch: expected a whole number at least 1" in output
