"""How long the command line takes to answer."""

from __future__ import annotations

import subprocess
import sys

from breastcli.benchmarks.timing import CPU, Timing, measure

COMMAND = (sys.executable, "-m", "breastcli", "--help")


def time_help(rounds: int) -> Timing:
    """Time ``breastcli --help`` as a whole process."""
    return measure(lambda: subprocess.run(COMMAND, capture_output=True, check=True), CPU, rounds)
