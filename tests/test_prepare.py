from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome
from PIL import Image

from breastcli.config import PrepareConfig
from breastcli.data.datasets import DATASETS
from breastcli.data.journal import decode_into
from breastcli.data.stain import PUBLISHED_MACENKO, StainReference, normalise_stain
from breastcli.data.store import PreparedData
from breastcli.errors import LeakError, UsageError, UserError
from breastcli.prepare import prepare
from breastcli.progress import SILENT

OUTPUTS = {"images.npy", "manifest.csv", "dataset.json", "audit.json", "rejected.csv", "contact_sheet.png"}


def run(raw: Path, out: Path, **options: object) -> PreparedData:
    prepare(PrepareConfig(raw=str(raw), out=str(out), **({"size": 32} | options)))
    return PreparedData.open(out)


def any_image(raw: Path, number: int = 0) -> Path:
    return sorted((raw / "BreaKHis_v1").rglob("*.png"))[number]


def test_outputs_and_their_agreement(prepared: Path, raw: Path) -> None:
    assert {path.name for path in prepared.iterdir()} == OUTPUTS
    data = PreparedData.open(prepared)
    assert data.images.shape == (96, 32, 32, 3)
    assert data.images.dtype == np.uint8
    assert data.classes == ("benign", "malignant")
    assert sum(row["images"] for row in data.card["counts"]) == len(data.rows) == 96
    row = data.rows[5]
    image = Image.open(raw / row.record.path)
    assert (row.width_px, row.height_px) == image.size
    assert np.array_equal(data.images[5], np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))
    assert data.card["drawn"]
    assert data.card["split"]["leaky"] is None
    assert json.loads((prepared / "audit.json").read_text())["verdict"] == "clean"


def test_no_exam_on_two_sides(prepared: Path) -> None:
    sides = defaultdict(set)
    for row in PreparedData.open(prepared).rows:
        sides[row.record.exam].add(row.split)
    assert len(sides) > 10
    assert all(len(found) == 1 for found in sides.values())


def test_same_seed_same_bytes(prepared: Path, raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "again", workers=1)
    for name in ("images.npy", "manifest.csv", "dataset.json", "contact_sheet.png"):
        assert (tmp_path / "again" / name).read_bytes() == (prepared / name).read_bytes(), name
    other = run(raw, tmp_path / "other", seed=1)
    first = PreparedData.open(prepared)
    assert other.card["split_fingerprint"] != first.card["split_fingerprint"]
    assert other.card["fingerprint"] == first.card["fingerprint"]


def test_magnification_and_task(raw: Path, tmp_path: Path) -> None:
    data = run(raw, tmp_path / "one", mag="100x")
    assert {row.record.magnification for row in data.rows} == {"100X"}
    data = run(raw, tmp_path / "two", task="subtype", group_by="image")
    assert len(data.classes) == 8
    assert all(row.record.label == row.record.subtype for row in data.rows)


def test_image_split_is_stamped_everywhere(raw: Path, tmp_path: Path) -> None:
    data = run(raw, tmp_path / "out", group_by="image")
    stamp = "LEAKY: image-level split"
    assert data.card["split"]["leaky"] == stamp
    assert any(stamp in note for note in data.card["notes"])
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["verdict"] == stamp
    assert data.card["split"]["shared_with_training"] > 0


def test_folds(folds: Path) -> None:
    data = PreparedData.open(folds)
    assert data.num_folds == 3
    seen = np.concatenate([data.select("test", fold=fold) for fold in range(3)])
    assert sorted(seen) == list(range(96))
    for fold in range(3):
        parts = [set(data.select(split, fold=fold)) for split in ("train", "val", "test")]
        assert set().union(*parts) == set(range(96))
        assert sum(map(len, parts)) == 96
        groups = [{data.rows[row].record.exam for row in part} for part in parts]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]
    with pytest.raises(UserError, match="folds 0 to 2"):
        data.select("train")
    with pytest.raises(UserError, match="folds 0 to 2"):
        data.select("train", fold=3)


def test_eight_classes_by_exam_are_refused_before_anything_counts(raw: Path, tmp_path: Path) -> None:
    """The sample data set has more exams per subtype than BreakHis; five folds are too many for it."""
    with pytest.raises(UserError, match=r"class \w+ has \d+ exams"):
        run(raw, tmp_path / "out", task="subtype", folds=9)
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_occupied_folders_are_refused_and_foreign_files_stay(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        run(raw, out)
    run(raw, out, overwrite=True)
    before = PreparedData.open(out).card["split_fingerprint"]
    run(raw, out, overwrite=True, seed=3)
    assert PreparedData.open(out).card["split_fingerprint"] != before
    assert (out / "thesis.txt").read_text() == "mine"


def test_bad_files_are_listed_and_left_out(raw: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(raw, tmp_path / "raw"))
    broken, empty = any_image(own, 3), any_image(own, 40)
    broken.write_bytes(broken.read_bytes()[:200])
    empty.write_bytes(b"")
    any_image(own, 60).rename(own / "BreaKHis_v1" / "odd name.png")
    data = run(own, tmp_path / "out")
    assert len(data.rows) == len(data.images) == 93
    listed = (tmp_path / "out" / "rejected.csv").read_text()
    assert "empty file" in listed
    assert "cannot be decoded" in listed
    assert "not a BreakHis file name" in listed
    for number in (0, 50, 92):  # rows and images still belong together
        image = Image.open(own / data.rows[number].record.path).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(data.images[number], np.asarray(image))
    with pytest.raises(UserError, match="--strict: 3 files"):
        run(own, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "manifest.csv").exists()


def test_a_copied_image_across_exams_is_a_leak(raw: Path, tmp_path: Path, prepared: Path) -> None:
    rows = PreparedData.open(prepared).rows
    source = next(row for row in rows if row.split == "train")
    target = next(row for row in rows if row.split == "test")
    own = Path(shutil.copytree(raw, tmp_path / "raw"))
    shutil.copy(own / source.record.path, own / target.record.path)
    with pytest.raises(LeakError, match="identical pixels on two sides") as caught:
        run(own, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert json.loads((tmp_path / "out" / ".partial" / "audit.json").read_text())["verdict"] == "leak"
    with pytest.raises(UserError, match="unfinished"):
        PreparedData.open(tmp_path / "out")


@pytest.fixture(scope="module")
def leaky(raw: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn data set with a training image turned and recompressed in the place of a test image of its class."""
    rows = PreparedData.open(prepared).rows
    source = next(row.record for row in rows if row.split == "train")
    target = next(row.record for row in rows if row.split == "test" and row.record.label == source.label)
    own = Path(shutil.copytree(raw, tmp_path_factory.mktemp("leaky") / "raw"))
    image = Image.open(own / source.path).transpose(Image.Transpose.ROTATE_90)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    Image.open(buffer).save(own / target.path)
    return own


def near_duplicate(folder: Path) -> dict:
    (pair,) = json.loads((folder / "audit.json").read_text())["near_duplicates"]
    return pair


def test_a_turned_and_recompressed_copy_across_exams_is_a_leak(
    leaky: Path, tmp_path: Path, breastcli: Callable[..., Outcome]
) -> None:
    outcome = breastcli("prepare", leaky, "--out", "out", "--size", 32)
    assert outcome.code == 3
    assert "near-duplicates on two sides" in outcome.stderr
    assert "--drop-duplicates keep-first" in outcome.stderr
    partial = tmp_path / "out" / ".partial"
    pair = near_duplicate(partial)
    assert (set(pair["sides"]), pair["labels"][0]) == ({"train", "test"}, pair["labels"][1])
    assert pair["position"] in ("turned 90", "turned 270")
    assert Image.open(partial / "suspicious_pairs.png").width > 300
    outcome = breastcli("prepare", leaky, "--out", "out", "--size", 32, "--resume", "--drop-duplicates", "keep-first")
    assert outcome.code == 0
    data = PreparedData.open(tmp_path / "out")
    assert len(data.rows) == len(data.images) == 95
    for number in (0, 40, 94):  # rows and images still belong together
        image = Image.open(leaky / data.rows[number].record.path).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(data.images[number], np.asarray(image))
    (line,) = (tmp_path / "out" / "rejected.csv").read_text().splitlines()[1:]
    assert f"near-duplicate of {pair['images'][0]} (distance {pair['distance']}, {pair['position']})" in line
    assert {"dropped"} < set(near_duplicate(tmp_path / "out")["sides"])
    assert (tmp_path / "out" / "suspicious_pairs.png").is_file()
    assert data.card["num_rejected"] == 1


def test_an_image_split_only_warns_of_copies(leaky: Path, tmp_path: Path) -> None:
    data = run(leaky, tmp_path / "out", group_by="image")
    assert any("nearly identical pairs of images: 1" in note for note in data.card["notes"])


@pytest.mark.parametrize("stain", ["none", "reinhard"])
def test_dropping_all_leaves_neither_in_and_normalises_the_rest(leaky: Path, tmp_path: Path, stain: str) -> None:
    data = run(leaky, tmp_path / "out", drop_duplicates="drop-all", stain=stain)
    assert len(data.rows) == len(data.images) == 94
    pair = near_duplicate(tmp_path / "out")
    assert not {row.record.image_id for row in data.rows} & set(pair["images"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS | {"suspicious_pairs.png"}


def test_overwriting_removes_the_pairs_of_before(leaky: Path, raw: Path, tmp_path: Path) -> None:
    run(leaky, tmp_path / "out", drop_duplicates="keep-first")
    run(raw, tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS


def test_an_audit_alone_writes_no_images(leaky: Path, tmp_path: Path, breastcli: Callable[..., Outcome]) -> None:
    outcome = breastcli("prepare", "--audit", leaky)
    assert outcome.code == 3
    assert "1 pair, 1 on two sides, 0 with two labels" in outcome.stdout
    assert outcome.stdout.splitlines()[-1] == "runs/audit"
    folder = tmp_path / "runs" / "audit"
    assert {path.name for path in folder.iterdir()} == {"audit.json", "rejected.csv", "suspicious_pairs.png"}
    assert not list(tmp_path.rglob("*.npy"))
    outcome = breastcli("prepare", "--audit", leaky, "--json", "--overwrite", "--drop-duplicates", "drop-all")
    assert (outcome.code, outcome.json["audit"]["verdict"], outcome.json["audit"]["num_dropped"]) == (0, "clean", 2)


def test_an_audit_of_a_clean_data_set_draws_no_pairs_and_spares_prepared_folders(
    raw: Path, prepared: Path, tmp_path: Path
) -> None:
    result = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), audit=True, stain="macenko"))
    assert result.failure is None
    assert result.audit.near_duplicates == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"audit.json", "rejected.csv"}
    with pytest.raises(UserError, match="is a prepared folder"):
        prepare(PrepareConfig(raw=str(raw), out=str(prepared), audit=True, overwrite=True))


def test_audits_of_a_prepared_folder_and_of_its_raw_data_agree(raw: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), audit=True))
    assert (tmp_path / "out" / "audit.json").read_text() == (prepared / "audit.json").read_text()
    result = prepare(PrepareConfig(raw=str(raw), out=str(prepared), size=32, resume=True))
    assert json.loads(json.dumps(result.audit.to_json())) == json.loads((prepared / "audit.json").read_text())


def test_a_journal_without_measures_is_refused(raw: Path, tmp_path: Path) -> None:
    records = DATASETS.get("sample").scan(raw).records
    partial = tmp_path / "out" / ".partial"
    decode_into(partial, records, raw, 32, 2, resume=False, progress=SILENT)
    with (partial / "decoded.csv").open(newline="") as file:
        older = [row[:5] for row in csv.reader(file)]
    with (partial / "decoded.csv").open("w", newline="") as file:
        csv.writer(file).writerows(older)
    with pytest.raises(UserError, match=r"begun by an older breastcli: use --overwrite"):
        run(raw, tmp_path / "out", resume=True)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_stain_reference_sees_training_images_only(method: str, raw: Path, tmp_path: Path, prepared: Path) -> None:
    card = run(raw, tmp_path / "one", stain=method).card
    assert card["stain"]["method"] == method
    own = Path(shutil.copytree(raw, tmp_path / "raw"))
    for row in PreparedData.open(prepared).rows:
        if row.split != "train":  # another colour in every held-out image, the same split
            path = own / row.record.path
            Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    changed = run(own, tmp_path / "two", stain=method).card
    assert changed["stain"] == card["stain"]
    assert changed["fingerprint"] != card["fingerprint"]


def test_exact_measures_the_stain_on_every_pixel(raw: Path, tmp_path: Path) -> None:
    options = {"stain": "macenko", "folds": 3, "size": 160}  # 25,600 pixels, more than are sampled
    sampled, exact = (run(raw, tmp_path / str(flag), exact=flag, **options) for flag in (False, True))
    images = torch.tensor(run(raw, tmp_path / "plain", folds=3, size=160).images[:8]).permute(0, 3, 1, 2)
    expected, _ = normalise_stain(images, dataclasses.replace(PUBLISHED_MACENKO, max_pixels=None))
    assert np.array_equal(exact.images[:8], expected.permute(0, 2, 3, 1).numpy())
    assert not np.array_equal(exact.images, sampled.images)
    assert exact.card["fingerprint"] != sampled.card["fingerprint"]
    assert StainReference.from_json(exact.card["stain"]).max_pixels is None  # what predict and explain will do
    assert "max_pixels" not in sampled.card["stain"]
    with pytest.raises(UserError, match="another --exact"):
        run(raw, tmp_path / "True", resume=True, **options)
    with pytest.raises(UsageError, match="no --stain"):
        run(raw, tmp_path / "none", exact=True)


def test_stain_normalisation_draws_slides_together(raw: Path, tmp_path: Path, prepared: Path) -> None:
    def spread(data: PreparedData) -> float:
        means = np.array([image.mean(axis=(0, 1)) for image in data.images], dtype=float)
        return float(means.std(axis=0).mean())

    stained = run(raw, tmp_path / "out", stain="macenko")
    assert spread(stained) < 0.8 * spread(PreparedData.open(prepared))


def test_folds_take_a_published_reference_or_a_file(raw: Path, tmp_path: Path) -> None:
    card = run(raw, tmp_path / "one", stain="macenko", folds=3).card
    assert card["stain"]["source"] == "published"
    with pytest.raises(UserError, match="--stain reinhard with --folds.*--stain-reference"):
        run(raw, tmp_path / "two", stain="reinhard", folds=3)
    file = any_image(raw)
    card = run(raw, tmp_path / "three", stain="reinhard", folds=3, stain_reference=str(file)).card
    assert card["stain"]["source"] == file.name
    with pytest.raises(UserError, match="no such file"):
        run(raw, tmp_path / "four", stain="macenko", stain_reference=str(tmp_path / "none.png"))


def test_hand_edited_or_truncated_folders_are_refused(prepared: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(prepared, tmp_path / "edited"))
    text = (own / "manifest.csv").read_text()
    (own / "manifest.csv").write_text(text.replace(",test,", ",train,", 1))
    with pytest.raises(UserError, match="was changed after prepare"):
        PreparedData.open(own)
    own = Path(shutil.copytree(prepared, tmp_path / "short"))
    os.truncate(own / "images.npy", 5000)
    with pytest.raises(UserError, match="missing or truncated"):
        PreparedData.open(own)
    with pytest.raises(UserError, match="is not a prepared folder"):
        PreparedData.open(tmp_path)


def test_resume_after_sigkill_gives_the_same_folder(raw: Path, tmp_path: Path, prepared: Path) -> None:
    """Decoding is slowed down by a wrapper so that the kill falls in the middle."""
    out = tmp_path / "out"
    code = (
        "import time, breastcli.data.images as images\n"
        "fast = images.decode\n"
        "def slow(*args, **options):\n    time.sleep(0.05)\n    return fast(*args, **options)\n"
        "images.decode = slow\n"
        "from breastcli.config import PrepareConfig\nfrom breastcli.prepare import prepare\n"
        f"prepare(PrepareConfig(raw={str(raw)!r}, out={str(out)!r}, size=32, workers=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    journal = out / ".partial" / "decoded.csv"
    for _ in range(600):
        time.sleep(0.05)
        if journal.is_file() and len(journal.read_text().splitlines()) > 20:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(journal.read_text().splitlines()) - 1
    assert 20 <= done < 96
    with pytest.raises(UserError, match=r"unfinished.*--resume"):
        PreparedData.open(out)
    with pytest.raises(UserError, match="not empty.*--resume"):
        run(raw, out)
    with pytest.raises(UserError, match="another size of images: use another --out, or --overwrite"):
        run(raw, out, resume=True, size=48)
    with pytest.raises(UserError, match="begun for another choice of images:"):
        run(raw, out, resume=True, mag="100x")
    run(raw, out, resume=True)
    assert not (out / ".partial").exists()
    for name in ("images.npy", "manifest.csv", "dataset.json"):
        assert (out / name).read_bytes() == (prepared / name).read_bytes(), name


def test_resume_survives_a_journal_cut_in_the_middle_of_a_line(raw: Path, tmp_path: Path, prepared: Path) -> None:
    records = DATASETS.get("sample").scan(raw).records
    partial = tmp_path / "out" / ".partial"
    decode_into(partial, records, raw, 32, 2, resume=False, progress=SILENT)
    journal = (partial / "decoded.csv").read_bytes()
    (partial / "decoded.csv").write_bytes(journal[: len(journal) // 2])
    run(raw, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "images.npy").read_bytes() == (prepared / "images.npy").read_bytes()


def test_resume_decodes_again_what_a_power_loss_took_from_the_array(raw: Path, tmp_path: Path, prepared: Path) -> None:
    records = DATASETS.get("sample").scan(raw).records
    partial = tmp_path / "out" / ".partial"
    decode_into(partial, records, raw, 32, 2, resume=False, progress=SILENT)
    os.truncate(partial / "images.npy", (partial / "images.npy").stat().st_size // 2)
    run(raw, tmp_path / "out", resume=True)
    for name in ("images.npy", "manifest.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (prepared / name).read_bytes(), name


def test_a_leak_shows_although_its_file_was_replaced_before_the_resume(
    leaky: Path, raw: Path, tmp_path: Path, prepared: Path
) -> None:
    own = Path(shutil.copytree(leaky, tmp_path / "raw"))
    records = DATASETS.get("sample").scan(own).records
    decode_into(tmp_path / "out" / ".partial", records, own, 32, 2, resume=False, progress=SILENT)
    for record in records:
        shutil.copy(raw / record.path, own / record.path)
    with pytest.raises(UserError, match=r"changed while it was worked on.*--overwrite"):
        run(own, tmp_path / "out", resume=True)
    run(own, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "images.npy").read_bytes() == (prepared / "images.npy").read_bytes()


def test_an_interrupted_overwrite_is_resumed(raw: Path, tmp_path: Path, prepared: Path) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    records = DATASETS.get("sample").scan(raw).records
    decode_into(out / ".partial", records, raw, 48, 2, resume=False, progress=SILENT)
    assert run(raw, out, resume=True, size=48, seed=1).images.shape == (96, 48, 48, 3)
    assert not (out / ".partial").exists()


def test_an_audit_resumes_only_in_a_folder_of_its_own(leaky: Path, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    foreign = {"audit.json": "[1]", "rejected.csv": "mine", "suspicious_pairs.png": "mine too"}
    for name, text in foreign.items():
        (out / name).write_text(text)
    with pytest.raises(UserError, match="is not empty: use --overwrite"):
        prepare(PrepareConfig(raw=str(raw), out=str(out), audit=True, resume=True))
    assert {path.name: path.read_text() for path in out.iterdir()} == foreign
    prepare(PrepareConfig(raw=str(raw), out=str(out), audit=True, overwrite=True))
    assert (out / "suspicious_pairs.png").read_text() == "mine too"
    assert prepare(PrepareConfig(raw=str(leaky), out=str(out), audit=True, resume=True)).failure
    assert Image.open(out / "suspicious_pairs.png").width > 300
    prepare(PrepareConfig(raw=str(raw), out=str(out), audit=True, resume=True))
    assert {path.name for path in out.iterdir()} == {"audit.json", "rejected.csv"}


def test_strict_refuses_a_finished_folder_that_left_files_out(leaky: Path, tmp_path: Path) -> None:
    options = {"drop_duplicates": "keep-first"}
    run(leaky, tmp_path / "whole", strict=True, **options)
    again = run(leaky, tmp_path / "whole", strict=True, resume=True, **options)
    assert len(again.rows) == 95  # a dropped duplicate is no fault
    own = Path(shutil.copytree(leaky, tmp_path / "raw"))
    (own / "BreaKHis_v1" / "odd name.png").touch()
    run(own, tmp_path / "out", **options)
    with pytest.raises(UserError, match=r"--strict: 1 files were rejected: see .*rejected\.csv"):
        run(own, tmp_path / "out", strict=True, resume=True, **options)


def test_images_without_contrast_are_counted_as_not_compared(
    raw: Path, tmp_path: Path, breastcli: Callable[..., Outcome]
) -> None:
    own = Path(shutil.copytree(raw, tmp_path / "raw"))
    Image.new("RGB", (70, 46), (240, 230, 240)).save(any_image(own))
    outcome = breastcli("prepare", own, "--out", "out", "--size", 32)
    assert "none; images not compared: 1" in outcome.stdout
    assert "1 image shows too little contrast to be compared with others" in outcome.stdout
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["num_not_compared"] == 1


def test_names_that_are_no_utf8_are_rejected_and_own_or_hidden_files_passed_over(raw: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(raw, tmp_path / "raw"))
    file = any_image(own)
    (own / ".thumbnails").mkdir()
    shutil.copy(file, own / ".thumbnails" / "small.png")
    try:
        file.rename(os.fsdecode(os.fsencode(file.with_name("caf")) + b"\xe9.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for resume in (False, True):
        out = own / "prepared"
        assert len(run(own, out, resume=resume, overwrite=True).rows) == 95
        (line,) = (out / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
        assert line.endswith("caf\\udce9.png,its name is not UTF-8")
        (out / "manifest.csv").rename(out / "manifest.old")  # the second round decodes again beside its own sheet


def test_resume_of_a_finished_folder_does_nothing_or_refuses(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(raw, out)
    before = (out / "manifest.csv").stat().st_mtime_ns
    run(raw, out, resume=True)
    assert (out / "manifest.csv").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another --seed"):
        run(raw, out, resume=True, seed=9)


def test_a_finished_folder_older_than_options_has_their_defaults(raw: Path, prepared: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(prepared, tmp_path / "own"))
    card = json.loads((own / "dataset.json").read_text())
    del card["options"]["classes"], card["options"]["drop_duplicates"]
    (own / "dataset.json").write_text(json.dumps(card))
    assert len(run(raw, own, resume=True).rows) == 96
    with pytest.raises(UserError, match="another --classes"):
        run(raw, own, resume=True, classes="adenosis")
    with pytest.raises(UserError, match="another --drop-duplicates"):
        run(raw, own, resume=True, drop_duplicates="keep-first")


def test_two_breakhis_subtypes_keep_their_order(raw: Path, tmp_path: Path) -> None:
    """Alphabetical order would call the benign one of these two positive."""
    kept = {"task": "subtype", "group_by": "image", "classes": "ductal_carcinoma,fibroadenoma"}
    assert run(raw, tmp_path / "two", **kept).classes == ("fibroadenoma", "ductal_carcinoma")
    eight = run(raw, tmp_path / "eight", task="subtype", group_by="image").classes
    assert eight == tuple(sorted(eight))


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_decoded(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(raw, out)
    with pytest.raises(UserError, match="class"):
        run(raw, out, overwrite=True, task="subtype", folds=9)
    assert len(PreparedData.open(out).rows) == 96
    assert json.loads((out / "audit.json").read_text())["verdict"] == "clean"


def test_the_sample_is_drawn_where_it_is_not_there_yet(tmp_path: Path) -> None:
    prepare(PrepareConfig(dataset="sample", out=str(tmp_path / "data"), size=32, draw=64))
    data = PreparedData.open(tmp_path / "data")
    assert len(data.rows) == 64
    assert (tmp_path / "data-raw" / "sample.json").is_file()
    assert any("not real tissue" in note for note in data.card["notes"])


def test_raw_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the raw data set"):
        prepare(PrepareConfig(out=str(tmp_path / "out")))


@pytest.mark.real
def test_real_images_with_macenko(real_data: Path, tmp_path: Path) -> None:
    data = run(real_data / "breakhis_original", tmp_path / "out", stain="macenko", size=64)
    assert len(data.rows) == 111
    assert "111 of 7,909 images of BreakHis" in data.card["notes"]
    assert "slide 13412 is filed under ductal_carcinoma and lobular_carcinoma" in data.card["notes"]
    sides = defaultdict(set)
    for row in data.rows:
        sides[row.record.exam].add(row.split)
    assert all(len(found) == 1 for found in sides.values())
    assert 0 < data.images.mean() < 255


@pytest.mark.real
def test_real_audit_names_the_exams_that_slides_share(real_data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    found = prepare(PrepareConfig(raw=str(real_data / "breakhis_original"), out=out, group_by="patient", audit=True))
    assert found.audit.shared_exams == {
        "18842": ["18842", "18842D"],
        "21998": ["21998AB", "21998CD"],
        "22549": ["22549AB", "22549CD", "22549G"],
        "29960": ["29960AB", "29960CD"],
    }
    assert found.audit.crossing["exam"]
    assert set(found.audit.crossing["exam"]) <= set(found.audit.shared_exams)
    assert list(found.audit.groups_with_two_labels["patient"]) == ["13412"]
    assert found.audit.near_duplicates == []


@pytest.mark.real
def test_real_eight_class_split_by_exam_is_refused(real_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"class \w+ has [12] exam.*--task binary"):
        run(real_data / "breakhis_original", tmp_path / "out", task="subtype")
