"""Pathology foundation models of the Hugging Face hub behind the contract: ``hf-hub:<owner>/<name>``."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from timm.layers import SwiGLUPacked, get_act_layer
from timm.models import load_model_config_from_hf, load_state_dict_from_hf

from breastcli.errors import UsageError, UserError, first_line
from breastcli.models import IMAGENET_SCALING, Classifier, ModelOptions
from breastcli.models.backbones import from_timm

logger = logging.getLogger(__name__)

PREFIX = "hf-hub:"
BIOPTIMUS_SCALING = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
MLP_LAYERS = {"SwiGLUPacked": SwiGLUPacked}
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
NON_COMMERCIAL = "CC-BY-NC-ND-4.0, gated"
REASONS = (  # subclasses before their parents
    (GatedRepoError, "access has not been granted"),
    (RepositoryNotFoundError, "no such repository, or access has not been granted"),
    (LocalEntryNotFoundError, "the hub cannot be reached"),
    (EntryNotFoundError, "it has no such file"),
)


@dataclass(frozen=True)
class Encoder:
    """A published encoder.

    Attributes:
        source: who described it.
        licence: of its weights; "gated" ones are given after registration.
        architecture: what timm calls it.
        arguments: for timm, as plain values (see ``decode``).
        pooling: "token", or "token+mean" for the class token followed by the mean of the patches.
        scaling: mean and standard deviation of the images that it was trained on.
        millions: of parameters, as LazySlide's model cards print them.
    """

    source: str
    licence: str
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pooling: str = "token"
    scaling: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET_SCALING
    millions: float = 0.0


# Checked against public code that loads these very files with strict=True (UNI, UNI2-h, Virchow, Virchow2, GigaPath),
# against published configurations (H-optimus-0, Phikon) and, all of them, against published parameter counts. Never
# checked against the weights themselves, most of which need a registration. The transformers library's format (Phikon,
# Phikon-v2) was checked against that library with random weights. H-optimus-1 and H0-mini rest on the code of others.
# kaiko-ai/midnight is left out: its positions are published for 518 pixels and interpolated otherwise than timm does.
KNOWN = {
    "MahmoodLab/UNI": Encoder(
        "Chen et al., Nature Medicine 2024",
        NON_COMMERCIAL,
        "vit_large_patch16_224",
        {"init_values": 1e-5, "dynamic_img_size": True},
        millions=303.4,
    ),
    "MahmoodLab/UNI2-h": Encoder(
        "Chen et al., Nature Medicine 2024; weights of 2025",
        NON_COMMERCIAL,
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **SWIGLU,
        },
        millions=681.4,
    ),
    "paige-ai/Virchow": Encoder(
        "Vorontsov et al., Nature Medicine 2024",
        "Apache-2.0, gated",
        "vit_huge_patch14_224",
        {"init_values": 1e-5, "mlp_ratio": 5.3375, "dynamic_img_size": True, **SWIGLU},
        "token+mean",
        millions=631.2,
    ),
    "paige-ai/Virchow2": Encoder(
        "Zimmermann et al., arXiv 2408.00738, 2024",
        NON_COMMERCIAL,
        "vit_huge_patch14_224",
        {"init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, "dynamic_img_size": True, **SWIGLU},
        "token+mean",
        millions=631.2,
    ),
    "bioptimus/H-optimus-0": Encoder(
        "Saillard et al., Bioptimus 2024",
        "Apache-2.0, gated",
        "vit_giant_patch14_reg4_dinov2",
        {"init_values": 1e-5},
        scaling=BIOPTIMUS_SCALING,
        millions=1130,
    ),
    "bioptimus/H-optimus-1": Encoder(
        "Bioptimus 2025",
        NON_COMMERCIAL,
        "vit_giant_patch14_reg4_dinov2",
        {"init_values": 1e-5},
        scaling=BIOPTIMUS_SCALING,
        millions=1130,
    ),
    "bioptimus/H0-mini": Encoder(
        "Filiot et al., arXiv 2501.16239, 2025",
        NON_COMMERCIAL,
        "vit_base_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, "dynamic_img_size": True, **SWIGLU},
        "token+mean",
        BIOPTIMUS_SCALING,
        millions=85.7,
    ),
    "prov-gigapath/prov-gigapath": Encoder(
        "Xu et al., Nature 2024 (the tile encoder)",
        "Apache-2.0 with conditions, gated",
        "vit_giant_patch14_dinov2",
        {"patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334},
        millions=1130,
    ),
    "owkin/phikon": Encoder(
        "Filiot et al., medRxiv 2023.07.21.23292757, 2023",
        "Owkin non-commercial",
        "vit_base_patch16_224",
        millions=85.8,
    ),
    "owkin/phikon-v2": Encoder(
        "Filiot et al., arXiv 2409.09173, 2024",
        "Owkin non-commercial",
        "vit_large_patch16_224",
        {"init_values": 1.0},
        millions=303.4,
    ),
}


def complete(options: ModelOptions) -> ModelOptions:
    """Return options that say how to build an ``hf-hub:`` network, so that no later step needs the hub.

    Well-known encoders are taken from our own table, others from their repository. Options of other networks, and
    options that are complete, are returned as they are.

    Raises:
        UsageError: the name is no ``<owner>/<name>``.
        UserError: the repository cannot be read or is none of timm's.
    """
    if not options.arch.startswith(PREFIX) or options.settings:
        return options
    name = options.arch.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        example = next(iter(KNOWN))
        raise UsageError(f"{options.arch} names no repository", fix=f"use {PREFIX}<owner>/<name>, e.g. {example}")
    plain = name.partition("@")[0].lower()
    found = next((row for known, row in KNOWN.items() if known.lower() == plain), None)
    if found is None:
        return replace(options, settings=_described_by_hub(name))
    logger.info("%s: %s; licence: %s", name, found.source, found.licence)
    mean, std = found.scaling
    settings = {
        "architecture": found.architecture,
        "arguments": dict(found.arguments),
        "pooling": found.pooling,
        "mean": list(mean),
        "std": list(std),
    }
    return replace(options, settings=settings)


def from_hub(name: str, options: ModelOptions, pretrained: bool) -> Classifier:
    """Build ``hf-hub:<owner>/<name>``.

    Raises:
        UsageError: the name is no ``<owner>/<name>``.
        UserError: the repository cannot be read, timm cannot build it, its weights do not fit, or the size is no
            multiple of the patch.
    """
    settings = complete(options).settings
    architecture = settings["architecture"]
    arguments = decode(settings["arguments"])
    try:
        with_mean = settings["pooling"] == "token+mean"
        model = from_timm(architecture, replace(options, settings=arguments), pretrained=False, with_mean=with_mean)
    except TypeError as error:  # an argument that this timm does not know
        raise UserError(
            f"{PREFIX}{name}: timm {timm.__version__} cannot build {architecture} ({first_line(error, 120)})",
            fix="use another version of timm",
        ) from error
    if "mean" in settings:
        model.native_scaling = (tuple(settings["mean"]), tuple(settings["std"]))
    if pretrained:
        _load_published(model, name)
    return model


def decode(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments for timm, with layers in place of their names.

    Raises:
        UserError: a layer is unknown.
    """
    decoded = dict(arguments)
    for key, look_up in (("mlp_layer", MLP_LAYERS.__getitem__), ("act_layer", get_act_layer)):
        if key in decoded:
            try:
                decoded[key] = look_up(decoded[key])
            except KeyError as error:
                raise UserError(
                    f"{key} {decoded[key]!r} is not known", fix="use another version of breastcli"
                ) from error
    return decoded


def _described_by_hub(name: str) -> dict[str, Any]:
    """Return settings from a repository's ``config.json``."""
    try:
        _quieten_hub()
        described, architecture, arguments = load_model_config_from_hf(name)
    except KeyError as error:
        raise UserError(
            f"hf.co/{name} holds no timm network (its config.json names no architecture)",
            fix="use a repository that is tagged timm",
        ) from error
    except Exception as error:
        raise UserError(f"hf.co/{name} cannot be read ({_reason(error)})", fix=_way_in(name)) from error
    if not timm.is_model(architecture):
        raise UserError(
            f"hf.co/{name}: timm {timm.__version__} has no network {architecture!r}", fix="use another version of timm"
        )
    # Ours are the head and the image size, and without a pooling the network would return all its tokens.
    unset = {"num_classes", *(key for key in ("global_pool", "dynamic_img_size") if not arguments.get(key))}
    settings = {
        "architecture": architecture,
        "arguments": {key: value for key, value in arguments.items() if key not in unset},
        "pooling": "own",
    }
    if described.get("mean") and described.get("std"):
        settings |= {"mean": list(described["mean"]), "std": list(described["std"])}
    return settings


def _load_published(model: Classifier, name: str) -> None:
    """Download the weights of a repository into the trunk, without running code from them."""
    try:
        _quieten_hub()
        tensors = load_state_dict_from_hf(name, weights_only=True)
    except Exception as error:
        raise UserError(
            f"--pretrained: cannot download the weights of hf.co/{name} ({_reason(error)})",
            fix=f"{_way_in(name)}; or download them elsewhere and pass --weights FILE instead",
        ) from error
    given = model.from_published(tensors)
    own = model.trunk.state_dict()
    lacking = [one for one, tensor in own.items() if one not in given or given[one].shape != tensor.shape]
    if lacking:
        raise UserError(
            f"--pretrained: the weights of hf.co/{name} lack {len(lacking)} of {len(own)} tensors, first {lacking[0]}",
            fix="pass --weights FILE to load what fits",
        )
    model.trunk.load_state_dict({one: given[one] for one in own})


def _quieten_hub() -> None:
    """Silence what the libraries log of every attempt; the error says it once."""
    for noisy in ("timm", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _reason(error: Exception) -> str:
    return next((reason for kind, reason in REASONS if isinstance(error, kind)), first_line(error, 120))


def _way_in(name: str) -> str:
    return f"check name and network; if it is gated, ask for access on its page and run `hf auth login` (hf.co/{name})"
