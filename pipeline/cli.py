"""`jepa`: names every verb as text, imports only the one that runs, and speaks every error.

Errors go to standard error as `error: …` and `what to do: …`. With `--json` standard output also
gets one line `{"error": {"type", "exit_code", "message", "remedy"}}`, so a program reading it finds
either the result or the reason. The exit codes are those of `pipeline.errors.ExitCode`, and the
shell's own 130 (interrupted from the keyboard) and 141 (nobody reads the output any more).
"""

import contextlib
import difflib
import io
import json
import os
import select
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TextIO

from cyclopts import App, CycloptsError, UnknownCommandError

from pipeline.errors import INTERRUPTED, ExitCode, JepaError, StorageError, UsageError
from pipeline.redact import redacted
from pipeline.verbs import GROUPS, VERBS, Verb

NOBODY_READS = 141


# Libraries of the extras in pyproject.toml: what to install when a verb misses one.
EXTRAS = {
    "deepspeed": "train",
    "mlflow": "train",
    "ray": "train",
    "flash_attn": "gpu",
}


def main(tokens: Sequence[str] | None = None) -> int:
    """Run the verb that `tokens` (the process's arguments by default) name.

    Returns:
        The exit code.

    Raises:
        SystemExit: With `ExitCode.BUG`, from the unexpected exception it reports.
    """
    _open_streams()
    arguments = list(sys.argv[1:] if tokens is None else tokens)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _write(sys.stderr, "interrupted from the keyboard\n")
        return INTERRUPTED
    except SystemExit as ended:
        # So rich ends a process when nobody reads its output, with 1.
        if isinstance(ended.__context__, BrokenPipeError):
            return NOBODY_READS
        raise
    except Exception as error:
        code = _end_of(error, arguments)
        if code == ExitCode.BUG and not isinstance(error, JepaError):
            raise SystemExit(code) from error
    return code


def build_app() -> App:
    """The command-line parser with every verb of `VERBS`, none of them imported."""
    app = App(
        name="jepa",
        help="Pretrain V-JEPA-2-style world models from video.",
        version=lambda: metadata.version("jepa-pipeline"),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    groups: dict[str, App] = {}
    for order, verb in enumerate(VERBS):
        group, _, name = verb.words.rpartition(" ")
        if group and group not in groups:
            text = f"{GROUPS[group]} Verbs: {', '.join(_words_after([group]))}."
            groups[group] = App(name=group, help=text, sort_key=order)
            app.command(groups[group])
        parent = groups[group] if group else app
        parent.command(verb.function, name=name, help=verb.help, sort_key=order)
    return app


def _run(arguments: list[str]) -> int:
    app = build_app()
    verb = _named(arguments)
    if verb is not None:
        _must_be_somewhere()
        command = app
        for word in verb.words.split():
            command = command[word]
        command.help = None  # The function's docstring says more than the overview's line.
    return int(app(arguments, exit_on_error=False, print_error=False) or ExitCode.DONE)


def _named(arguments: list[str]) -> Verb | None:
    by_words = {verb.words: verb for verb in VERBS}
    return by_words.get(" ".join(arguments[:1])) or by_words.get(" ".join(arguments[:2]))


def _usage_error(error: CycloptsError) -> UsageError:
    chain = list(error.command_chain or ())
    remedy = f"See `{' '.join(['jepa', *chain, '--help'])}`."
    if not isinstance(error, UnknownCommandError):
        error.verbose = False
        return UsageError(str(error), remedy=remedy)
    # Its own text would import every verb, torch and all, to name the nearest one.
    word = (error.unused_tokens or [""])[0]
    known = _words_after(chain)
    near = _nearest_verb(word, chain, known)
    hint = f"did you mean `jepa {near}`?" if near else f"there are {', '.join(known)}"
    return UsageError(f"expected a command, got {word!r}; {hint}", remedy=remedy)


def _words_after(chain: list[str]) -> list[str]:
    """The words that may follow those already given, in the order of `VERBS`."""
    depth = len(chain)
    split = [verb.words.split() for verb in VERBS]
    return list(dict.fromkeys(w[depth] for w in split if w[:depth] == chain and len(w) > depth))


def _nearest_verb(word: str, chain: list[str], known: list[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return " ".join([*chain, close[0]])
    elsewhere = {verb.words.split()[-1]: verb.words for verb in VERBS}
    close = difflib.get_close_matches(word, list(elsewhere), n=1)
    return elsewhere[close[0]] if close else None


def _missing_extra(error: BaseException | None) -> UsageError | None:
    """The error to show if a library of an extra is not installed, else None."""
    while error is not None:
        library = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and library in EXTRAS:
            remedy = f"Install it: pip install 'jepa-pipeline[{EXTRAS[library]}]'."
            return UsageError(
                f"this command needs {library}, which is not installed", remedy=remedy
            )
        error = error.__cause__ or error.__context__
    return None


def _end_of(error: Exception, arguments: list[str]) -> int:
    """Tells of an error; gives the exit code."""
    as_json = "--json" in arguments
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return NOBODY_READS
    if isinstance(error, JepaError):
        return _say(_with_verb(error, arguments), as_json)
    if isinstance(error, CycloptsError):
        return _say(_usage_error(error), as_json)
    known = _missing_extra(error) or _full_output(error)
    if known is not None:
        return _say(known, as_json)
    # Libraries put addresses and headers into their errors.
    _write(sys.stderr, redacted(traceback.format_exc()))
    return _say(JepaError(f"unexpected {type(error).__name__}: {error}"), as_json)


def _nobody_reads() -> bool:
    """Whether the broken pipe is our own output, and not one to a worker or a server."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # Not a file: captured or closed.
        return False
    poller = select.poll()
    poller.register(output, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poller.poll(0)):
        return False
    _let_go(sys.stdout)
    return True


def _full_output(error: Exception) -> StorageError | None:
    """The error to show if standard output is a file that takes no more, else None."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
        return None
    try:
        # Flushing again says nothing: what could not be written has been thrown away.
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as again:
        if error.errno == again.errno:
            _let_go(sys.stdout)
            return StorageError(
                f"standard output cannot be written: {again.strerror}",
                remedy="Send it to a file system with free space and run the same command again.",
            )
    return None


def _open_streams() -> None:
    """Lets no output that is closed, or has no sign for a character, end a command."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Else the next file that is opened would take the number, and what libraries print.
            free = os.open(os.devnull, os.O_RDWR)
            os.dup2(free, number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        stream = getattr(sys, name)
        if number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _must_be_somewhere() -> None:
    try:
        Path.cwd()
    except OSError:
        raise UsageError(
            "expected to be started in a folder, but the current one has been removed",
            remedy="Change to one that is there, and run the same command again.",
        ) from None


def _with_verb(error: JepaError, arguments: list[str]) -> JepaError:
    """The error, pointing to the help of the verb where it points to no other remedy."""
    verb = _named(arguments)
    if verb is not None and error.remedy == UsageError.remedy:
        error.remedy = f"See `jepa {verb.words} --help`."
    return error


def _say(error: JepaError, as_json: bool) -> int:
    message = redacted(str(error))
    _write(sys.stderr, f"error: {message}\nwhat to do: {error.remedy}\n")
    if as_json:
        document = {
            "type": type(error).__name__,
            "exit_code": int(error.exit_code),
            "message": message,
            "remedy": error.remedy,
        }
        _write(sys.stdout, json.dumps({"error": document}) + "\n")
    return int(error.exit_code)


def _write(stream: TextIO, text: str) -> None:
    """Last words; where nobody can read them, the exit code still tells."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        _let_go(stream)


def _let_go(stream: TextIO) -> None:
    # The interpreter flushes once more at its end; let that go nowhere.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
