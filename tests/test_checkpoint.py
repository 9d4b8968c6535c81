from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from breastcli.errors import UserError
from breastcli.models import ModelOptions, build_model
from breastcli.system.checkpoint import (
    load_checkpoint,
    load_initial_weights,
    load_resume,
    save_checkpoint,
    save_resume,
)

CPU = torch.device("cpu")
OPTIONS = ModelOptions("timm/test_resnet", 2, 64)
FACTS = {"classes": ["a", "b"], "epoch": 3, "stain": None, "dataset": {"name": "sample", "split_fingerprint": "0"}}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


def test_round_trip(tmp_path: Path) -> None:
    model = build_model(OPTIONS).eval()
    save_checkpoint(tmp_path / "best.safetensors", model, OPTIONS, FACTS)
    loaded, facts = load_checkpoint(tmp_path / "best.safetensors", CPU)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))
    assert facts["epoch"] == 3
    assert facts["model"]["arch"] == "timm/test_resnet"
    assert (tmp_path / "best.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "best.safetensors"]


def test_foreign_damaged_and_missing_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(path, CPU)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not written by breastcli"):
        load_checkpoint(path, CPU)
    save_checkpoint(path, build_model(OPTIONS), OPTIONS, FACTS)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path, CPU)


class Malicious:
    def __reduce__(self) -> tuple:
        return (print, ("ran",))


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt"])
def test_pickles_that_could_run_code_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model": Malicious()}, tmp_path / name)
    with pytest.raises(UserError, match="could run code"):
        load_initial_weights(build_model(OPTIONS), tmp_path / name)
    (tmp_path / "resume.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="damaged"):
        load_resume(tmp_path / "resume.pt", CPU)
    assert "ran" not in capsys.readouterr().out


def test_own_checkpoint_as_initial_weights(tmp_path: Path) -> None:
    model = build_model(OPTIONS)
    save_checkpoint(tmp_path / "best.safetensors", model, OPTIONS, {})
    other = build_model(OPTIONS)
    report = load_initial_weights(other, tmp_path / "best.safetensors")
    assert report.num_loaded == report.num_total
    assert report.missing == report.unused == []
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize("wrapper", ["", "module.", "model."])
def test_library_weights_fill_the_trunk_and_leave_another_head(wrapper: str, tmp_path: Path) -> None:
    network = torchvision.models.mobilenet_v2()
    tensors = {wrapper + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": tensors, "epoch": 4}, tmp_path / "w.pth")
    model = build_model(ModelOptions("torchvision/mobilenet_v2", 2, 64))
    head = model.head[1].weight.clone()
    report = load_initial_weights(model, tmp_path / "w.pth")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.eval().features(images), network.eval().features(images))
    assert torch.equal(model.head[1].weight, head)
    assert report.missing == ["head.1.bias", "head.1.weight"]
    assert report.unused == ["classifier.1.bias", "classifier.1.weight"]
    assert "starting afresh: head.1.bias" in str(report)


def test_a_head_of_as_many_classes_is_taken_over_from_a_run(tmp_path: Path) -> None:
    three = build_model(ModelOptions("timm/test_resnet", 3, 64))
    save_checkpoint(tmp_path / "w.safetensors", three, ModelOptions("timm/test_resnet", 3, 64), {})
    report = load_initial_weights(build_model(OPTIONS), tmp_path / "w.safetensors")
    assert report.missing == ["head.1.bias", "head.1.weight"]


def test_weights_that_fit_nowhere(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(3)}, tmp_path / "w.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    model = build_model(OPTIONS)
    for name, message in (
        ("w.safetensors", "nothing in it fits"),
        ("text.pth", "--weights"),
        ("list.pth", "holds no tensors"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_initial_weights(model, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_resume_file_round_trip(tmp_path: Path) -> None:
    values = {"history": [{"epoch": 1, "val_loss": 0.5}], "model": {"w": torch.arange(3.0)}}
    save_resume(tmp_path / "resume.pt", values)
    loaded = load_resume(tmp_path / "resume.pt", CPU)
    assert loaded["history"] == values["history"]
    assert torch.equal(loaded["model"]["w"], values["model"]["w"])


@pytest.mark.real
def test_real_imagenet_weights_load_strictly(real_data: Path) -> None:
    path = real_data.parent / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not path.is_file():
        pytest.skip("no real weights here")
    model = build_model(ModelOptions("torchvision/mobilenet_v2", 2, 224))
    report = load_initial_weights(model, path)
    assert report.num_loaded == report.num_total - 2
    network = torchvision.models.mobilenet_v2()
    network.load_state_dict(load_file(path))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.eval().features(images), network.eval().features(images))


def test_library_files_fill_the_layers_between_pooling_and_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(weights=None)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = build_model(ModelOptions("torchvision/mobilenet_v3_small", 2, 64))
    load_initial_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.pool[2].weight, network.classifier[0].weight)


def test_library_files_fill_a_vision_transformer(tmp_path: Path) -> None:
    network = torchvision.models.vit_b_32(weights=None, image_size=64)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = build_model(ModelOptions("torchvision/vit_b_32", 2, 64))
    report = load_initial_weights(model, tmp_path / "w.pth")
    assert report.num_fitting == report.num_trunk
    assert torch.equal(model.trunk.encoder.ln.weight, network.encoder.ln.weight)
