"""Several `jepa launch` in one process, which imports once: `python -m tests.workers.launches`.

Reads a JSON object of word lists by job from standard input; `@NAME` in a word is that job's
number. Prints the numbers by name.
"""

import contextlib
import io
import json
import sys

from pipeline.cli import main


def launch_all(jobs: dict[str, list[str]]) -> dict[str, str]:
    ids: dict[str, str] = {}
    for name, words in jobs.items():
        filled = [ids[word[1:]] if word.startswith("@") else word for word in words]
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            code = main(["launch", "slurm", "--json", *filled])
        if code:
            sys.exit(f"{name}: {told.getvalue()}")
        ids[name] = json.loads(told.getvalue())["id"]
    return ids


if __name__ == "__main__":
    print(json.dumps(launch_all(json.loads(sys.argv[1]))))  # noqa: T201 - for the test to read
