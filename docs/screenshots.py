"""Draw the README's pictures of a terminal and of a report, from real runs on the drawn sample data set.

    python docs/screenshots.py [FOLDER]

Each command runs through the command line's own code in a temporary folder; Rich keeps what was printed and writes it
as SVG (text and lines, no pixels). The top of the run's report is taken by a headless Chromium, where there is one. The
figures in the pictures say that the chain works, nothing about tissue. Without FOLDER the pictures in docs/ are
replaced. It takes a minute or two.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console

from breastcli import cli, console

WIDTH = 120  # columns
PAGE_PX = (1100, 1500)
TRAIN = "train --data data/sample --arch timm/resnet10t --epochs 8 --lr 1e-3 --augment light --out runs/first"
PICTURES = {
    "prepare": ["prepare raw --dataset sample --size 64 --out data/sample"],
    "dry_run": [f"{TRAIN} --dry-run"],
    "evaluate": [TRAIN, "evaluate runs/first"],
    "explain": ["explain runs/first --masks raw/masks --method dtgradcam,gradcam"],
}
# A viewer may fetch nothing, so the text is set in whatever monospaced font it has.
RICH_FORMAT = inspect.signature(Console.export_svg).parameters["code_format"].default
FORMAT = re.sub(r"@font-face\s*\{\{.*?\}\}\s*", "", RICH_FORMAT, flags=re.DOTALL).replace(
    "Fira Code, monospace", "Menlo, Consolas, DejaVu Sans Mono, monospace"
)


def picture(name: str, commands: list[str]) -> str:
    """Run commands, and return what the last of them printed as SVG."""
    for number, command in enumerate(commands):
        recorder = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
        console.OUT = console.ERR = recorder
        recorder.print(f"[bold green]$[/bold green] breastcli {command}", style="bold")
        sys.argv = ["breastcli", *command.split()]
        try:
            cli.app()
        except SystemExit as stop:
            if stop.code:
                raise SystemExit(f"{command} ended with exit code {stop.code}") from stop
        print(f"{name} {number + 1}/{len(commands)}", file=sys.stderr)
    return recorder.export_svg(title="breastcli on drawn images", code_format=FORMAT, unique_id=f"breastcli-{name}")


def photograph(page: Path, picture: Path) -> None:
    """Write what a browser shows of the top of a page, in few colours."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print(f"{picture} stays as it is: there is no Chromium", file=sys.stderr)
        return
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
    size, shot = f"--window-size={PAGE_PX[0]},{PAGE_PX[1]}", f"--screenshot={page.with_suffix('.png')}"
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *flags, f"--user-data-dir={profile}", size, shot, page.absolute().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(page.with_suffix(".png")) as taken:
        taken.convert("RGB").quantize(64).save(picture, optimize=True)
    print(f"{picture} {picture.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Write every picture."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent).absolute()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        for name, commands in PICTURES.items():
            path = folder / f"terminal_{name}.svg"
            path.write_text(picture(name, commands), encoding="utf-8")
            print(f"{path} {path.stat().st_size / 1000:.0f} kB")
        photograph(Path("runs/first/report.html"), folder / "report.png")
        os.chdir(folder)


if __name__ == "__main__":
    main()
