"""Angular margins: the true class must win by an angle, in training only.

The last layer (``models.heads.AngularLayer``) gives logits s cos(theta_j); each margin here takes the true class's
logit down, and cross-entropy follows.

Source: A-Softmax, CosFace, ArcFace and Li-ArcFace as compared by Alirezazadeh et al. (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from breastcli.errors import UsageError
from breastcli.losses import LOSSES, LossKind, Margin
from breastcli.losses.cross_entropy import cross_entropy
from breastcli.models.heads import COSINE_LIMIT

AIRFACE = "Li et al., AirFace, ICCV workshops 2019"
QUARTER_TURN = math.pi / 2
# A-Softmax starts as plain softmax and lets the margin in slowly: lambda falls from 1000 to 5 over the iterations, of
# which SphereFace took 28,000 (Liu et al., section 4.1 and their public training settings).
LAMBDA_START, LAMBDA_END, LAMBDA_FALL, ITERATIONS = 1000.0, 5.0, 0.12, 28_000


def a_softmax(margin: float, scale: float) -> Margin:
    """Return SphereFace's margin: cos(theta) becomes psi(theta), which falls ``margin`` times as fast.

    psi(theta) = (-1)^k cos(m theta) - 2k on [k pi / m, (k + 1) pi / m], and the logit is the mean of cos(theta) and
    psi(theta) in the ratio lambda : 1.

    Source: Liu et al., SphereFace, CVPR 2017, eq. 7. Differs from it: the embedding is normalised and scaled, as for
    the other margins, and lambda falls with the share of the training, not with the number of its steps.

    Raises:
        UsageError: the margin is not a whole number.
    """
    if not float(margin).is_integer():
        raise UsageError(f"--margin {margin:g}: a_softmax multiplies the angle", fix="give a whole number, 1 or more")

    def change(cosine: Tensor, progress: float) -> Tensor:
        angle = cosine.clamp(-COSINE_LIMIT, COSINE_LIMIT).acos()
        turns = (margin * angle / math.pi).floor().detach()
        sign = 1 - 2 * (turns % 2)
        psi = sign * (margin * angle).cos() - 2 * turns
        weight = annealing(progress)
        return (weight * cosine + psi) / (1 + weight)

    return _on_true_class(change, scale)


def annealing(progress: float) -> float:
    """Return A-Softmax's lambda at a share of the training in [0, 1)."""
    return max(LAMBDA_END, LAMBDA_START / (1 + LAMBDA_FALL * ITERATIONS * progress))


def cosface(margin: float, scale: float) -> Margin:
    """Return CosFace's margin: cos(theta) becomes cos(theta) - m.

    Source: Wang et al., CosFace, CVPR 2018, eq. 4.
    """
    return _on_true_class(lambda cosine, _: cosine - margin, scale)


def arcface(margin: float, scale: float) -> Margin:
    """Return ArcFace's margin: cos(theta) becomes cos(theta + m), m in radians.

    Beyond theta = pi - m, where the cosine would rise again, it goes on falling as cos(theta) - m sin(m).

    Source: Deng et al., ArcFace, CVPR 2019, eq. 3; the continuation is that of the authors' code.
    """

    def change(cosine: Tensor, _: float) -> Tensor:
        sine = (1 - cosine.clamp(-COSINE_LIMIT, COSINE_LIMIT) ** 2).sqrt()
        turned = cosine * math.cos(margin) - sine * math.sin(margin)
        return torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))

    return _on_true_class(change, scale)


def li_arcface(margin: float, scale: float) -> Margin:
    """Return Li-ArcFace's margin: (pi - 2 theta) / pi becomes (pi - 2 (theta + m)) / pi, m in radians.

    Source: Li et al., AirFace, ICCV workshops 2019, eq. 5.
    """
    return _on_true_class(lambda angle, _: angle - 2 * margin / math.pi, scale)


def _on_true_class(change: Callable[[Tensor, float], Tensor], scale: float) -> Margin:
    """Return a margin that applies ``change`` to the unscaled logit of the true class, (B, 1)."""

    def margin(logits: Tensor, labels: Tensor, progress: float) -> Tensor:
        true = labels[:, None]
        changed = change(logits.gather(1, true) / scale, progress)
        return logits.scatter(1, true, scale * changed)

    return margin


# Margins and scales for two to eight classes; docs/results.md has the sweep on real images that they come from.
LOSSES.register("a_softmax")(
    LossKind(cross_entropy, "Liu et al., SphereFace, CVPR 2017", "cosine", a_softmax, 4.0, 8.0, neutral_margin=1.0)
)
LOSSES.register("cosface")(LossKind(cross_entropy, "Wang et al., CVPR 2018", "cosine", cosface, 0.3, 8.0))
LOSSES.register("arcface")(
    LossKind(cross_entropy, "Deng et al., CVPR 2019", "cosine", arcface, 0.3, 8.0, largest_margin=QUARTER_TURN)
)
LOSSES.register("li_arcface")(
    LossKind(cross_entropy, AIRFACE, "angle", li_arcface, 0.3, 8.0, largest_margin=QUARTER_TURN)
)
