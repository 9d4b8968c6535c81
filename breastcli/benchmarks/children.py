"""Our own commands as processes of their own: clean timings, and memory that runs out ends one of them only."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from breastcli.errors import Terminated, UserError

POLL_S = 1.0
PATIENCE_S = 5.0  # for a child that Ctrl-C in a terminal has reached, too
LIMIT_S = 60.0  # for a child to write what it must after being asked to stop


def run_command(words: Sequence[str], on_tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run ``breastcli WORDS --json --quiet`` and return the object that it prints.

    Args:
        words: the command and its options.
        on_tick: called about once a second while it works.

    Raises:
        UserError: it failed; the message is the last line of what it said.
        KeyboardInterrupt: after it has stopped.
    """
    command = [sys.executable, "-m", "breastcli", *words, "--json", "--quiet"]
    # Files, because a pipe that nobody empties stops the child.
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=said)
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_S)
                on_tick()
        except BaseException as stopped:
            _stop(child, told=not isinstance(stopped, Terminated))
            raise
        for file in (printed, said):
            file.seek(0)
        if child.returncode:
            raise UserError(_reason(child.returncode, said.read().decode(errors="replace")))
        return json.loads(printed.read())


def _stop(child: subprocess.Popen[bytes], *, told: bool) -> None:
    """Let a child stop by itself if it was ``told`` to like us, else tell it; kill it if that does not help."""
    try:
        if told:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE_S)
                return
        child.send_signal(signal.SIGINT if told else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LIMIT_S)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _reason(code: int, said: str) -> str:
    """Return why a command failed: its last line, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = said.strip().splitlines() or [f"ended with exit code {code}"]
    return lines[-1].removeprefix("error: ")
