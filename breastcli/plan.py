"""What ``--dry-run`` says: what a job would do, without anything being written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli.errors import UserError
from breastcli.files import existing_parent


@dataclass(frozen=True)
class Plan:
    """What a job would do.

    Attributes:
        job: its name.
        out: folder or file that it would write.
        facts: what is known beforehand, by name: a text, a number, a list of texts, or numbers by name.
        notes: what a user should know.
        stamp: the warning that the result would carry, or "".
        num_bytes: rough size of what would lie on the disk at once; None where it hardly matters.
        resumes: whether it would go on with what is there.
        failure: why it would end with an error although all could be counted.
    """

    job: str
    out: Path
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    stamp: str = ""
    num_bytes: int | None = None
    resumes: bool = False
    failure: UserError | None = None

    @property
    def output(self) -> str:
        """What would become of what is there: "new", "replaces" or "resumes"."""
        is_there = any(self.out.iterdir()) if self.out.is_dir() else self.out.exists()
        if not is_there:
            return "new"
        return "resumes" if self.resumes else "replaces"

    @property
    def free_bytes(self) -> int:
        """What is free on the disk of ``out``."""
        return shutil.disk_usage(existing_parent(self.out)).free

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {
            "dry_run": True,
            "job": self.job,
            **self.facts,
            "notes": list(self.notes),
            "stamp": self.stamp or None,
            "output": self.output,
            "disk_bytes": self.num_bytes,
            "free_bytes": self.free_bytes,
            "failure": str(self.failure) if self.failure else None,
        }
