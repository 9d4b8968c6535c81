"""One frozen dataclass per job: a field is a YAML key, a flag and its help text."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from breastcli.options import Options, option

MAGNIFICATIONS = ("40X", "100X", "200X", "400X")
SPLITS = ("train", "val", "test")
COMPARED = ("prepare", "input", "training", "inference", "stain", "cams", "gan-metrics", "intervals")


@dataclass(frozen=True, kw_only=True)
class JobConfig(Options):
    """Options that every job has which makes something."""

    out: str | None = option(None, "Output folder or file.", metavar="PATH")
    device: str = option("auto", "Where to compute.", metavar="auto|cpu|cuda|cuda:N|mps")
    seed: int = option(0, "Seed of every random choice.", at_least=0)
    precision: str = option("auto", "Arithmetic of the network.", choices=("auto", "fp32", "bf16", "fp16"))
    workers: int | None = option(
        None, "Threads that read images (default: every core to decode files, one to gather batches).", at_least=1
    )
    overwrite: bool = option(False, "Replace what breastcli wrote in the output folder before.")


@dataclass(frozen=True, kw_only=True)
class PlannedConfig(JobConfig):
    """Options of a job that can say beforehand what it would do."""

    dry_run: bool = option(False, "Check everything, say what would be done, and write nothing.")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(PlannedConfig):
    """Options of ``breastcli prepare``."""

    raw: str | None = option(
        None, "Folder of the raw data set, or a CSV list of images (sample: where to draw it).", positional=True
    )
    out: str | None = option(None, "Folder to write (default: data/breakhis, of --audit runs/audit).", metavar="DIR")
    dataset: str = option(
        "auto", "Which data set RAW holds; `--dataset help` lists them; sample draws one.", metavar="auto|NAME"
    )
    size: int = option(224, "Side of the square images in pixels.", at_least=16)
    stain: str = option("none", "Stain normalisation.", choices=("none", "macenko", "reinhard"))
    stain_reference: str = option(
        "auto", "Image whose stain is the reference; auto fits it on training images.", metavar="auto|FILE"
    )
    exact: bool = option(False, "Measure the stain of an image on all of its pixels, not on at most 20,000.")
    split: str = option("6:1:3", "Ratio train:val:test.", metavar="A:B:C")
    group_by: str = option("exam", "What never crosses a split.", choices=("exam", "patient", "image"))
    folds: int | None = option(None, "Make K cross-validation folds instead of one split.", at_least=3, metavar="K")
    import_split: str | None = option(
        None, "Take the split of a published list (file|magnification|fold|grp, or CSV) instead.", metavar="FILE"
    )
    import_fold: str | None = option(None, "Which of several splits of --import-split to take.", metavar="K")
    patients: str | None = option(
        None,
        "Who the images belong to: a CSV list with columns path and patient (or group), or a regular expression that "
        "finds the patient in a path.",
        metavar="FILE|REGEX",
    )
    task: str = option("binary", "Classes: two (benign/malignant) or the subtypes.", choices=("binary", "subtype"))
    classes: str = option("all", "Subtypes or classes to keep, separated by commas.", metavar="all|A,B")
    mag: str = option("all", "Magnification to keep.", metavar="all|40x|100x|200x|400x")
    strict: bool = option(False, "Fail when any file is rejected.")
    drop_duplicates: str = option(
        "none", "Sets of (nearly) identical images.", choices=("none", "keep-first", "drop-all")
    )
    audit: bool = option(False, "Only look for leaks and odd images; write no prepared folder.")
    resume: bool = option(False, "Continue an interrupted prepare.")
    shard: str | None = option(
        None, "Array jobs: only decode part I of N, beside the output folder; then join with --merge N.", metavar="I/N"
    )
    merge: int | None = option(None, "Join the N parts that --shard decoded, and finish.", at_least=1, metavar="N")
    draw: int = option(480, "Sample data set only: number of images to draw.", at_least=64, metavar="N")


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig(PlannedConfig):
    """Options of ``breastcli synthesize``."""

    step: str = option(
        "all",
        "fit a conditional GAN, generate images with it, assess it or a folder of images; all fits and generates.",
        choices=("all", "fit", "generate", "assess"),
        positional=True,
    )
    run: str | None = option(
        None,
        "Run folder of the GAN (default: runs/cwgan-MAG), or a folder of synthetic images to assess.",
        positional=True,
    )
    out: str | None = option(
        None,
        "Folder to write: of fit the run folder, of assess RUN/assess, else of the images (default: DATA-synthetic).",
        metavar="DIR",
    )
    data: str | None = option(
        None,
        "Prepared folder (default: data/breakhis, or the run's own); generate: also one of another size.",
        metavar="DIR",
    )
    mag: str = option("all", "fit: magnification.", metavar="all|40x|100x|200x|400x")
    fold: int | None = option(None, "fit: fold to keep for testing, where the data set has folds.", at_least=0)
    classes: str = option("all", "fit: classes or subtypes to learn, separated by commas.", metavar="all|A,B")
    condition: str = option(
        "class", "fit: what an image is asked for by.", choices=("class", "subtype", "class+magnification")
    )
    size: int = option(64, "fit: side of the generated images in pixels: 64, 128, 256 or 512.", at_least=16)
    width: int = option(32, "fit: channels at full size; they double at each halving, up to 8 times.", at_least=4)
    kimg: float = option(300.0, "fit: thousands of real images to show the critic.", at_least=0.001)
    batch_size: int = option(32, "fit: images per step; generate, assess: at once.", at_least=2)
    lr: float = option(0.0025, "fit: learning rate of generator and critic.", at_least=0.0)
    objective: str = option(
        "wgan-gp", "fit: losses (paper: Wasserstein critic, hinge generator).", choices=("wgan-gp", "hinge", "paper")
    )
    gp_weight: float = option(10.0, "fit: weight of the two-sided gradient penalty.", at_least=0.0)
    gamma: float = option(0.0, "fit: weight of the R1 penalty, taken every 16 steps.", at_least=0.0)
    feature_weight: float = option(0.0, "fit: weight of feature matching in the generator's loss.", at_least=0.0)
    diffaugment: str = option(
        "translation,cutout",
        "fit: differentiable augmentation of what the critic sees.",
        metavar="none|color,translation,cutout",
    )
    turn: bool = option(True, "fit: show real images in all eight flips and turns.")
    ema: float = option(10.0, "fit: half-life of the averaged generator in thousands of images.", at_least=0.0)
    n_critic: int | None = option(
        None, "fit: steps of the critic for one of the generator (default: 5, of hinge 2).", at_least=1
    )
    snapshot: float | None = option(
        None, "fit: thousands of images between snapshots (default: 20 in all).", at_least=0.001, metavar="KIMG"
    )
    on_collapse: str = option(
        "stop", "fit: what to do when images become all alike, or the critic runs away.", choices=("stop", "warn")
    )
    label: str = option(
        "minority", "generate: class or condition, several separated by commas.", metavar="minority|all|A,B"
    )
    num: int | None = option(
        None, "generate: images of each label (default: what balances the classes); assess: of each class.", at_least=1
    )
    truncation: float = option(1.0, "generate, assess: pull towards the mean image; 1 for none.", at_least=0.0)
    features: str = option(
        "latest", "assess: trained run whose features are compared, or inception.", metavar="RUN|latest|inception"
    )
    draws: int = option(20, "assess: repeated draws of images for each figure.", at_least=2)
    resume: bool = option(False, "fit: continue an interrupted run.")
    smoke: bool = option(False, "fit: a minute-long trial: a tiny network on 256 images.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PlannedConfig):
    """Options of ``breastcli train``. Defaults are those of the DALAResNet50 paper (section IV-A)."""

    arch: str = option(
        "dalaresnet50",
        "Network: one that `--arch help` lists, timm/<name>, torchvision/<name> or hf-hub:<owner>/<name>.",
        metavar="NAME",
    )
    data: str = option("data/breakhis", "Prepared folder.", metavar="DIR")
    out: str | None = option(None, "Run folder (default: runs/ARCH-MAG).", metavar="DIR")
    mag: str = option("all", "Magnification to train on.", metavar="all|40x|100x|200x|400x")
    fold: int | None = option(None, "Fold to test on, where the data set has folds.", at_least=0)
    epochs: int = option(50, "Number of epochs.", at_least=1)
    batch_size: int = option(32, "Images per step.", at_least=1)
    lr: float = option(1e-4, "Initial learning rate.", at_least=0.0)
    trunk_lr: float | None = option(None, "Learning rate of the trunk, where it differs from --lr.", at_least=0.0)
    optimizer: str = option("adam", "Optimiser.", choices=("adam", "adamw", "sgd"))
    weight_decay: float = option(0.0, "Weight decay.", at_least=0.0)
    schedule: str = option("none", "Learning-rate schedule.", choices=("none", "cosine", "exponential"))
    dropout: float = option(0.25, "Dropout before the last layer (multiscale has its own).", at_least=0.0, below=1.0)
    augment: str = option(
        "paper", "Augmentation policy.", choices=("none", "light", "paper", "strong", "deebani", "wang")
    )
    imbalance: str = option(
        "none",
        "Answer to class imbalance.",
        choices=("none", "weights", "class_balanced", "logit_adjustment", "oversample"),
    )
    loss: str = option(
        "cross_entropy", "Loss function.", metavar="cross_entropy|focal|a_softmax|cosface|arcface|li_arcface"
    )
    margin: float | None = option(
        None,
        "Margin of an angular loss: radians (arcface, li_arcface), cosine (cosface), factor (a_softmax).",
        at_least=0.0,
    )
    scale: float | None = option(None, "Scale of an angular loss.", at_least=1.0)
    head: str = option(
        "own",
        "Head: the architecture's own, one linear layer, or a hidden layer of 512 and one more.",
        choices=("own", "linear", "mlp"),
    )
    freeze: str = option(
        "none",
        "Freeze the trunk, stages of it (layer1,layer2), the first N layers with weights, or of a stage.",
        metavar="none|trunk|N|STAGE|STAGE:N,…",
    )
    unfreeze_at: int | None = option(None, "Epoch from which on everything learns.", at_least=2, metavar="EPOCH")
    cache_embeddings: str = option(
        "auto",
        "Where only the head learns: embed each image once, keep that beside the data, and train the head on it "
        "(auto: where the augmentation allows it and it saves work).",
        choices=("auto", "on", "off"),
    )
    batch_norm: str = option(
        "train", "Batch-norm statistics: from the batches, or as loaded.", choices=("train", "frozen")
    )
    attention_stage: int = option(4, "dalaresnet50: stage after which the attention sits (1-4).", at_least=1, below=5)
    reduction: int = option(4, "dalaresnet50: reduction of the attention (the paper used 4 and 16).", at_least=1)
    trunks: str = option(
        "densenet201,nasnetmobile,resnet101", "multiscale: its networks, separated by commas.", metavar="A,B,…"
    )
    fusion: str = option(
        "pyramid", "multiscale: how its networks' maps are joined.", choices=("pyramid", "concatenation")
    )
    pretrained: bool = option(False, "Start from published ImageNet weights.")
    weights: str | None = option(None, "Start from the weights in FILE.", metavar="FILE")
    init_from: str | None = option(None, "Start from another run's best weights, without its head.", metavar="RUN")
    normalisation: str = option(
        "auto",
        "Scale images to [-1, 1] (symmetric, as the papers) or as the published weights expect (native; auto: native "
        "for timm/, torchvision/ and hf-hub: networks).",
        choices=("auto", "symmetric", "native"),
    )
    extra: str | None = option(
        None, "Folder of `synthesize` whose images of the minority classes join the training images.", metavar="DIR"
    )
    extra_ratio: float | None = option(
        None,
        "At most this many images of --extra for each real training image of a class (default: all).",
        at_least=0.0,
    )
    patience: int | None = option(None, "Stop after this many epochs without a better score.", at_least=1)
    monitor: str = option(
        "val_balanced_accuracy",
        "Validation figure that chooses the best epoch.",
        choices=("val_balanced_accuracy", "val_accuracy", "val_roc_auc", "val_loss"),
    )
    resume: bool = option(False, "Continue an interrupted run.")
    deterministic: bool = option(False, "Use deterministic CUDA kernels only.")
    compile: bool = option(False, "Compile the network with torch.compile.")
    smoke: bool = option(False, "A minute-long trial: one epoch on at most 64 images per split.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PlannedConfig):
    """Options of ``breastcli evaluate``."""

    runs: tuple[str, ...] = option((), "Run folders; several are pooled.", positional=True)
    run: str | None = option(None, "Run folder, or latest.", metavar="DIR|latest")
    out: str | None = option(None, "Output folder (default: RUN/evaluate/SPLIT).", metavar="DIR")
    data: str | None = option(None, "Prepared folder (default: the run's own).", metavar="DIR")
    split: str = option("test", "Split to evaluate.", choices=("test", "val"))
    threshold: str = option(
        "0.5",
        "Decision threshold for two classes; val-* rules fit it on validation images.",
        metavar="T|val-youden|val-sensitivity=S",
    )
    tta: str = option("none", "Test-time augmentation: d4 averages the eight flips and turns.", choices=("none", "d4"))
    calibrate: bool = option(False, "Scale the probabilities by a temperature fitted on validation images.")
    compare: bool = option(False, "Compare two evaluated folders, A and B: every figure of B minus that of A.")
    embedding: bool = option(False, "Also draw the embedding and the angles within and between classes.")
    stress: bool = option(False, "Also score the images perturbed: stain, blur, JPEG, light, each at three strengths.")
    batch_size: int = option(64, "Images per step.", at_least=1)
    resamples: int = option(2000, "Bootstrap resamples for the intervals.", at_least=100)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(PlannedConfig):
    """Options of ``breastcli explain``. Noise and samples are those of DT Grad-CAM."""

    run: str = option("latest", "Run folder, or latest.", positional=True)
    out: str | None = option(None, "Output folder (default: RUN/explain/METHOD).", metavar="DIR")
    data: str | None = option(None, "Prepared folder (default: the run's own).", metavar="DIR")
    split: str = option("test", "Split to explain.", choices=("test", "val"))
    images: tuple[str, ...] = option(
        (), "Image file or folder to explain instead of a split (give it several times for several).", metavar="PATH"
    )
    method: str = option(
        "dtgradcam",
        "Method, several separated by commas, or all.",
        metavar="dtgradcam|gradcam|gradcampp|layercam|scorecam|eigencam|all",
    )
    num: str = option("24", "Number of images, drawn evenly from the classes.", metavar="N|all")
    target: str = option("predicted", "Class to explain.", metavar="predicted|true|CLASS")
    layer: str | None = option(None, "Stage whose maps are explained (default: the last).", metavar="STAGE")
    masks: str | None = option(None, "Folder of masks of what should be found; turns on localisation.", metavar="DIR")
    binarise: str = option("otsu", "How maps become masks.", metavar="otsu|fixed=T|quantile=Q|val")
    patients: str | None = option(
        None, "Regular expression that finds the patient in an image's name (--images).", metavar="REGEX"
    )
    faithfulness: bool = option(False, "Also measure whether the maps tell what the network uses.")
    noise: float = option(0.1, "dtgradcam: standard deviation of the noise, images being in [-1, 1].", at_least=0.0)
    samples: int = option(10, "dtgradcam: noisy copies of each image.", at_least=1)
    top_k: int | None = option(None, "scorecam: only the K most active channels.", at_least=1, metavar="K")
    batch_size: int = option(32, "Images through the network at once, copies included.", at_least=1)
    resamples: int = option(2000, "Bootstrap resamples for the intervals.", at_least=100)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(PlannedConfig):
    """Options of ``breastcli predict``."""

    run: str = option("latest", "Run folder, or latest.", positional=True)
    images: tuple[str, ...] = option((), "Image files or folders.", positional=True)
    out: str | None = option("predictions.csv", "File to write.", metavar="FILE")
    threshold: str | None = option(None, "Decision threshold for two classes (default: 0.5).", metavar="T")
    tta: str = option("none", "Test-time augmentation: d4 averages the eight flips and turns.", choices=("none", "d4"))
    batch_size: int = option(64, "Images per step.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(PlannedConfig):
    """Options of ``breastcli benchmark``."""

    what: str = option(
        "all",
        "models: size and speed of networks; convergence: their time to converge; all others: our code beside others'.",
        choices=("all", "models", "convergence", *COMPARED),
        positional=True,
    )
    out: str | None = option("runs/benchmark", "Folder to write.", metavar="DIR")
    archs: str | None = option(
        None, "Networks as `train --arch` takes them (default: models every one, else three).", metavar="all|A,B"
    )
    raw: str | None = option(None, "What reads images: raw data set (default: 128 drawn images).", metavar="DIR")
    size: int | None = option(None, "Side of images in pixels (default: the network's own, or 224).", at_least=16)
    batch_size: int | None = option(None, "Images per step (default: 32; convergence: the protocol's).", at_least=2)
    rounds: int = option(5, "Rounds after the warm-up, at most: slow comparisons stop after two or more.", at_least=1)
    protocol: str | None = option(
        None, "convergence: YAML file whose `train` section holds for every network.", metavar="FILE"
    )
    data: str | None = option(
        None,
        "convergence: prepared folder (default: the protocol's, or data/breakhis; of `all` without either: drawn "
        "images of 64 pixels and a few epochs).",
        metavar="DIR",
    )
    mag: str | None = option(None, "convergence: as in train.", metavar="all|40x|100x|200x|400x")
    fold: int | None = option(None, "convergence: as in train.", at_least=0)
    epochs: int | None = option(None, "convergence: as in train.", at_least=1)
    resume: bool = option(False, "convergence: keep the runs that are finished and go on with the others.")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(JobConfig):
    """Options of ``breastcli report``."""

    runs: tuple[str, ...] = option(
        (), "Run folders, or latest: one page is rebuilt, several are compared.", positional=True
    )
    out: str | None = option(None, "Folder to write, of several runs (default: runs/report).", metavar="DIR")
    split: str = option("test", "Evaluated split that is compared.", choices=("test", "val"))


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """Options of ``breastcli doctor``."""

    device: str = option("auto", "The device that must work.", metavar="auto|cpu|cuda|cuda:N|mps")
    network: bool = option(False, "Also ask the servers of published weights whether they answer.")


JOBS: dict[str, type[Options]] = {
    "prepare": PrepareConfig,
    "synthesize": SynthesizeConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "explain": ExplainConfig,
    "predict": PredictConfig,
    "benchmark": BenchmarkConfig,
    "report": ReportConfig,
    "doctor": DoctorConfig,
}


def field_types(kind: type[Options]) -> dict[str, Any]:
    """Return the resolved type of every field of a job's configuration."""
    return typing.get_type_hints(kind)
