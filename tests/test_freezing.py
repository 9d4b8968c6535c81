from __future__ import annotations

import pytest
import torch
from torch import nn

from breastcli.errors import UserError
from breastcli.models import Classifier, ModelOptions, build_model, num_parameters
from breastcli.models.freezing import freeze, set_training_mode, unfreeze


def tiny() -> Classifier:
    return build_model(ModelOptions("timm/test_resnet", 2, 64))


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters() if not one.requires_grad}


def test_freeze_none_trunk_and_number() -> None:
    model = tiny()
    assert freeze(model, "none") == 0
    assert freeze(model, "trunk") == num_parameters(model.trunk)
    assert num_parameters(model, trainable=True) == num_parameters(model.head)
    unfreeze(model)
    assert not frozen_names(model)
    layers = [module for module in model.modules() if list(module.parameters(recurse=False))]
    freeze(model, "3")
    frozen = [all(not one.requires_grad for one in layer.parameters(recurse=False)) for layer in layers]
    assert frozen == [True] * 3 + [False] * (len(layers) - 3)


def test_freeze_stages() -> None:
    model = tiny()
    assert freeze(model, "layer1, layer3") == num_parameters(model.trunk.layer1) + num_parameters(model.trunk.layer3)
    assert {name.split(".")[1] for name in frozen_names(model)} == {"layer1", "layer3"}
    model = tiny()
    freeze(model, "layer2:2")  # a convolution and its batch norm
    assert frozen_names(model) == {f"trunk.layer2.0.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias")}
    model = tiny()
    freeze(model, "layer2.0.conv1")
    assert frozen_names(model) == {"trunk.layer2.0.conv1.weight"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("1000", "there are .* layers with weights"),
        ("layer1:999", "--freeze layer1:999: no such number"),
        ("layer1:x", "no such number"),
        ("-1", "no such stage"),
        ("layr1", "did you mean layer1"),
        ("zzzzzz", "none, trunk, a number or stages of the trunk .*layer1, layer2"),
        ("trunk,zzzzzz", "--freeze zzzzzz"),
        ("layer1,", "--freeze : no such stage"),
        ("²", "no such stage"),
    ],
)
def test_freeze_refuses(what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        freeze(tiny(), what)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = tiny()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    set_training_mode(model, batch_norm="train")
    assert all(norm.training for norm in norms)
    set_training_mode(model, batch_norm="frozen")
    assert not any(norm.training for norm in norms)
    assert model.head.training
    freeze(model, "trunk")
    set_training_mode(model, batch_norm="train")
    before = [norm.running_mean.clone() for norm in norms]
    model(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))


def test_a_frozen_trunk_drops_nothing() -> None:
    model = build_model(ModelOptions("timm/test_vit", 2, 160, settings={"drop_path_rate": 0.5, "proj_drop_rate": 0.5}))
    images = torch.randn(2, 3, 160, 160)
    set_training_mode(model, batch_norm="train")
    assert not torch.equal(model.features(images), model.features(images))
    freeze(model, "trunk")
    set_training_mode(model, batch_norm="train")
    assert torch.equal(model.features(images), model.features(images))
    assert model.head.training
    unfreeze(model)
    set_training_mode(model, batch_norm="train")
    assert not torch.equal(model.features(images), model.features(images))


def test_a_counted_layer_is_its_own_weights_only() -> None:
    """A vision transformer's trunk owns tokens and positions itself: as one layer it must not take the blocks along."""
    model = build_model(ModelOptions("timm/test_vit", 2, 160))
    freeze(model, "1")
    assert {name.split(".")[1] for name in frozen_names(model)} <= {"cls_token", "pos_embed", "reg_token"}
    assert frozen_names(model)


def test_the_trunk_is_all_that_was_published() -> None:
    model = build_model(ModelOptions("torchvision/mobilenet_v3_small", 2, 64))
    freeze(model, "trunk")
    assert {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad} == {"head"}
