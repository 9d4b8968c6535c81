"""The finished generator on disk, and the images that it draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from breastcli.data.store import CARD_SHAPE
from breastcli.errors import UserError, first_line
from breastcli.gan.conditions import Condition
from breastcli.gan.networks import SIZES_PX, GanOptions, Generator
from breastcli.gan.training import to_pixels
from breastcli.shapes import check_shape
from breastcli.system.checkpoint import read_header, write_weights
from breastcli.system.runtime import mix_seed

NOISES_FOR_MEAN = 4096
GENERATOR_SHAPE = {
    "generator": {"size_px": int, "num_conditions": int, "width?": int, "noise_dim?": int},
    "conditions": [
        {"name": str, "label": str, "subtype": str, "magnification": (str, None), "num_images": int},
    ],
    **dict.fromkeys(("data", "mag"), str),
    "dataset": CARD_SHAPE,
    "fold": (int, None),
    "classes": [str],
    "class_counts": dict,
    "turn": bool,
    "smoke": bool,
    "collapse": (str, None),
    "kimg": float,
}


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator that can draw.

    Attributes:
        network: on its device, in evaluation mode.
        conditions: what an image can be asked for by.
        facts: what the checkpoint knows about itself: kimg, data set, folder of the data, class counts.
    """

    network: Generator
    conditions: list[Condition]
    facts: dict[str, Any]

    @torch.inference_mode()
    def draw(
        self,
        numbers: Mapping[int, int],
        *,
        seed: int,
        truncation: float = 1.0,
        batch_size: int = 32,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> dict[int, Tensor]:
        """Draw images of conditions, always in float32.

        The images of a condition depend on the seed and the condition alone, neither on the batch size nor on what else
        is drawn; more of them begin with the same ones.

        Args:
            numbers: condition to how many.
            seed: of the noise.
            truncation: psi; layouts and styles are pulled to psi times their distance from the condition's mean.
            batch_size: images at once.
            on_batch: called with the size of every finished batch.

        Returns:
            condition to uint8 (n, 3, H, W) on the CPU.

        Source of truncation: Karras et al., A Style-Based Generator Architecture, CVPR 2019, appendix B.
        """
        device = next(self.network.parameters()).device
        inners = (self.network.layout, self.network.style)
        drawn = {}
        for number, count in numbers.items():
            source = torch.Generator().manual_seed(mix_seed(seed, number))
            noise = torch.randn((count, self.network.options.noise_dim), generator=source).to(device)
            centres = [self._mean(inner, number) for inner in inners] if truncation != 1 else []
            parts = []
            for part in noise.split(batch_size):
                places = [inner(part, torch.full((len(part),), number, device=device)) for inner in inners]
                if centres:
                    places = [mean + truncation * (one - mean) for one, mean in zip(places, centres, strict=True)]
                parts.append(to_pixels(self.network.draw(*places)).cpu())
                on_batch(len(part))
            drawn[number] = torch.cat(parts)
        return drawn

    def _mean(self, inner: Callable[[Tensor, Tensor], Tensor], number: int) -> Tensor:
        """Return the mean of layout or style over many noises."""
        device = next(self.network.parameters()).device
        source = torch.Generator().manual_seed(mix_seed(0, number))
        noise = torch.randn((NOISES_FOR_MEAN, self.network.options.noise_dim), generator=source).to(device)
        return inner(noise, torch.full((len(noise),), number, device=device)).mean(dim=0, keepdim=True)


def save_generator(path: Path, network: Generator, conditions: list[Condition], facts: Mapping[str, Any]) -> None:
    """Write a generator as safetensors, with its facts in the header and as JSON beside it."""
    known = {
        "generator": dataclasses.asdict(network.options),
        "conditions": [dataclasses.asdict(condition) for condition in conditions],
        **facts,
    }
    write_weights(path, network, known)


def load_generator(path: Path, device: torch.device) -> TrainedGenerator:
    """Read what ``save_generator`` wrote.

    Raises:
        UserError: the file is missing, damaged, or holds no generator of ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such generator", fix="finish or --resume `synthesize fit` first")
    facts = read_header(path)
    check_shape(facts, GENERATOR_SHAPE, f"the header of {path}", "fit again")
    try:
        options = GanOptions(**facts["generator"])
        if options.size_px not in SIZES_PX or len(facts["conditions"]) != options.num_conditions:
            raise ValueError(f"{options.num_conditions} conditions of {options.size_px} pixels")
        network = Generator(options)
        conditions = [Condition(**condition) for condition in facts["conditions"]]
        network.load_state_dict(load_file(path))
    except Exception as error:  # what the header describes can be anything
        raise UserError(f"{path} is damaged ({first_line(error, 160)})", fix="fit again") from error
    return TrainedGenerator(network.to(device).eval(), conditions, facts)
