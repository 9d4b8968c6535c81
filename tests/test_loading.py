from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from breastcli.data.loading import load_batches, make_batches
from breastcli.data.store import PreparedData

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "batch_size"), [(33, 32), (64, 32), (5, 32), (97, 10), (1, 4)])
def test_batches_are_nearly_equal_and_complete(count: int, batch_size: int) -> None:
    batches = make_batches(np.arange(count), batch_size)
    sizes = [len(batch) for batch in batches]
    assert np.concatenate(batches).tolist() == list(range(count))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // batch_size)


@pytest.mark.parametrize("workers", [None, 1, 4])
def test_images_and_labels_stay_together_in_order(workers: int | None, prepared: Path) -> None:
    data = PreparedData.open(prepared)
    order = np.random.default_rng(0).permutation(len(data.rows))
    seen = 0
    batches = make_batches(order, 7)
    for rows, batch in zip(batches, load_batches(data, batches, CPU, workers), strict=True):
        assert batch.images.shape == (len(rows), 3, 32, 32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), data.images[rows])
        assert np.array_equal(batch.labels.numpy(), data.labels[rows])
        seen += len(rows)
    assert seen == len(order)


def test_leaving_early_stops_the_thread(prepared: Path) -> None:
    import threading

    data = PreparedData.open(prepared)
    before = threading.active_count()
    batches = load_batches(data, make_batches(np.arange(90), 2), CPU)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_changing_a_batch_leaves_the_store_alone(prepared: Path) -> None:
    data = PreparedData.open(prepared)
    before = np.array(data.images[:4])
    batch = next(load_batches(data, [np.arange(4)], CPU))
    batch.images.zero_()
    assert np.array_equal(data.images[:4], before)
