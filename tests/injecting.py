"""Commands in forked children of a process that has imported everything: faults can so be put into them by the dozen.

A child is the command line itself from ``main`` on. What it lacks of a real start is the seconds of importing torch, in
which nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COUNTS: Counter[str] = Counter()  # of injected faults, printed at the end of the tests
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
NOBODY = 65534

SERVER = """
import json, os, resource, signal, sys, time
import sklearn.metrics, timm, torch, torch._dynamo, yaml
import breastcli.cli, breastcli.console, breastcli.show, breastcli.data.stain
from breastcli import evaluate, explain, predict, prepare, synthesize, train

def count_names(last):
    # Every step that a folder's list of names takes; between two of them a kill leaves the same.
    taken = 0

    def counting(real):
        def step(*words, **more):
            nonlocal taken
            taken += 1
            if taken == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)
        return step

    for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
        setattr(os, name, counting(getattr(os, name)))

def become(request):
    os.setpgrp()
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    if request["uid"] is not None:
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])
    if request["dies_before"] is not None:
        count_names(request["dies_before"])
    sys.argv = ["breastcli", *request["words"]]
    code = 70
    try:
        breastcli.cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def serve(request):
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        become(request)
    after, sent = request["after"], False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if after is not None and not sent and time.monotonic() - began >= after:
            os.kill(pid, request["signal"])  # not reaped yet, so it is nobody else's number
            sent = True
        time.sleep(0.001)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}

print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(serve(json.loads(line))), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@dataclass(frozen=True)
class Ended(Outcome):
    """How a command ended that faults were put into; ``code`` is negative where a signal ended it."""

    seconds: float

    @property
    def refused_in_one_line(self) -> bool:
        """Whether it ended with exit code 1 to 3 and one line that says why."""
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        clear = len(errors) == 1 and self.stderr.splitlines()[-1] == errors[0]
        return self.code in (1, 2, 3) and clear and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether nothing looks like a defect."""
        return not any(text in self.stderr for text in ("Traceback", "a defect of breastcli", "Error ---"))


class Injector:
    """Runs commands, with faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def run(
        self,
        cwd: Path,
        *words: object,
        after: float | None = None,
        signal: int = 9,
        file_bytes: int | None = None,
        uid: int | None = None,
        stdout: str | None = None,
        dies_before: int | None = None,
    ) -> Ended:
        """Run ``breastcli WORDS`` in a folder.

        Args:
            cwd: where.
            words: command and options.
            after: seconds after which it gets ``signal``.
            signal: number of the signal.
            file_bytes: size beyond which no file can be written.
            uid: user who it runs as.
            stdout: where its result goes, which is then not returned.
            dies_before: which renaming, removal or making of a folder, counted from 1, it is killed before.
        """
        request = {
            "cwd": str(cwd),
            "words": [str(word) for word in words],
            "after": after,
            "signal": signal,
            "file_bytes": file_bytes,
            "uid": uid,
            "dies_before": dies_before,
            "stdout": stdout or str(self.folder / "stdout.txt"),
            "stderr": str(self.folder / "stderr.txt"),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        known = json.loads(self.process.stdout.readline())
        printed = "" if stdout else (self.folder / "stdout.txt").read_text(errors="replace")
        said = (self.folder / "stderr.txt").read_text(errors="replace")
        return Ended(known["code"], printed, said, known["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a disk of a size on a folder.

    Raises:
        OSError: this user cannot.
    """
    _mount("-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def remount(folder: Path, option: str) -> None:
    """Change a mounted disk: ``ro``, ``rw`` or ``size=BYTES``."""
    _mount("-o", f"remount,{option}", str(folder))


def _mount(*words: str) -> None:
    try:
        subprocess.run(["mount", *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"cannot mount: {getattr(error, 'stderr', error)}") from error
