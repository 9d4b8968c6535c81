"""What keeps a page small: pictures that fit are left alone, large ones are scaled down."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from breastcli.reporting import page
from breastcli.reporting.page import LEFT_OUT, MAX_SIDE_PX, MIN_SIDE_PX, fit_pictures, render_page


def source(width: int, height: int, *, noisy: bool = True) -> str:
    """Return a PNG as a data URI; noise cannot be compressed."""
    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    if noisy:
        pixels = np.random.default_rng(width).integers(0, 256, pixels.shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def size_of(uri: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size


def test_what_fits_is_left_alone() -> None:
    sources = [source(300, 200), source(64, 64)]
    assert fit_pictures(sources, sum(map(len, sources))) == sources
    assert fit_pictures([], 0) == []


def test_a_side_beyond_the_limit_is_scaled_down_and_keeps_its_shape() -> None:
    wide, tall = fit_pictures([source(3600, 900, noisy=False), source(100, 2700, noisy=False)], 10**9)
    assert size_of(wide) == (MAX_SIDE_PX, MAX_SIDE_PX // 4)
    assert size_of(tall)[1] == MAX_SIDE_PX


def test_the_largest_pictures_give_way_until_all_fit() -> None:
    sources = [source(700, 700), source(90, 90), source(600, 500)]
    budget = sum(map(len, sources)) // 3
    fitted = fit_pictures(sources, budget)
    assert sum(map(len, fitted)) <= budget
    assert fitted[1] == sources[1]  # small enough for its share
    share = (budget - len(sources[1])) // 2
    for old, new in ((sources[0], fitted[0]), (sources[2], fitted[2])):
        assert len(new) <= share
        assert size_of(new)[0] < size_of(old)[0]
        assert len(new) > share / 2, "no more is taken away than must be"
    assert fit_pictures(sources, budget) == fitted  # the same each time


def test_a_picture_too_small_to_be_seen_is_left_out() -> None:
    assert fit_pictures([source(700, 700), source(700, 600)], 10) == [LEFT_OUT, LEFT_OUT]
    assert MIN_SIDE_PX > 100


def test_what_is_no_picture_stays_while_it_fits() -> None:
    broken = "data:image/png;base64," + base64.b64encode(b"no picture" * 50).decode()
    assert fit_pictures([broken], 10_000) == [broken]
    assert fit_pictures([broken], 10) == [LEFT_OUT]


def test_the_whole_page_keeps_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.j2").write_text('{{ text }}{% for one in sources %}<img src="{{ one }}" alt="">{% endfor %}')
    monkeypatch.setattr(page, "__file__", str(tmp_path / "page.py"))
    monkeypatch.setattr(page, "MAX_BYTES", 200_000)
    text = '<img src="data:image/png;base64,AAAA"> é' * 20
    sources = [source(400, 400), source(410, 300), source(40, 40)]
    written = render_page("t.j2", {"text": text, "sources": sources})
    assert len(written.encode()) <= 200_000
    assert written.count("<img src=") == 3
    assert written.count("&lt;img src=&#34;data:image/png;base64,AAAA&#34;&gt; é") == 20  # text is no picture
    assert sources[2] in written
