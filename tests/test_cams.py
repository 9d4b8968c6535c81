from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from breastcli.cams import CAMS, CamOptions, saliency_maps
from breastcli.cams import dt_grad_cam as dt_module
from breastcli.cams.dt_grad_cam import dt_grad_cam, refine, shown
from breastcli.cams.eigen_cam import eigen_cam
from breastcli.cams.grad_cam import grad_cam
from breastcli.cams.grad_cam_pp import grad_cam_pp
from breastcli.cams.layer_cam import layer_cam
from breastcli.cams.score_cam import score_cam
from breastcli.data.loading import to_network
from breastcli.errors import UsageError, UserError
from breastcli.models import Classifier, ModelOptions, build_model
from breastcli.models.splitting import split_at

METHODS = ["dtgradcam", "eigencam", "gradcam", "gradcampp", "layercam", "scorecam"]
OPTIONS = CamOptions(top_k=8, samples=3)
SIZE_PX = 64
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
REGISTERS = {**VIT, "reg_tokens": 4, "init_values": 1.0, "dynamic_img_size": True}
SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 8}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": ("timm/test_resnet", {}),
    "class token": ("timm/vit_tiny_patch16_224", VIT),
    "registers": ("timm/vit_tiny_patch16_224", REGISTERS),
    "channels last": ("timm/swin_tiny_patch4_window7_224", SWIN),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pixels(Classifier):
    """The image itself as maps, its mean as embedding, one linear layer with known weights (2, 3)."""

    def __init__(self, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk or nn.Identity()
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 0.0], [-1.0, 0.0, 4.0]]))
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def embed(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))


def draw(num: int, quadrant: int | None, seed: int) -> Tensor:
    """Noisy grey images (num, 3, 64, 64) uint8, red in one quadrant (0 to 3, row by row)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(90, 166, (num, 3, SIZE_PX, SIZE_PX), generator=generator, dtype=torch.uint8)
    if quadrant is not None:
        inside(images, quadrant)[:, 0] = 250
        inside(images, quadrant)[:, 2] = 5
    return images


def inside(images: Tensor, quadrant: int) -> Tensor:
    row, column = divmod(quadrant, 2)
    half = SIZE_PX // 2
    return images[..., row * half : (row + 1) * half, column * half : (column + 1) * half]


def build(kind: str, **settings: Any) -> Classifier:
    arch, own = NETWORKS[kind]
    torch.manual_seed(0)
    return build_model(ModelOptions(arch, 2, SIZE_PX, settings={**own, **settings})).eval()


@pytest.fixture(scope="module")
def detectors() -> dict[str, Classifier]:
    """Random networks whose last layer was fitted, by ridge regression, to tell red quadrants (class 1) from none."""
    images = torch.cat([draw(8, quadrant, seed=quadrant) for quadrant in range(4)] + [draw(32, None, seed=4)])
    answers = torch.tensor([1.0] * 32 + [-1.0] * 32)
    models = {kind: build(kind) for kind in NETWORKS}
    for model in models.values():
        with torch.no_grad():
            embedding = model.embed(model.features(to_network(images)))
            mean = embedding.mean(dim=0)
            centred = embedding - mean
            ridge = 0.01 * centred.square().sum(dim=1).mean() * torch.eye(len(mean))
            direction = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ answers)
            layer = model.head[-1]
            layer.weight.copy_(torch.stack([-direction, direction]))
            layer.bias.copy_(torch.stack([direction @ mean, -direction @ mean]))
            assert torch.equal(model(to_network(images)).argmax(dim=1), (answers > 0).long())
    return models


# --- the methods by hand and against the grad-cam package ---


def by_the_package(name: str, model: nn.Module, layer: nn.Module, images: Tensor, targets: list[int]) -> Tensor:
    """Return the grad-cam package's maps (B, h, w) as they are before it resizes them."""
    found: list[np.ndarray] = []
    with getattr(pytorch_grad_cam, name)(model, [layer]) as method:
        compute = method.get_cam_image

        def remember(*args: Any, **kwargs: Any) -> np.ndarray:
            found.append(compute(*args, **kwargs))
            return found[-1]

        method.get_cam_image = remember
        method(images.clone(), [ClassifierOutputTarget(target) for target in targets])
    return torch.from_numpy(np.float32(found[0]))


@pytest.fixture(scope="module")
def resnet() -> Classifier:
    """torchvision's ResNet-18 with random weights; logits wide enough for softmax and cubes of gradients to matter."""
    torch.manual_seed(0)
    model = build_model(ModelOptions("torchvision/resnet18", 2, SIZE_PX)).eval()
    with torch.no_grad():
        model.head[-1].weight.mul_(100)
    return model


@pytest.mark.parametrize(
    ("method", "theirs"), [("gradcam", "GradCAM"), ("gradcampp", "GradCAMPlusPlus"), ("layercam", "LayerCAM")]
)
@pytest.mark.parametrize("layer", ["layer4", "layer2"])
def test_the_package_agrees(resnet: Classifier, method: str, theirs: str, layer: str) -> None:
    images = 2 * torch.rand(2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0)) - 1
    for targets in ([0, 1], [1, 0]):
        expected = by_the_package(theirs, resnet, getattr(resnet.trunk, layer), images, targets).relu()
        assert expected.amax() > 0
        ours = CAMS.get(method).function(split_at(resnet, layer), images, torch.tensor(targets), OPTIONS)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=float(1e-4 * expected.amax()))


@pytest.mark.parametrize(("layer", "target"), [("layer2", 0), ("layer2", 1), ("layer4", 1)])
def test_the_package_agrees_on_score_cam(
    monkeypatch: pytest.MonkeyPatch, resnet: Classifier, layer: str, target: int
) -> None:
    """The package resizes the masks with aligned corners; the method's authors do not, nor do we."""
    monkeypatch.setattr(
        nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size, mode="bilinear", align_corners=False)
    )
    images = 2 * torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) - 1
    expected = by_the_package("ScoreCAM", resnet, getattr(resnet.trunk, layer), images, [target]).relu()
    ours = score_cam(split_at(resnet, layer), images, torch.tensor([target]), CamOptions())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=float(1e-4 * expected.amax()))


class Centred(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps - maps.mean(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize("num_channels", [6, 40])  # fewer and more than the 16 positions
def test_the_package_agrees_on_eigen_cam_of_centred_maps(num_channels: int) -> None:
    """Up to the sign, which the package leaves to chance."""
    torch.manual_seed(0)
    model = Pixels(nn.Sequential(nn.Conv2d(3, num_channels, 3, padding=1), Centred()))
    model.head = nn.Linear(num_channels, 2)
    images = torch.randn(3, 3, 4, 4)
    targets = torch.zeros(3, dtype=torch.long)
    expected = by_the_package("EigenCAM", model, model.trunk[1], images, [0, 0, 0])
    ours = eigen_cam(model, images, targets, OPTIONS)
    signs = (ours * expected).sum(dim=(1, 2), keepdim=True).sign()
    torch.testing.assert_close(ours, signs * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_channels", [6, 40])
@pytest.mark.parametrize("rectified", [True, False])
def test_eigen_cam_by_singular_values(num_channels: int, rectified: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, num_channels, 1), *([nn.ReLU()] if rectified else [])]
    model = Pixels(nn.Sequential(*layers))
    images = torch.randn(2, 3, 4, 4)
    ours = eigen_cam(model, images, torch.zeros(2, dtype=torch.long), OPTIONS)
    maps = model.features(images).detach().double().numpy()
    for one, found in zip(maps, ours.double().numpy(), strict=True):
        matrix = one.reshape(num_channels, 16).T
        projection = matrix @ np.linalg.svd(matrix)[2][0]
        energy = np.linalg.norm(matrix, axis=1)
        projection *= np.sign(projection @ energy)
        assert not rectified or (projection >= -1e-12).all()
        np.testing.assert_allclose(found.ravel(), projection, atol=1e-5)


# (1, 3, 2, 2), never negative, so that the formulas can be followed by hand
SMALL = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]], [[0.0, 0.5], [0.1, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]])


def test_gradients_by_hand() -> None:
    """The logits are means over four pixels, so that the gradients are a quarter of the weights."""
    model = Pixels()
    first, second = torch.tensor([0]), torch.tensor([1])
    red, green, blue = SMALL[0]
    given = SMALL.clone()
    torch.testing.assert_close(grad_cam(model, given, first, OPTIONS)[0], ((red - 2 * green) / 4).relu())
    torch.testing.assert_close(grad_cam(model, given, second, OPTIONS)[0], ((4 * blue - red) / 4).relu())
    torch.testing.assert_close(layer_cam(model, given, first, OPTIONS)[0], red / 4)
    torch.testing.assert_close(layer_cam(model, given, second, OPTIONS)[0], blue)
    # Class 0: only red rises, by 1/4 at each of four positions, each of weight 1 / (2 + 1/4 x 1.0) (red sums to 1).
    torch.testing.assert_close(grad_cam_pp(model, given, first, OPTIONS)[0], red / 2.25)
    torch.testing.assert_close(grad_cam_pp(model, given, second, OPTIONS)[0], blue * 4 / 3)
    assert torch.equal(given, SMALL)  # the features are the caller's own tensor
    assert not given.requires_grad


def test_grad_cam_pp_keeps_finite_where_maps_are_negative() -> None:
    model = Pixels()
    images = torch.full((1, 3, 2, 2), -2.0)  # red sums to -8, and 2 + 1/4 x -8 would be the denominator
    images[0, 0, 0, 0] = 1
    expected = torch.tensor([[[0.5, 0.0], [0.0, 0.0]]])  # 4 positions x 1/4 / 2, then the ReLU
    torch.testing.assert_close(grad_cam_pp(model, images, torch.tensor([0]), OPTIONS), expected)


def test_score_cam_by_hand() -> None:
    model = Pixels()
    scores = []
    for channel in SMALL[0]:
        mask = (channel - channel.min()) / (channel.max() - channel.min())
        red, green, _ = (SMALL[0] * mask).mean(dim=(1, 2))
        scores.append(red - 2 * green)
    weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
    expected = (weights[:, None, None] * SMALL[0]).sum(dim=0).relu()
    ours = score_cam(model, SMALL, torch.tensor([0]), CamOptions())
    torch.testing.assert_close(ours[0], expected)
    # Blue varies most, then green.
    torch.testing.assert_close(score_cam(model, SMALL, torch.tensor([0]), CamOptions(top_k=1))[0], SMALL[0, 2])
    two = score_cam(model, SMALL, torch.tensor([0]), CamOptions(top_k=2))[0]
    torch.testing.assert_close(two, (weights[1:, None, None] * SMALL[0, 1:]).sum(dim=0) / weights[1:].sum())
    torch.testing.assert_close(score_cam(model, SMALL, torch.tensor([0]), CamOptions(top_k=99)), ours)


def test_grad_cam_of_a_transformer_averages_over_its_patches_only(detectors: dict[str, Classifier]) -> None:
    model = detectors["registers"]
    images, targets = to_network(draw(2, 1, seed=9)), torch.tensor([1, 0])
    maps = model.features(images).detach().requires_grad_()
    assert maps.shape[2:] == (9, 8)  # class and register tokens in the ninth row
    model.classify(maps)[[0, 1], targets].sum().backward()
    weights = maps.grad[:, :, :8].mean(dim=(2, 3), keepdim=True)
    expected = (weights * maps[:, :, :8]).sum(dim=1).relu().detach()
    torch.testing.assert_close(grad_cam(model, images, targets, OPTIONS), expected)


# --- DT Grad-CAM ---


def test_dt_grad_cam_without_noise_is_grad_cam(detectors: dict[str, Classifier]) -> None:
    images, targets = to_network(draw(2, 2, seed=7)), torch.tensor([1, 1])
    for model in detectors.values():
        plain = grad_cam(model, images, targets, OPTIONS)
        for samples in (1, 3):
            silent = dt_grad_cam(model, images, targets, CamOptions(noise=0, samples=samples))
            torch.testing.assert_close(silent, plain)


def test_weights_of_the_copies_fall_from_one_to_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([4.0, 8.0, 6.0])
    monkeypatch.setattr(dt_module, "grad_cam", lambda *_: torch.full((1, 2, 2), next(values)))
    mean = dt_grad_cam(Pixels(), SMALL, torch.tensor([0]), CamOptions(samples=3, batch_size=1))
    torch.testing.assert_close(mean, torch.full((1, 2, 2), (4 + 0.75 * 8 + 0.5 * 6) / 2.25))


def test_noise_of_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the given deviation, with mean zero, another for each copy, the same for all images."""
    seen: list[Tensor] = []

    def remember(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions) -> Tensor:
        seen.append(images)
        return images[:, 0]

    monkeypatch.setattr(dt_module, "grad_cam", remember)
    images = torch.zeros(2, 3, SIZE_PX, SIZE_PX)
    images[1] = 0.5
    for seed in (0, 1):
        dt_grad_cam(Pixels(), images, torch.tensor([0, 0]), CamOptions(noise=0.2, samples=4, seed=seed, batch_size=3))
    noise = torch.cat(seen).unflatten(0, (2, 2, 4)) - images[:, None]  # seeds, images, copies
    torch.testing.assert_close(noise[:, 0], noise[:, 1])
    assert abs(float(noise.std()) - 0.2) < 0.002
    assert abs(float(noise.mean())) < 0.002
    copies = noise[:, 0].flatten(0, 1).flatten(1)
    assert (torch.corrcoef(copies) - torch.eye(8)).abs().max() < 0.05


def test_refining_removes_specks_and_fills_holes() -> None:
    mask = np.zeros((64, 64), bool)
    mask[20:44, 20:44] = True
    mask[:12, 50:] = True  # a region at the border
    spoilt = mask.copy()
    spoilt[4, 4] = spoilt[63, 0] = True
    spoilt[32, 32] = False
    # The disk rounds corners; all else comes back.
    refined = refine(spoilt)
    assert refined.dtype == bool
    assert (refined == refine(mask)).all()
    assert not refined[4, 4]
    assert not refined[63, 0]
    assert refined[32, 32]
    assert refined[:8, 54:].all()
    assert (refined != mask).sum() < 40
    assert spoilt[4, 4]  # the caller's mask is left alone
    assert not refine(np.zeros((8, 8), bool)).any()
    assert refine(np.ones((8, 8), bool)).all()


def test_the_shown_heat_map_is_the_mean_map_inside_the_mask() -> None:
    saliency = np.array([[0.2, 0.9], [0.4, 1.0]], np.float32)
    inside_mask = shown(saliency, np.array([[False, True], [True, False]]))
    assert inside_mask.dtype == np.float32
    np.testing.assert_array_equal(inside_mask, np.array([[0, 0.9], [0.4, 0]], np.float32))


def test_only_dt_grad_cam_refines() -> None:
    assert [name for name in METHODS if CAMS.get(name).refine] == ["dtgradcam"]


# --- what all methods owe their callers ---


def test_registered_methods() -> None:
    assert CAMS.names() == METHODS
    with pytest.raises(UsageError, match="unknown explanation method 'grad_cam': did you mean 'gradcam'"):
        saliency_maps(Pixels(), draw(1, None, 0), torch.tensor([0]), "grad_cam")


def shares(model: Classifier, method: str, quadrant: int) -> Tensor:
    """Return the share of saliency in each quadrant, over four images that are red in one."""
    images, targets = draw(4, quadrant, seed=7), torch.ones(4, dtype=torch.long)
    maps = saliency_maps(model, images, targets, method, OPTIONS)
    return torch.stack([inside(maps, each).sum() / maps.sum() for each in range(4)])


# LayerCAM weighs no channel as a whole and Eigen-CAM knows no class: they find it in fewer random networks.
ORIENTED = [
    *((kind, method) for kind in NETWORKS for method in ("dtgradcam", "gradcam", "gradcampp")),
    *((kind, "eigencam") for kind in ("convolutions", "class token", "registers")),
    *((kind, "layercam") for kind in ("convolutions", "channels last")),
    *((kind, "scorecam") for kind in ("convolutions", "class token", "registers")),
]


@pytest.mark.parametrize(("kind", "method"), ORIENTED)
def test_maps_lie_over_what_decides(detectors: dict[str, Classifier], kind: str, method: str) -> None:
    for quadrant in range(4):
        found = shares(detectors[kind], method, quadrant)
        assert found.argmax() == quadrant
        assert found[quadrant] > 0.5


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_maps_depend_neither_on_the_batch_nor_on_its_size(
    detectors: dict[str, Classifier], kind: str, method: str
) -> None:
    model = detectors[kind]
    images = torch.cat([draw(1, quadrant, seed=quadrant) for quadrant in (0, 3, 1)])
    targets = torch.tensor([1, 0, 1])
    together = saliency_maps(model, images, targets, method, OPTIONS)
    assert together.shape == (3, SIZE_PX, SIZE_PX)
    assert together.dtype == torch.float32
    assert together.amin() >= 0
    assert together.amax() <= 1
    assert torch.equal(saliency_maps(model, images, targets, method, OPTIONS), together)
    alone = torch.cat([saliency_maps(model, images[i : i + 1], targets[i : i + 1], method, OPTIONS) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)
    for size in (1, 2):
        in_parts = saliency_maps(model, images, targets, method, CamOptions(top_k=8, samples=3, batch_size=size))
        torch.testing.assert_close(in_parts, together, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_no_batch_exceeds_its_size(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    model = Pixels()
    sizes = []
    monkeypatch.setattr(model, "extract", lambda images: sizes.append(len(images)) or images)
    saliency_maps(model, draw(5, 0, 0), torch.zeros(5, dtype=torch.long), method, CamOptions(samples=3, batch_size=4))
    assert max(sizes) == 4


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("learns", [True, False])
def test_the_network_is_left_as_it_was(kind: str, method: str, learns: bool) -> None:
    model = build(kind).requires_grad_(learns)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    maps = saliency_maps(model, draw(2, 0, 0), torch.tensor([0, 1]), method, OPTIONS)
    assert not maps.requires_grad
    assert all(one.grad is None and one.requires_grad is learns for one in model.parameters())
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(saliency_maps(model, draw(2, 0, 0), torch.tensor([0, 1]), method, OPTIONS), maps)


def test_a_network_in_training_is_refused() -> None:
    with pytest.raises(AssertionError):
        saliency_maps(Pixels().train(), draw(1, None, 0), torch.tensor([0]), "gradcam")


class Watched(Pixels):
    """Notes in which arithmetic, and with gradients or without, its parts run."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1))
        self.seen: set[tuple[str, torch.dtype, bool]] = set()

    def extract(self, images: Tensor) -> Tensor:
        maps = super().extract(images)
        self.seen.add(("extract", maps.dtype, torch.is_grad_enabled()))
        return maps

    def embed(self, maps: Tensor) -> Tensor:
        logits = self.head(super().embed(maps))
        self.seen.add(("embed", logits.dtype, torch.is_grad_enabled()))
        return super().embed(maps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_the_reach_of_gradients(method: str, dtype: torch.dtype) -> None:
    model = Watched()
    maps = saliency_maps(model, draw(2, 0, 0), torch.tensor([0, 1]), method, OPTIONS, dtype)
    assert maps.isfinite().all()
    expected = {("extract", dtype, False)}
    if method != "eigencam":
        expected.add(("embed", torch.float32, CAMS.get(method).needs_gradient))
    assert model.seen == expected


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_gives_maps(detectors: dict[str, Classifier], kind: str, method: str) -> None:
    images, targets = draw(2, 0, 7), torch.tensor([1, 1])
    maps = saliency_maps(detectors[kind], images, targets, method, OPTIONS, torch.bfloat16)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert maps.amax() > 0.5
    if method == "gradcam":
        precise = saliency_maps(detectors[kind], images, targets, method, OPTIONS)
        assert (maps - precise).abs().mean() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_which_methods_know_the_class(detectors: dict[str, Classifier], method: str) -> None:
    images = draw(1, 0, 7)
    first, second = (
        saliency_maps(detectors["convolutions"], images, torch.tensor([target]), method, OPTIONS) for target in (0, 1)
    )
    assert torch.equal(first, second) is not CAMS.get(method).class_specific


def test_maps_are_scaled_then_resized() -> None:
    model = Pixels(nn.AvgPool2d(2))
    red = torch.tensor([[0, 100], [50, 200]], dtype=torch.uint8)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[:, 2] = 255
    images[0, 2] = red.repeat_interleave(2, 0).repeat_interleave(2, 1)
    # Class 1 is 4 x blue - red: after the ReLU 1/4 + max(2 x blue / 255 - 1, 0), here scaled by hand.
    maps = saliency_maps(model, images, torch.tensor([1, 1]), "gradcam")
    at_grid = ((4 * (red.float() * 2 / 255 - 1) + 1) / 4).relu()
    scaled = (at_grid - at_grid.min()) / (at_grid.max() - at_grid.min())
    assert maps[0, 0, 0] == scaled[0, 0]
    assert maps[0, 3, 3] == scaled[1, 1] == 1
    torch.testing.assert_close(maps[0, 3], scaled[1, 0] + torch.tensor([0, 0.25, 0.75, 1]) * (1 - scaled[1, 0]))
    assert (maps[1] == 0).all()  # a constant map


def test_oblong_images() -> None:
    images = draw(1, 0, 0)[:, :, :48]
    maps = saliency_maps(build("convolutions"), images, torch.tensor([0]), "scorecam", OPTIONS)
    assert maps.shape == (1, 48, SIZE_PX)


def test_tokens_in_a_row_are_refused() -> None:
    with pytest.raises(UserError, match="do not lie over the image"):
        saliency_maps(
            Pixels(nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (1, -1)))), draw(1, 0, 0), torch.tensor([0]), "gradcam"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_agrees(kind: str, method: str) -> None:
    images, targets = draw(3, 1, 0), torch.tensor([0, 1, 0])
    model = build(kind)
    expected = saliency_maps(model, images, targets, method, OPTIONS)
    ours = saliency_maps(model.cuda(), images.cuda(), targets.cuda(), method, OPTIONS)
    assert ours.device.type == "cpu"
    assert (ours - expected).abs().mean() < 0.01  # convolutions may run in TF32
    low = saliency_maps(model, images.cuda(), targets.cuda(), method, OPTIONS, torch.bfloat16)
    assert low.isfinite().all()
