"""mnclglf data inspect on folders of mixed files: what is counted, and the estimate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnclglf.cli import main
from mnclglf.data.sources import examination, folder
from mnclglf.recipes import paper
from mnclglf.training.memory import RESERVED, step_memory
from tests.helpers.image_folder import pixels


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, with a blank and brackets in its name, of one image of each kind, one of them cut."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "my photos [2026]"
    root.mkdir()
    square, long, high = (Image.fromarray(pixels(*size)) for size in ((40, 40), (32, 96), (300, 200)))
    square.save(root / "color.jpg")
    square.convert("L").save(root / "gray.png")
    long.convert("RGBA").save(root / "clear.png")
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(root / "deep.tif")
    square.convert("CMYK").save(root / "print.tif")
    first, second = Image.fromarray(pixels(seed=1)), Image.fromarray(pixels(seed=2))
    first.save(root / "moving.gif", save_all=True, append_images=[second])
    exif = Image.Exif()
    exif[0x0112] = 6
    high.save(root / "turned.jpg", exif=exif)  # upright it is 200 high and 300 wide
    (root / "cut.jpg").write_bytes((root / "color.jpg").read_bytes()[:300])
    return root


def test_a_mixed_folder_is_counted(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", f"folder:{photos}"]) == 1  # one cannot be used, and training would refuse it
    printed = capsys.readouterr().out
    for line in (
        "7 images, 12 to 200 (median 40) high, 15 to 300 (median 40) wide",
        "formats: JPEG 2, PNG 2, TIFF 2, GIF 1",
        "gray 2,",
        "CMYK 1",
        "bits per channel: 8 6, 16 1",
        "with transparency, which is dropped: 1; of several pages or frames, of which the first is read: 1; turned by "
        "EXIF: 1",
        "shorter side in pixels: below 64 6, from 128 1",
        "square (below 1.25) 4, wide (below 2) 2, very wide (from 2) 1",
        "cannot be used: 1 of 8: cut.jpg cannot be read",
        "--skip-corrupt",
    ):
        assert line in printed, line
    assert main(["data", "inspect", f"folder:{photos}", "--skip-corrupt"]) == 0
    (photos / "cut.jpg").unlink()
    assert main(["data", "inspect", f"folder:{photos}"]) == 0
    assert "cannot be used" not in capsys.readouterr().out.split("color.jpg")[-1].split("picture")[-1]


def test_the_estimate_fits_the_card(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(60):
        Image.new("RGB", (240, 230), (number, 0, 0)).save(photos / f"{number}.png")
    main(["data", "inspect", f"folder:{photos}", "--method", "simsiam"])
    printed = capsys.readouterr().out
    assert "--image-size 224 --stem imagenet --batch-size 64" in printed  # 67 images have no larger batch of eights
    assert "computed and not measured" in printed
    fits = int(printed.partition("the largest batch is about ")[2].split()[0].replace(",", ""))
    config = paper("simsiam", f"folder:{photos}")
    card = 23.5 * 2**30 - RESERVED
    assert step_memory(config, fits, 224, torch.bfloat16).total <= card
    assert step_memory(config, fits + 24, 224, torch.bfloat16).total > card  # 2%, as a multiple of 8 was taken


def test_an_examination_that_is_interrupted_keeps_what_it_found(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cut.jpg").unlink()
    read, reads = folder.read_file, list[str]()

    def stops(path: Path) -> bytes:
        reads.append(path.name)
        if len(reads) == 6:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(examination, "_PART", 2)
    monkeypatch.setattr(examination, "_KEPT_SECONDS", -1.0)
    monkeypatch.setattr(folder, "read_file", stops)
    assert main(["data", "inspect", f"folder:{photos}"]) == 130
    reads.clear()
    monkeypatch.setattr(folder, "read_file", lambda path: (reads.append(path.name), read(path))[1])
    assert main(["data", "inspect", f"folder:{photos}"]) == 0
    assert len(reads) == 7 - 4  # two parts of two were whole
    reads.clear()
    assert main(["data", "inspect", f"folder:{photos}"]) == 0
    assert reads == []
