"""A process that comes to a check and then does nothing, as one that hangs in a driver."""

import sys
import time

from launch.preflight.gathering import Gathering
from pipeline.environment import node_name, read_launch


def main() -> int:
    Gathering(read_launch(), node_name(), time.monotonic() + 60.0)
    time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
