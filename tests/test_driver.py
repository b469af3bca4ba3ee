"""Tests of the look for a GPU and its driver, on made-up answers of nvidia-smi."""

import pytest

from mnclglf import driver
from mnclglf.driver import Gpu


@pytest.mark.parametrize(
    ("returncode", "output", "gpu"),
    [
        (0, "NVIDIA GeForce RTX 3090, 580.65.06\n", Gpu("NVIDIA GeForce RTX 3090", "580.65.06")),
        (0, "\nNVIDIA A, B, 535.54\nNVIDIA A, B, 535.54\n", Gpu("NVIDIA A, B", "535.54")),
        (9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", None),
        (6, "No devices were found\n", None),
        (0, "", None),
        (0, "NVIDIA GeForce RTX 3090, [N/A]\n", None),
        (0, "580.65.06\n", None),
    ],
)
def test_parse_nvidia_smi(returncode, output, gpu):
    found, problem = driver.parse_nvidia_smi(returncode, output)
    assert found == gpu
    assert (problem is None) == (gpu is not None)
    if returncode:
        assert problem is not None
        assert str(returncode) in problem
        assert output.strip() in problem


@pytest.mark.parametrize(
    ("script", "found"),
    [("echo 'NVIDIA H100, 580.65.06'", True), ("echo 'Driver/library version mismatch'; exit 18", False)],
)
def test_asks_the_nvidia_smi_on_the_path(tmp_path, monkeypatch, script, found):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu, problem = driver.look_for_gpu()
    assert gpu == (Gpu("NVIDIA H100", "580.65.06") if found else None)
    assert found or "exit code 18): Driver/library version mismatch" in (problem or "")


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de", "0x030000", True),
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),
        ("0x8086", "0x030000", False),
    ],
)
def test_nvidia_card_without_a_driver_is_seen(tmp_path, vendor, kind, found):
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")
    (tmp_path / "0000:02:00.0").mkdir()
    assert driver.has_nvidia_display(tmp_path) is found


@pytest.mark.parametrize("returncode", [0, 14])
@pytest.mark.parametrize(
    "output",
    [
        "ERROR: ld.so: object 'libx.so' from LD_PRELOAD cannot be preloaded: ignored.\nNVIDIA A100, 580.65.06\n",
        "WARNING: infoROM is corrupted at gpu 0000:01:00.0\n\nNVIDIA A100, 580.65.06\n",
        "NVIDIA A100, 580.65.06\nWARNING: infoROM is corrupted at gpu 0000:01:00.0\n",
    ],
)
def test_a_notice_around_the_answer_of_nvidia_smi_is_passed_over(returncode, output):
    assert driver.parse_nvidia_smi(returncode, output) == (Gpu("NVIDIA A100", "580.65.06"), None)


def test_exit_code_14_without_an_answer_is_a_failure():
    found, problem = driver.parse_nvidia_smi(14, "WARNING: infoROM is corrupted\n")
    assert found is None
    assert problem is not None
    assert "exit code 14" in problem
