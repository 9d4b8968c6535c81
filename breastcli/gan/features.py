"""What images are compared by: features of a trained run, or of Inception-v3."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breastcli.data.augment import dihedral
from breastcli.data.loading import to_network
from breastcli.errors import LeakError, UserError, first_line
from breastcli.gan.training import resize
from breastcli.system.checkpoint import load_checkpoint, load_plain
from breastcli.system.runfolder import Run, find_run
from breastcli.system.transfer import saw_synthetic

logger = logging.getLogger(__name__)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name for the weights of the usual FID


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns images into features.

    Attributes:
        name: run folder or "inception".
        kind: "run" or "inception".
        size_px: side that images are resized to, or None where the network does that itself.
        classes: class names of a run, in the order of its scores; empty for Inception.
        note: what to know about it, or "".
        apply: uint8 images (B, 3, S, S) on the device to features (B, D) and class scores (B, K) or None.
        device: where it is.
    """

    name: str
    kind: str
    size_px: int | None
    classes: tuple[str, ...]
    note: str
    apply: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    device: torch.device

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, batch_size: int, on_batch: Callable[[int], None] = lambda count: None, element: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return features (n, D) float64 and the predicted class (n,), None without classes.

        Args:
            images: (n, 3, H, W) uint8 on the CPU.
            batch_size: images at once.
            on_batch: called with the size of every finished batch.
            element: position of a square (see ``dihedral``) to put every image in before.
        """
        features, predicted = [], []
        for part in images.split(batch_size):
            turned = dihedral(part, element)
            found, scores = self.apply(
                (turned if self.size_px is None else resize(turned, self.size_px)).to(self.device)
            )
            features.append(found.float().cpu())
            if scores is not None:
                predicted.append(scores.argmax(dim=1).cpu())
            on_batch(len(part))
        table = torch.cat(features).double().numpy()
        return table, torch.cat(predicted).numpy() if predicted else None


def load_features(name: str, source: Mapping[str, Any], fold: int | None, device: torch.device) -> FeatureNetwork:
    """Load the network that ``--features`` names; it computes in float32.

    Args:
        name: a run folder, "latest" or "inception".
        source: card of the data set that the generator learned from.
        fold: its fold.
        device: where to compute.

    Raises:
        UserError: there is no such run, or Inception's weights are not at hand.
        LeakError: the run was trained on another split or fold of the same data set, so on images that are held out.
    """
    if name == "inception":
        return _load_inception(device)
    run = find_run(name)
    _refuse_leak(run, source, fold)
    model, facts = load_checkpoint(run.best, device)

    def apply(images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = model.embed(model.features(to_network(images)))
        return embedding, model.head(embedding)

    note = "they were learned on the same training images, which moves training and held-out images apart"
    if saw_synthetic(facts):
        note = "the features were learned on synthetic images too, perhaps on these: nothing follows from the figures"
        logger.warning("--features %s: %s", run.folder, note)
    size_px, classes = facts["model"]["size_px"], tuple(facts["classes"])
    return FeatureNetwork(str(run.folder), "run", size_px, classes, note, apply, device)


def _refuse_leak(run: Run, source: Mapping[str, Any], fold: int | None) -> None:
    own = {**run.info["dataset"], "fold": run.config.fold}
    for known in [*run.info.get("ancestors", []), own]:
        other = known["split_fingerprint"] != source["split_fingerprint"] or known["fold"] != fold
        if known["name"] == source["name"] and other:
            raise LeakError(
                f"--features {run.folder}: was trained on another split or fold of {source['name']}, so on images that "
                "are held out here",
                fix="train a run on this split and fold",
            )


def _load_inception(device: torch.device) -> FeatureNetwork:
    """Load Inception-v3 with the weights of the original FID, through torch-fidelity."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        fix = "pip install torch-fidelity, or give a trained run"
        raise UserError("--features inception: torch-fidelity is not installed", fix) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not file.is_file():
        fix = "put the file of torch-fidelity's first release there, or give a trained run"
        raise UserError(f"--features inception: its weights are not at hand as {file}", fix)
    try:
        load_plain(file, torch.device("cpu"))  # torch-fidelity would run code that is in it
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(f"{file} is damaged ({first_line(error, 160)})", fix="get it again") from error
    network = network.to(device).eval()
    return FeatureNetwork("inception", "inception", None, (), "", lambda images: (network(images)[0], None), device)
