"""`python -m launch.k8s_entry FILE`: becomes the `jepa` whose words a JSON file lists.

KubeRay hands a RayJob's entry point to a shell, and the kubelet looks for variables in it. Words
that lie in a file pass neither.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Replaces this process, so that signals and the exit code are the command's own."""
    words = json.loads(Path(sys.argv[1]).read_text())
    command = [sys.executable, "-m", "pipeline.cli", *words]
    os.execv(sys.executable, command)  # noqa: S606 - our own module


if __name__ == "__main__":
    main()
