"""A rank that is started beside others and knows nothing of them: contention without talking."""

import os
import sys

from benchmarks import plan_rank

_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> int:
    """Forgets its place, but for the name of the file that it writes."""
    is_first = os.environ["RANK"] == "0"
    for name in _PLACE:
        os.environ.pop(name, None)
    if not is_first:
        sys.argv[2] += "/others"
        os.makedirs(sys.argv[2], exist_ok=True)  # noqa: PTH103 - a text
    return plan_rank.main()


if __name__ == "__main__":
    sys.exit(main())
