"""Embeddings of images under a frozen network: computed once, kept beside the data."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from breastcli.data.augment import Augmentation, dihedral
from breastcli.data.loading import load_batches, to_network
from breastcli.data.store import PreparedData, embeddings_file, open_array
from breastcli.errors import UserError, WriteError
from breastcli.files import replacing
from breastcli.models import Classifier, ModelOptions
from breastcli.system.runtime import autocast

logger = logging.getLogger(__name__)

HEAD_OPTIONS = ("num_classes", "dropout", "head", "last_layer", "scale")  # what an embedding does not depend on


def views_of(augment: Augmentation) -> tuple[int, ...] | None:
    """Return the positions (elements of ``dihedral``) that a policy shows an image in, or None where it does more."""
    if augment.copies:
        return augment.copies
    moves = augment.flip or augment.flip_vertical or augment.rotation_deg or augment.shift or augment.shear_deg
    if moves or augment.min_crop < 1 or augment.max_zoom > 1 or augment.stain:
        return None
    return tuple(range(8)) if augment.turn else (0,)


def embed_rows(
    model: Classifier,
    options: ModelOptions,
    data: PreparedData,
    rows: np.ndarray,
    views: tuple[int, ...],
    dtype: torch.dtype,
    batch_size: int = 32,
    workers: int | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Return the embeddings of images in each of several positions, from the cache where it has them.

    The cache is ``store.embeddings_file`` in the prepared folder of each image: float32 (N, D), NaN where nothing was
    computed yet. Its key covers the images, every weight before the head, and the arithmetic. Every batch is filled up
    to the same size, so that an embedding does not depend, not even in its last bit, on which others had to be computed
    with it. A folder that cannot be written is no failure: the embeddings are then computed again next time.

    Args:
        model: network whose part before the head does not change; it is put into evaluation mode.
        options: what it was built from.
        data: prepared folder.
        rows: (n,) row numbers.
        views: elements of ``dihedral``.
        dtype: arithmetic of the network.
        batch_size: images through the network at once.
        workers: threads that gather batches.
        on_batch: called with the number of images of every batch, also of those that the cache had.

    Returns:
        (V, n, D) float32 on the CPU.
    """
    model.eval()
    arithmetic = f"{dtype} {next(model.parameters()).device.type} {batch_size}"
    parts, tables = data.parts(rows), []
    for part, own_rows, _ in parts:
        settings = (dtype, batch_size, workers, on_batch, _key(model, options, part, arithmetic))
        tables.append(torch.stack([_embed_view(model, part, own_rows, view, *settings) for view in views]))
    if len(parts) == 1:
        return tables[0]
    joined = torch.empty(len(views), len(rows), tables[0].shape[2])
    for (_, _, places), table in zip(parts, tables, strict=True):
        joined[:, torch.from_numpy(places)] = table
    return joined


@torch.inference_mode()
def _embed_view(
    model: Classifier,
    data: PreparedData,
    rows: np.ndarray,
    view: int,
    dtype: torch.dtype,
    batch_size: int,
    workers: int | None,
    on_batch: Callable[[int], None],
    key: str,
) -> Tensor:
    file = embeddings_file(data.folder, key, view)
    table = _read(file, len(data.rows))
    known = np.zeros(len(data.rows), dtype=bool) if table is None else ~np.isnan(table).any(axis=1)
    missing = rows[~known[rows]]
    on_batch(len(rows) - len(missing))
    if len(missing):
        device = next(model.parameters()).device
        padded = np.concatenate([missing, np.repeat(missing[-1:], -len(missing) % batch_size)])
        parts = []
        for batch in load_batches(data, list(padded.reshape(-1, batch_size)), device, workers):
            with autocast(device, dtype):
                images = to_network(dihedral(batch.images, view))
                parts.append(model.embed(model.features(images)).float().cpu())
            on_batch(min(batch_size, len(missing) - batch_size * (len(parts) - 1)))
        found = torch.cat(parts).numpy()[: len(missing)]
        if table is None:
            table = np.full((len(data.rows), found.shape[1]), np.nan, dtype=np.float32)
        table[missing] = found
        _write(file, table)
    assert table is not None
    return torch.from_numpy(table[rows])


def _key(model: Classifier, options: ModelOptions, data: PreparedData, arithmetic: str) -> str:
    """Return a name for everything that an embedding depends on."""
    built = dataclasses.asdict(options)
    for name in HEAD_OPTIONS:
        del built[name]
    digest = hashlib.sha256(f"{data.card['fingerprint']} {arithmetic} {built}".encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _read(file: Path, num_rows: int) -> np.ndarray | None:
    """Return a cached table, or None where there is none that can be used."""
    try:
        table = open_array(file)
    except UserError:
        return None
    return np.array(table) if table.ndim == 2 and len(table) == num_rows and table.dtype == np.float32 else None


def _write(file: Path, table: np.ndarray) -> None:
    if file.parent.is_symlink():  # what it leads to may be somebody's
        logger.warning("embeddings are not kept: %s is a link", file.parent)
        return
    try:
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, table, allow_pickle=False)
    except WriteError as error:
        logger.warning("embeddings are not kept: %s", error)
