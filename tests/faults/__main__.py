"""The long run of faults: hurts runs for minutes, then prints which promises were kept.

    python -m tests.faults --faults 100 --mutants 10000 --soak 3000

Writes benchmarks/results/faults.json and the same as a table, faults.md. Exits 1 if a promise
was broken.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.result import RESULTS, write_result
from tests.faults import evidence, mutants, soak, storm
from tests.faults.table import judge, markdown, part_verdicts


def main() -> int:
    """Run everything, print and write the table."""
    arguments = _arguments()
    begin = time.monotonic()
    parts: dict[str, Any] = {}
    # First and alone: its times are figures.
    _say(f"storm: at least {arguments.faults} faults")
    with tempfile.TemporaryDirectory() as scratch:
        parts["storm"] = storm.run(arguments.faults, Path(scratch), seed=arguments.seed)
    _say(f"mutants: {arguments.mutants}")
    parts["mutants"], log = mutants.run_apart(arguments.mutants)
    _say(f"soak: {arguments.soak} steps, beside the tests that promises name")
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as beside:
        soaking = beside.submit(soak.run, arguments.soak, Path(scratch))
        seen = evidence.run_tests(evidence.named_tests()) if arguments.tests else {}
        parts["soak"] = soaking.result()
    verdicts = part_verdicts(parts, log)
    rows = judge(seen, verdicts, with_tests=arguments.tests)
    figures = {name: asdict(report) if report else log for name, report in parts.items()}
    figures |= {"promises": [asdict(row) for row in rows], "seconds": time.monotonic() - begin}
    text = markdown(rows, parts, arguments)
    sys.stdout.write(text)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    write_result("faults", figures, settings, folder=arguments.out)
    (arguments.out / "faults.md").write_text(text)
    return int(any(row.verdict == "FAIL" for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=100, help="faults done to one run")
    parser.add_argument("--mutants", type=int, default=10_000, help="mutated videos")
    parser.add_argument("--soak", type=int, default=3000, help="steps without faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


if __name__ == "__main__":
    raise SystemExit(main())
