"""Weights files that others published: how to get them."""

from __future__ import annotations

from urllib.error import URLError

import torch
from torch import Tensor

from breastcli.errors import UserError, first_line


def download(url: str, *, check_hash: bool = True) -> dict[str, Tensor]:
    """Return the state dict at ``url``, downloaded once into PyTorch's cache, without running code from it.

    Args:
        url: of the file.
        check_hash: whether the file's name ends with the start of its SHA-256, which must then agree.

    Raises:
        UserError: it cannot be downloaded; the message says what to do offline.
    """
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=check_hash, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash than the one in its name
        file = url.rsplit("/", 1)[-1]
        raise UserError(
            f"--pretrained: cannot download {url} ({first_line(error, 120)})",
            fix=f"download it elsewhere and pass --weights {file} instead",
        ) from error
