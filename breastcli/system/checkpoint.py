"""Checkpoints that cannot run code: safetensors for weights, plain values for the rest."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from breastcli.errors import UserError, first_line
from breastcli.files import parse_json, replacing, write_json
from breastcli.models import Classifier, ModelOptions, build_model
from breastcli.models.foundation import PREFIX
from breastcli.shapes import check_shape

METADATA_KEY = "breastcli"
FACTS_SHAPE = {
    "classes": [str],
    "epoch": (int, float),
    "stain": (dict, None),
    "leaky?": (str, None),
    "fold?": (int, None),
    "synthetic?": (dict, None),
    "ancestors?": [{"name": str, "split_fingerprint": str, "fold": (int, None)}],
    "dataset": {"name": str, "split_fingerprint": str},
    "model": {"arch": str, "num_classes": int, "size_px": int, "settings?": dict},
}
RESUME_SHAPE = {
    "history": [dict],
    "timing": [(list, tuple)],
    **dict.fromkeys(("model", "optimizer", "scaler", "options"), dict),
    "split_fingerprint": str,
    "synthetic?": (dict, None),
    "ancestors": [dict],
    "cached": bool,
}
MAX_SIZE_PX, MAX_CLASSES = 4096, 10_000  # more than any network of ours has, and little enough to be built
WRAPPERS = ("module.", "model.", "_orig_mod.", "backbone.", "encoder.")
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state")


@dataclass(frozen=True)
class WeightsReport:
    """What ``--weights`` matched.

    Attributes:
        file: the file's name.
        num_loaded: tensors taken over.
        num_total: tensors that the network has.
        missing: the network's tensors that the file lacks or has in another shape.
        unused: the file's tensors that the network has no place for.
        num_fitting: tensors of the trunk that were taken over.
        num_trunk: tensors that the trunk has.
    """

    file: str
    num_loaded: int
    num_total: int
    missing: list[str]
    unused: list[str]
    num_fitting: int
    num_trunk: int

    def __str__(self) -> str:
        text = f"{self.file}: {self.num_loaded} of {self.num_total} tensors loaded"
        if self.missing:
            text += f"; starting afresh: {_shortened(self.missing)}"
        if self.unused:
            text += f"; not used: {_shortened(self.unused)}"
        return text


def save_checkpoint(path: Path, model: Classifier, options: ModelOptions, facts: dict[str, Any]) -> None:
    """Write ``path`` (safetensors) and the same facts as JSON beside it.

    The facts are also in the safetensors header, so weights and facts can never belong to two different epochs.

    Args:
        path: ends in ``.safetensors``.
        model: network to save.
        options: what it was built from.
        facts: plain values: classes, epoch, scores, data set.
    """
    write_weights(path, model, {"model": dataclasses.asdict(options), **facts})


def write_weights(path: Path, network: nn.Module, known: dict[str, Any]) -> None:
    """Write a network's tensors as safetensors with what is known of them in the header, and as JSON beside it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(path, durable=True) as temporary:
        # Written by ourselves, because safetensors' own writer ignores the user's umask.
        temporary.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(known)}))
    write_json(path.with_suffix(".json"), known)


def require_checkpoint(path: Path) -> None:
    """Refuse a run that has no weights yet.

    Raises:
        UserError: the file is missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint", fix="finish or --resume the training first")


def load_checkpoint(path: Path, device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    """Build the network of a checkpoint and load its weights.

    Raises:
        UserError: the file is missing, damaged or was not written by breastcli.
    """
    require_checkpoint(path)
    try:
        with safe_open(path, framework="pt") as file:  # once, because a training may replace it at any time
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        facts = None if metadata is None else parse_json(metadata)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error, 160)})", fix="train again") from error
    if facts is None:
        raise UserError(f"{path} was not written by breastcli", fix="use it with train --weights instead")
    _check_facts(facts, path)
    try:
        model = build_model(described_options(facts["model"]))
        model.load_state_dict(tensors)
    except Exception as error:  # what the header describes can be anything
        raise UserError(f"{path} is damaged ({first_line(error, 160)})", fix="train again") from error
    model = model.to(device=device, memory_format=torch.channels_last)
    return model.eval(), facts


def described_options(values: dict[str, Any]) -> ModelOptions:
    """Return the options that a checkpoint tells of, refusing what cannot be built, or not without asking the hub.

    Raises:
        ValueError: they cannot be.
        TypeError: there is an option that nobody knows.
    """
    options = ModelOptions(**values)
    if options.arch.startswith(PREFIX) and not options.settings:
        raise ValueError(f"{options.arch} is not described")
    if not (0 < options.num_classes <= MAX_CLASSES and 0 < options.size_px <= MAX_SIZE_PX):
        raise ValueError(f"{options.num_classes} classes of {options.size_px} pixels")
    return options


def read_facts(path: Path) -> dict[str, Any] | None:
    """Return what a checkpoint of ours knows about itself, or None for a weights file of somebody else.

    Raises:
        UserError: it is damaged.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None  # whoever loads it says what is wrong
    facts = read_header(path)
    if facts is not None:
        _check_facts(facts, path)
    return facts


def _check_facts(facts: Any, path: Path) -> None:
    check_shape(facts, FACTS_SHAPE, f"the header of {path}", "train again")
    if facts["model"]["num_classes"] != len(facts["classes"]):
        raise UserError(f"the header of {path} lists {len(facts['classes'])} classes", fix="train again")


def read_header(path: Path) -> Any:
    """Return what a safetensors file of ours keeps in its header, None for a file of somebody else.

    Raises:
        UserError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
        return None if metadata is None else parse_json(metadata)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error, 160)})", fix="make it again") from error


def load_initial_weights(model: Classifier, path: Path, *, head: bool = True, flag: str = "--weights") -> WeightsReport:
    """Load weights from safetensors or a state dict, as far as names and shapes agree.

    The file may hold one of our checkpoints, or the library's own network (its tensors go into the trunk). A head of
    another number of classes is left as it is.

    Args:
        model: network to load into.
        path: the file.
        head: whether to load the head too, where it fits.
        flag: the option that named the file, for messages.

    Raises:
        UserError: the file is missing, is no weights file, could run code, or fits nowhere.
    """
    raw = _read_tensors(path, flag)
    # Names as they are go before names without what a framework may have put before them.
    exact = model.from_published(dict(raw))
    given = model.from_published({_unwrapped(name): tensor for name, tensor in raw.items()})
    own = model.state_dict()
    chosen: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in own.items():
        if name.startswith("head.") and not head:
            continue
        for source in (name, name.removeprefix("trunk.")):
            found = next((one[source] for one in (exact, given) if source in one), None)
            if found is not None and found.shape == tensor.shape:
                chosen[name] = found
                used |= {source, _unwrapped(source)}
                break
    floating = [name for name in chosen if own[name].is_floating_point() and name.startswith("trunk.")]
    if not floating:
        raise UserError(f"{flag} {path}: nothing in it fits this network", fix="check --arch")
    model.load_state_dict(chosen, strict=False)
    trunk = [name for name in own if own[name].is_floating_point() and name.startswith("trunk.")]
    return WeightsReport(
        path.name,
        len(chosen),
        len(own),
        sorted(set(own) - set(chosen)),
        sorted(set(given) - used),
        num_fitting=len(floating),
        num_trunk=len(trunk),
    )


def save_resume(path: Path, values: dict[str, Any]) -> None:
    """Write everything that a resumed run needs: tensors and plain values only.

    Raises:
        WriteError: it cannot be written.
    """
    with replacing(path, durable=True) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(values, file)
        except RuntimeError as error:  # torch hides what the system said behind what it makes of it
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_resume(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what ``save_resume`` wrote, refusing anything that could run code.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return load_plain(path, device)
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise damaged_resume(path, error) from error


def damaged_resume(path: Path, error: Exception) -> UserError:
    """Return what to say of a file of ``save_resume`` that cannot be used."""
    return UserError(f"{path} is damaged ({first_line(error, 160)})", fix="start again with --overwrite")


def _read_tensors(path: Path, flag: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = load_plain(path, torch.device("cpu"))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{flag} {path}: not a plain state dict; loading it could run code", fix="save it as safetensors"
        ) from error
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise UserError(f"{flag} {path}: not a weights file ({first_line(error, 160)})") from error
    if isinstance(content, dict):
        if "split_fingerprint" in content:
            raise UserError(f"{flag} {path}: is for --resume", fix=f"give {path.with_name('best.safetensors')} instead")
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
        tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise UserError(f"{flag} {path}: holds no tensors", fix="give a state dict or safetensors file")


def load_plain(path: Path, device: torch.device) -> Any:
    """Read a torch file of tensors and plain values only, none compressed: a little could become much."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise ValueError("its parts are compressed, as PyTorch never writes them")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols of files that are refused anyway
        return torch.load(path, map_location=device, weights_only=True)


def _unwrapped(name: str) -> str:
    """Strip what training frameworks put before every name."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPERS:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
