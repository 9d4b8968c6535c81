"""What PyTorch's launcher ``torchrun`` told this process; known without importing torch."""

from __future__ import annotations

import os


def num_processes() -> int:
    """Return how many processes torchrun started for this job; 1 where it did not."""
    return _told("WORLD_SIZE", 1)


def process_rank() -> int:
    """Return the number of this process among all of them; 0 writes and speaks."""
    return _told("RANK", 0)


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return _told("LOCAL_RANK", 0)


def _told(name: str, alone: int) -> int:
    # Schedulers of clusters set WORLD_SIZE and RANK as well, for jobs that are no launch of torchrun's.
    return int(os.environ.get(name, alone)) if "TORCHELASTIC_RUN_ID" in os.environ else alone
