"""doctor: what works here, what is missing, and what that costs."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import Request, urlopen

from breastcli import __version__
from breastcli.config import DoctorConfig
from breastcli.errors import UserError, first_line
from breastcli.files import existing_parent
from breastcli.progress import SILENT, Progress

# What is imported under another name than it is installed by.
MODULES = {
    "scikit-learn": "sklearn",
    "imbalanced-learn": "imblearn",
    "scikit-image": "skimage",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# Module of each optional package, and what there is not without it.
OPTIONAL = {
    "grad-cam": ("pytorch_grad_cam", "`benchmark cams` times our code alone"),
    "torchstain": ("torchstain", "`benchmark stain` and `benchmark prepare` time our code alone"),
    "torch-fidelity": (
        "torch_fidelity",
        "no `synthesize assess --features inception`; `benchmark gan-metrics` lacks it",
    ),
    "torchmetrics": ("torchmetrics", "`benchmark gan-metrics` lacks it"),
    "pytorch-metric-learning": ("pytorch_metric_learning", "only tests use it: margins have nothing to agree with"),
}
FOLDERS = ("data", "runs")  # where prepare and the other jobs write by default
SERVERS = {"torchvision's weights": "download.pytorch.org", "timm's and the hub's weights": "huggingface.co"}
PATIENCE_S = 5.0
SIGNS = "–…×µ"  # of what is printed, those that ASCII lacks
COLOURLESS = ("", "dumb", "unknown")

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        group: what it belongs to.
        name: what it is.
        state: "ok", "note" where something is missing that the user may do without, "failed" where it is needed.
        found: what was found.
        cost: what does not work therefore, and what to do about it; "" where everything does.
    """

    group: str
    name: str
    state: State
    found: str
    cost: str = ""


@dataclass(frozen=True)
class DoctorResult:
    """What ``doctor`` found.

    Attributes:
        checks: everything that was looked at.
        seconds: wall-clock time.
    """

    checks: list[Check]
    seconds: float

    @property
    def failure(self) -> UserError | None:
        """What is needed and does not work, if anything."""
        failed = [check.name for check in self.checks if check.state == "failed"]
        return UserError(f"not usable as it is: {', '.join(failed)}", fix="see the table") if failed else None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        checks = [dataclasses.asdict(check) for check in self.checks]
        return {"ok": self.failure is None, "checks": checks, "seconds": self.seconds}


def doctor(config: DoctorConfig, progress: Progress = SILENT) -> DoctorResult:
    """Look at the installation, the machine and the folders; nothing is written, and nothing is fetched.

    Raises:
        UsageError: no such device.
    """
    started = time.monotonic()
    parts: list[Callable[[], Iterator[Check]]] = [
        _program,
        _libraries,
        _optional,
        lambda: _devices(config.device),
        _memory,
        _folders,
        lambda: _weights(network=config.network),
        _terminal,
    ]
    checks: list[Check] = []
    progress.begin("looking", len(parts), "groups")
    for part in parts:
        checks += part()
        progress.advance("looking")
    return DoctorResult(checks, time.monotonic() - started)


def _program() -> Iterator[Check]:
    try:
        needed = metadata.metadata("breastcli")["Requires-Python"]
    except metadata.PackageNotFoundError:
        needed = None
    yield Check("program", "breastcli", "ok", f"{__version__} in {_shortened(Path(__file__).parent)}")
    yield _version("program", "Python", platform.python_version(), needed)


def _libraries() -> Iterator[Check]:
    """Import every library that the installed package needs, and compare its version with the lower bound."""
    try:
        needed = [one for one in metadata.requires("breastcli") or () if "extra ==" not in one]
    except metadata.PackageNotFoundError:
        fix = "versions are not compared; install it with pip install ."
        yield Check("libraries", "metadata", "note", "breastcli runs without being installed", fix)
        needed = ["torch", "torchvision", "timm"]
    for requirement in needed:
        name, bound = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement).groups()
        try:
            importlib.import_module(MODULES.get(name, name))
            yield _version("libraries", name, metadata.version(name), bound)
        except metadata.PackageNotFoundError:
            yield Check("libraries", name, "failed", "not installed", f"pip install '{requirement}'")
        except Exception as error:  # a broken library raises almost anything
            reason = f"cannot be imported ({first_line(error, 120)})"
            yield Check("libraries", name, "failed", reason, f"pip install --force-reinstall '{requirement}'")


def _version(group: str, name: str, found: str, needed: str | None) -> Check:
    """Compare a version with a lower bound such as ">=2.6"."""
    bound = re.search(r">=\s*([\d.]+)", needed or "")
    if bound is None or _numbers(found) >= _numbers(bound[1]):
        return Check(group, name, "ok", found)
    return Check(group, name, "failed", f"{found}, older than {bound[1]}", f"install {name} {bound[1]} or newer")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version, 2.6 being 2.6.0; what follows a plus sign says how it was built."""
    found = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return tuple(found + [0] * (3 - len(found)))


def _optional() -> Iterator[Check]:
    for name, (module, cost) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Check("optional", name, "note", "not installed", cost)
        else:
            yield Check("optional", name, "ok", metadata.version(name))


def _devices(wanted: str) -> Iterator[Check]:
    """Compute something on every device, and say which one and which arithmetic ``auto`` chooses."""
    try:
        import torch
    except Exception:  # said among the libraries
        return
    from breastcli.system.runtime import describe_device, resolve_device, resolve_precision

    try:
        chosen = resolve_device(wanted)
    except UserError as error:
        if error.exit_code != 1:
            raise
        yield Check("devices", f"--device {wanted}", "failed", error.problem, error.fix)
        chosen = None
    devices = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(torch.cuda.device_count()))]
    devices += [torch.device("mps")] if torch.backends.mps.is_available() else []
    for device in devices:
        dtype = resolve_precision("auto", device)
        memory = f", {_size(torch.cuda.mem_get_info(device)[1])} memory" if device.type == "cuda" else ""
        found = f"{describe_device(device)}{memory}; computes in {str(dtype).removeprefix('torch.')}"
        cost = "" if dtype == torch.bfloat16 else "no bfloat16 in hardware: --precision auto is float32"
        problem = _problem_of(device, dtype)
        state: State = "failed" if problem and chosen and device.type == chosen.type else "note" if problem else "ok"
        yield Check("devices", str(device), state, f"{found}; {problem}" if problem else found, cost)
    if len(devices) == 1:
        cost = "networks train on the CPU: hours for a large one; --freeze trunk, --smoke and small networks are fast"
        yield Check("devices", "GPU", "note", "none is visible to PyTorch", cost)


def _problem_of(device: Any, dtype: Any) -> str:
    """Return what goes wrong with one training step of a convolution, or ""."""
    import torch

    from breastcli.system.runtime import autocast

    try:
        images = torch.ones(1, 3, 8, 8, device=device, requires_grad=True)
        weights = torch.ones(4, 3, 3, 3, device=device)
        with autocast(device, dtype):
            torch.nn.functional.conv2d(images, weights).float().sum().backward()
        if bool(images.grad.isfinite().all()):
            return ""
        return "a gradient is not finite"
    except RuntimeError as error:
        return f"fails: {first_line(error, 120)}"


def _memory() -> Iterator[Check]:
    total = _total_memory()
    if total is None:
        yield Check("memory", "memory", "note", "unknown on this system")
        return
    available = _available_memory()
    found = f"{_size(total)}" + (f", {_size(available)} available" if available is not None else "")
    yield Check("memory", "memory", "ok", found)


def _total_memory() -> int | None:
    """Return the machine's memory in bytes, or less where a container has less; None where nobody tells."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def _available_memory() -> int | None:
    """Return the bytes that a new process could have without swapping; None where nobody tells."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return int(found[1]) * 1024 if found else None


def _folders() -> Iterator[Check]:
    for name in FOLDERS:
        parent = existing_parent(Path(name))
        shown = f"{name}/" if parent == Path(name) else f"{name}/ (would be created)"
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
            yield Check("folders", name, "ok", f"{shown}: {_size(shutil.disk_usage(parent).free)} free")
        except OSError as error:
            fix = "work in another folder, or give every command an --out"
            yield Check("folders", name, "failed", f"{shown}: cannot write ({error.strerror})", fix)


def _weights(*, network: bool) -> Iterator[Check]:
    """Count the weights in the libraries' caches; ask their servers only where the user wants that."""
    cost = "--pretrained fetches what it needs; where there is no network, pass --weights FILE"
    for name, folder, pattern in _caches():
        found = list(folder.glob(pattern))
        shown = f"{len(found)} in {_shortened(folder)}"
        yield Check("weights", name, "ok" if found else "note", shown, "" if found else cost)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check("weights", "HF_HUB_OFFLINE", "note", "set", "nothing is fetched from the model hub")
    if not network:
        yield Check("weights", "servers", "ok", "not asked (--network asks them)")
        return
    for name, host in SERVERS.items():
        try:
            with urlopen(Request(f"https://{host}/", method="HEAD"), timeout=PATIENCE_S):
                yield Check("weights", name, "ok", f"{host} answers")
        except (URLError, OSError) as error:
            answered = getattr(error, "code", None) is not None  # whatever it thinks of the question
            state: State = "ok" if answered else "note"
            found = f"{host} answers" if answered else f"{host} does not answer ({first_line(error, 80)})"
            yield Check("weights", name, state, found, "" if answered else cost)


def _caches() -> Iterator[tuple[str, Path, str]]:
    """Yield name, folder and pattern of the caches of published weights, as the libraries that keep them say."""
    try:
        import torch
        from huggingface_hub import constants
    except Exception:  # said among the libraries
        return
    yield "PyTorch's cache", Path(torch.hub.get_dir()) / "checkpoints", "*.pth"
    yield "model hub's cache", Path(constants.HF_HUB_CACHE), "models--*"


def _terminal() -> Iterator[Check]:
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        is_terminal = stream.isatty()
        bare = "NO_COLOR" in os.environ or os.environ.get("TERM", "") in COLOURLESS
        colour = "colour" if (is_terminal and not bare) or "FORCE_COLOR" in os.environ else "no colour"
        kind = "a terminal" if is_terminal else "no terminal"
        bars = ", progress bars" if is_terminal and name == "stderr" else ""
        found, encoding = f"{kind}, {colour}{bars}, {stream.encoding}", stream.encoding or "ascii"
        try:
            SIGNS.encode(encoding)
            yield Check("terminal", name, "ok", found)
        except (UnicodeEncodeError, LookupError):
            yield Check("terminal", name, "note", found, "tables have signs that it lacks: set PYTHONIOENCODING=utf-8")


def _shortened(path: Path) -> str:
    """Return a path with the home folder as ``~``."""
    home = Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
