"""A training process with loader workers, ended from outside or without closing its loader.

Usage: loader_run.py DATASET kill|forget. To be killed, it first meets workers that hang and
writes the error's text. Then it writes the pids of the workers' server and of running workers.
"""

import multiprocessing.forkserver
import sys
import time
from functools import partial

from pipeline.data.loader import Loader, make_loader
from pipeline.data.settings import DataConfig, Source
from pipeline.errors import DataError
from pipeline.masks.collate import collate_plan
from tests.shards import make_plans


def main() -> None:
    folder, ending = sys.argv[1:]
    if ending == "kill":
        with start(folder, collate_or_hang) as loader:
            try:
                list(loader)
            except DataError as error:
                say(str(error))
    loader = start(folder, collate_plan)
    next(loader)
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    say(" ".join(str(pid) for pid in [server, *loader.pids]))
    if ending == "kill":
        time.sleep(60)


def start(folder: str, collate) -> Loader:
    config = DataConfig(sources=(Source(path=folder),), workers=2, worker_timeout_seconds=3.0)
    return make_loader(config, plans=make_plans(), collate=partial(collate, seed=1), seed=1)


def collate_or_hang(clips, plan, seed):
    if plan.step == 2:
        time.sleep(60)
    return collate_plan(clips, plan, seed)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
