"""Every registered architecture through every explanation method once."""

from __future__ import annotations

import pytest
import torch

from breastcli.cams import CAMS, CamOptions, saliency_maps
from breastcli.models import ARCHITECTURES, ModelOptions, build_model

SIZES = {"dinov2_vitb14": 28, "vit": 32}  # two patches a side


@pytest.mark.parametrize("arch", ARCHITECTURES.names())
def test_every_architecture_through_every_method(arch: str) -> None:
    torch.manual_seed(0)
    size_px = SIZES.get(arch, 64)
    model = build_model(ModelOptions(arch, 2, size_px)).eval().requires_grad_(False)
    images = torch.randint(0, 256, (2, 3, size_px, size_px), dtype=torch.uint8)
    options = CamOptions(samples=2, top_k=2)
    differing = 0
    for method in CAMS.names():
        maps = saliency_maps(model, images, torch.tensor([0, 1]), method, options)
        assert maps.shape == (2, size_px, size_px)
        assert maps.isfinite().all()
        assert maps.min() >= 0
        assert maps.max() <= 1
        differing += int(maps.max() > maps.min())
    assert differing >= 2  # every channel may deny a random network's class, but not in every method
