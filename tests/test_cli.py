"""Tests of the command line from a user's side."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from mnclglf.cli import main, parse
from mnclglf.commands import Knn, Linear, Logistic, Train
from mnclglf.config import KnnConfig, LinearConfig, LogisticConfig, from_dict, to_dict, with_whole_paths
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageArray
from mnclglf.data.splits import split_train
from mnclglf.data.views import whole_views
from mnclglf.recipes import VIEWS, paper, quick, tuned
from mnclglf.reports.page import Picture
from mnclglf.runs.files import REMEDIES
from mnclglf.training.loop import Trainer
from mnclglf.training.start import build_method, load_trained

TINY = (
    "train --dataset digits --recipe quick --image-size 8 --train-images 320 --width 2 --projector-width 16 "
    "--predictor-width 8 --queue-size 80 --epochs 2 --batch-size 64 --device cpu --validation-images 64 "
    "--precision fp32 --seed 1"
)

C = TypeVar("C")


def parse_as(kind: type[C], arguments: Sequence[str]) -> C:
    """Returns the command that the arguments ask for, which must be of this kind."""
    command = parse(arguments)
    assert isinstance(command, kind)
    return command


def refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the output of a wrong command line, which must exit with 2."""
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(arguments))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


def test_options_start_from_the_recipe() -> None:
    command = parse(shlex.split("train --recipe quick --dataset mnist5k --lr 0.5 --lambda 2 --crop-scale 0.3 0.9"))
    assert isinstance(command, Train)
    expected = quick("mnclglf", "mnist5k")
    assert command.config.model == expected.model
    assert (command.config.optim.lr, command.config.objective.lambda_) == (0.5, 2.0)
    assert command.config.view.crop_scale == (0.3, 0.9)
    assert command.config.view.rotation_degrees == expected.view.rotation_degrees


@pytest.mark.parametrize("arguments", ["--dataset=cifar10 --recipe=paper", "--recipe paper --dataset cifar10", ""])
def test_the_paper_recipe_on_cifar10_is_the_default(arguments: str) -> None:
    assert parse_as(Train, ["train", *shlex.split(arguments)]).config == paper("mnclglf", "cifar10")


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("train --recipe quick --dataset fashion_mnist --seed 7 --print-config")) == 0
    config = from_dict(json.loads(capsys.readouterr().out))
    assert (config.recipe, config.dataset, config.seed) == ("quick", "fashion_mnist", 7)


def test_print_config_of_a_tuned_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("train --recipe tuned --method simsiam --dataset cifar10 --print-config")) == 0
    assert from_dict(json.loads(capsys.readouterr().out)) == tuned("simsiam", "cifar10")


def test_tuned_elsewhere_is_refused_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("train --recipe tuned --dataset mnist5k")) == 2
    assert "tuned is for cifar10, cifar100, tinyimagenet, not 'mnist5k'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train --lambada 3", "Unrecognized options: --lambada"),
        ("train --recipe qick", "invalid choice 'qick' for argument '--recipe'"),
        ("train --dataset mnist", "dataset 'mnist' is none of"),
        ("train --k 5", "k 5 must be 1, 2, 3 or 4"),
        ("train --image-size 31", "image_size 31 must be even"),
        ("train --epochs 10 --keep-every 50", "keep_every 50 is more than the run's 10 epochs"),
        ("train --lr fast", "fast"),
        ("train --save-every inf", "save_every inf must be a finite number"),
        ("train --crop-ratio 0.5 inf", "crop_ratio (0.5, inf) must be a finite number"),
        ("train --warmup-epochs nan", "warmup_epochs nan must be a finite number"),
        ("train --epochs 99999999999", "epochs 99999999999 must be a whole number, at most 4294967295"),
        ("knn", "no run directory is named; give one or more"),
        ("linear runs/x --fast", "Unrecognized options: --fast"),
        ("logistic runs/x --epochs 9", "--epochs (applied to mnclglf logistic)"),
        ("knn runs/x --k 0", "neighbors 0 must be at least 1"),
        ("knn runs/x --vote-temperature 0", "vote_temperature 0.0 must be positive and finite, as in 0.07"),
        ("linear runs/x --label-share 0", "label_share 0.0 must lie in (0, 1], as in 0.1"),
        ("linear runs/x --milestones --checkpoint x.pt", "checkpoint x.pt names one; give either"),
        ("dance", "Available subcommands: train, knn, linear, logistic"),
    ],
)
def test_wrong_usage_is_named_with_a_remedy(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("knn nowhere", "nowhere/config.json does not exist"),
        ("linear nowhere", "nowhere/config.json does not exist"),
        ("report nowhere", "nowhere"),
        ("train --dataset cifar10 --data-dir nowhere", "CIFAR-10's files are missing"),
        (f"{TINY} --resume missing.pt", "missing.pt is no file; --resume takes auto, never or"),
        (f"{TINY} --kernels require", "backend 'triton' needs CUDA tensors"),
    ],
)
def test_an_error_is_one_line_without_a_traceback(
    arguments: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mnclglf_kernels.backend.INTERPRETED", False)
    assert main(shlex.split(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("mnclglf: ")
    assert named in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train --queue-size 100 --data-dir nowhere", "batch_size 256 is more than queue_size 100"),
        ("train --optimizer adam", "optimizer 'adam' is none of sgd, lars"),
        ("train --recipe tuned --dataset digits", "recipe tuned is for cifar10"),
        ("reproduce table3 --seeds 0", "seeds 0 must be at least 1"),
        ("reproduce table3 --scale small --dataset cifar10", "dataset cifar10 was given, but"),
        ("reproduce table6 --only x", "only 'x' is no run of table6"),
        ("train --method simclr --constant-predictor-lr --data-dir nowhere", "SimCLR has no predictor; leave"),
        (
            "train --device cpu --graphs on --data-dir nowhere",
            "graphs on asks for CUDA graphs, and this run is on the CPU",
        ),
        (f"{TINY} --train-images 40", "40 training images, fewer than one batch of 64"),
        (f"{TINY} --train-images 4000000", "train_images"),
        (f"{TINY} --blur-kernel 99 --blur-probability 0.5", "blur_kernel 99 is too wide"),
        (
            "train --dataset digits --recipe quick --method supervised --classes 3 --device cpu",
            "classes 3 are fewer than the 10",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other_are_wrong_usage(
    arguments: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("mnclglf: ")
    assert named in error
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("knn", "no run directory is named"),
        ("knn runs/x --k 0", "neighbors 0 must be"),
        ("knn runs/x --k five", "--k/--neighbors: 'five' is no whole number"),
        ("linear runs/x --lr 0", "lr 0.0 must be"),
        ("logistic runs/x --checkpoint", "--checkpoint"),
        ("report", "no run directory is named"),
        ("report runs/x --out y.html", "--out y.html is for several runs"),
        ("train --epochs 2.5", "--epochs: '2.5' is no whole number"),
        ("train --lr fast", "--lr: 'fast' is no number"),
        ("train --keep-every x", "--keep-every: 'x' is no whole number, and not None"),
        ("train --hue 7", "hue 7.0 must"),
        ("train --dataset", "--dataset"),
        ("data", "inspect, views"),
        ("data views digits --side 9", "side 9 must"),
        ("reproduce", "Table of the paper"),
        ("reproduce table9", "'table9'"),
    ],
)
def test_wrong_usage_shows_no_name_of_a_class(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = refused(arguments, capsys)
    assert named in shown
    assert not re.search(r"tyro|dummy|NoneType|\{None\}|config|Error parsing [A-Z]|<class", shown)


@pytest.mark.parametrize("command", ["train", "knn", "linear", "logistic", "data inspect", "data views", "reproduce"])
def test_the_help_breaks_lines_only_where_they_are_full(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert not re.search(r"\{None\}|─ config|config\.|never: start", text)
    lines = [line[1:-1] for line in text.splitlines() if line.startswith("│")]
    starts = [len(re.match(r" *", line)[0]) for line in lines]  # pyright: ignore[reportOptionalSubscript]
    for index, line in enumerate(lines[:-1]):
        following = lines[index + 1]
        if starts[index + 1] < 20 or starts[index] == 1:  # an option, or what it is called
            continue
        assert len(line.rstrip()) + 1 + len(following.split()[0]) > 77, f"{line!r} breaks before {following!r}"


def test_options_without_effect_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Train, "execute", lambda *_: 0)
    arguments = "train --dataset digits --recipe quick --method byol --lambda=99 --no-one-embedding --k 2 --epochs 3"
    assert main(shlex.split(arguments)) == 0
    named = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(named) == ["--k", "--lambda", "--no-one-embedding"]
    assert main(shlex.split(arguments.replace("byol", "mnclglf"))) == 0
    assert capsys.readouterr().err == ""


def test_commands_know_their_settings() -> None:
    knn = parse(shlex.split("knn runs/x --k 5 --vote-temperature 0.1 --split validation"))
    settings = KnnConfig(neighbors=5, vote_temperature=0.1, split="validation")
    assert knn == Knn(runs=(Path("runs/x"),), config=settings)
    assert parse(shlex.split("knn runs/x --neighbors 5 --vote-temperature 0.1 --split validation")) == knn
    logistic = parse(shlex.split("logistic runs/x --label-share 0.1"))
    assert logistic == Logistic(runs=(Path("runs/x"),), config=LogisticConfig(label_share=0.1))
    both = parse(shlex.split("linear a b --label-share 0.1 --epochs 9 --lr 0.4 --batch-size 32 --untrained"))
    settings = LinearConfig(label_share=0.1, epochs=9, lr=0.4, batch_size=32, untrained=True)
    assert both == Linear(runs=(Path("a"), Path("b")), config=settings)


def test_the_papers_linear_evaluation_is_the_default() -> None:
    config = parse_as(Linear, ["linear", "runs/x"]).config
    assert (config.epochs, config.batch_size, config.lr) == (90, 256, 0.8)  # section 4.1
    assert (config.label_share, config.split, config.milestones) == (1.0, "test", False)


def text_of(run: Path) -> str:
    return (run / "evaluation.json").read_text()


def nearest_one(encoder: torch.nn.Module | None) -> float:
    """Returns scikit-learn's nearest-neighbor accuracy (cosine) on test digits; None is TINY's untrained encoder."""
    config = parse_as(Train, shlex.split(TINY)).config
    encoder = (encoder or build_method(config, torch.float32).encoder).eval()
    train, test = load_dataset("digits")
    train, _ = split_train(train, config.data)
    assert isinstance(train, ImageArray)
    assert isinstance(test, ImageArray)
    mean, std = train.statistics()
    with torch.no_grad():
        features = [encoder(whole_views(s.images, 8, mean, std, torch.float32)).numpy() for s in (train, test)]
    nearest = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(features[0], train.labels)
    return float(nearest.score(features[1], test.labels))


def test_train_evaluate_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*shlex.split(TINY), "--out", str(out)]) == 0
    assert f"report: {out}/report.html" in capsys.readouterr().out
    for command in ("knn {} --split validation", "logistic {}", "knn {}"):
        assert main(shlex.split(command.format(out))) == 0
    results = json.loads(text_of(out))["results"]
    keys = {(result["protocol"], result["representation"], result["split"]) for result in results}
    assert keys == {
        (protocol, representation, split)
        for protocol, split in [
            ("knn", "validation"),
            ("knn", "test"),
            ("logistic", "test"),
            ("logistic_10_labels", "test"),
        ]
        for representation in ("pretrained", "untrained", "raw pixels")
    }
    assert {result["settings"]["step"] for result in results} == {10}
    _, method, _ = load_trained(out)
    trained = {name: nearest_one(encoder) for name, encoder in (("pretrained", method.encoder), ("untrained", None))}
    assert trained["pretrained"] != trained["untrained"]  # or the next line could not tell them apart
    assert main(shlex.split(f"knn {out} --k 1")) == 0
    found = {(r["representation"], r["split"], r["protocol"]): r["top1"] for r in json.loads(text_of(out))["results"]}
    for name, expected in trained.items():
        assert found[name, "test", "knn"] == pytest.approx(expected)
    page = (out / "report.html").read_text()
    assert "raw pixels" in page
    assert "untrained" in page


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the pictures of reports, which take seconds per page."""
    monkeypatch.setattr("mnclglf.reports.page._picture", lambda _: Picture("", ""))


def copied(run: Path, name: str, section: str | None, **changes: object) -> Path:
    """Copies the run to another name, with changed settings in its config.json."""
    copy = Path(shutil.copytree(run, run.with_name(name)))
    config = json.loads((run / "config.json").read_text())
    (config if section is None else config[section]).update(changes)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.usefixtures("no_pictures")
def test_several_runs_are_compared_and_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]
    for seed, run in enumerate(runs):
        assert (
            main([*shlex.split(TINY.replace("--epochs 2", "--epochs 1")), "--seed", str(seed), "--out", str(run)]) == 0
        )
    capsys.readouterr()
    assert main(["linear", *map(str, runs), "--epochs", "3", "--lr", "20", "--batch-size", "64"]) == 0
    printed = capsys.readouterr().out
    top1, other = (result["top1"] for run in runs for result in json.loads(text_of(run))["results"])
    assert top1 != other  # or the next lines could not tell them apart
    rows = [line for line in printed.splitlines() if line.startswith("| Linear evaluation, all labels (")]
    assert len(rows) == 3
    assert f"| **{100 * top1:.1f}** / " in rows[0]
    assert f"| **{100 * other:.1f}** / " in rows[1]
    middle, deviation = (top1 + other) / 2, abs(top1 - other) / 2**0.5  # n - 1 in the denominator
    assert f"| **{100 * middle:.1f} ± {100 * deviation:.1f}** / " in rows[2]
    assert "(2 runs, LARS, 3 epochs, batches of 64" in rows[2]
    for run in runs:
        assert f"report: {run}/report.html" in printed


def test_runs_that_cannot_be_averaged_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.json").write_text(json.dumps(to_dict(quick("mnclglf", "digits"))))
    assert main(["knn", str(first), f"{first}/../first"]) == 2
    assert "one run is named twice; name each once" in capsys.readouterr().err
    other = copied(first, "other", "optim", lr=0.2)
    assert main(["knn", str(first), str(other)]) == 2
    error = capsys.readouterr().err
    assert f"{other} differs from {first} in more than its seed (optim.lr: 0.1 -> 0.2)" in error
    third = copied(first, "third", None, seed=1)
    assert main(["linear", str(first), str(third), "--checkpoint", "x.pt"]) == 2
    assert "checkpoint x.pt is of one run, and 2 are named; give --milestones to" in capsys.readouterr().err


def test_runs_at_different_steps_are_not_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated: list[Path] = []
    monkeypatch.setattr("mnclglf.evaluation.run.evaluate_run", lambda run, *_, **__: evaluated.append(run) or [])
    monkeypatch.setattr("mnclglf.reports.page.write_report", lambda run: run)
    runs = [tmp_path / name for name in "abc"]
    for seed, (run, step) in enumerate(zip(runs, (12, 12, 7), strict=True)):
        (run / "checkpoints").mkdir(parents=True)
        config = replace(quick("mnclglf", "digits"), seed=seed)
        (run / "config.json").write_text(json.dumps(to_dict(config)))
        for saved in (3, step):
            (run / "checkpoints" / f"step-{saved:08d}.pt").touch()
    assert main(["knn", *map(str, runs)]) == 2
    steps = f"{runs[0]} 12, {runs[1]} 12, {runs[2]} 7"
    assert f"the newest checkpoints are of different steps ({steps}): train each run to its end" in (
        capsys.readouterr().err
    )
    assert evaluated == []
    assert main(["knn", *map(str, runs), "--milestones"]) == 0
    assert main(["knn", *map(str, runs[:2])]) == 0
    assert evaluated == [*runs, *runs[:2]]


def test_validation_needs_images_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main([*shlex.split(TINY.replace("--validation-images 64", "--epochs 1")), "--out", out]) == 0
    assert main(["knn", out, "--split", "validation"]) == 2
    assert "held no images out; train with --validation-images" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", ["stop[now]", "a[/b]", "two words"])
def test_a_stopped_run_names_its_folder_as_a_shell_takes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def train(run: Trainer) -> int:
        run.checkpoints.mkdir(parents=True)
        run._open()  # pyright: ignore[reportPrivateUsage]
        return 2

    monkeypatch.setattr("mnclglf.training.loop.Trainer.train", train)
    monkeypatch.setattr("mnclglf.training.loop.describe_limits", lambda *_: None)
    monkeypatch.setattr("mnclglf.reports.page.write_report", lambda run: run / "report.html")
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(TINY), "--out", name]) == 130
    printed = capsys.readouterr().out
    found = re.search(r"with --out (.*) resumes", printed)
    assert found is not None
    assert shlex.split(found[1]) == [name]
    assert f"report: {tmp_path / name / 'report.html'}" in printed


def test_an_error_names_a_path_with_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("exp[final]", "a[/b]", ":smile:"):
        assert main(["report", str(tmp_path / name)]) == 1
        assert str(tmp_path / name) in capsys.readouterr().err


@pytest.mark.parametrize("place", ["cli.parse", "commands.Report.check", "commands.Report.execute"])
def test_ctrl_c_before_training_is_no_traceback(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mnclglf.{place}", interrupted)
    assert main(["report", "x"]) == 130


def test_help_does_not_load_torch() -> None:
    code = "import sys, mnclglf.cli as cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


# data


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes two classes of four images each, to train and to validate on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            for number in range(40):
                path = tmp_path / "photos" / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 4, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


def test_data_inspect_says_what_a_source_holds(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "folder:photos"]) == 0
    printed = capsys.readouterr().out
    assert "folder:photos train: 80 images, 9 to 12 (median 10) high, 16 wide" in printed
    assert "2 classes: cats 40, dogs 40" in printed
    assert "folder:photos test: 80 images" in printed
    with Image.open("folder-photos-images.png") as picture:
        assert min(picture.size) > 200
    assert main(["data", "inspect", "digits", "--out", "other.png"]) == 0
    assert "digits train: 1,447 images, 8 high, 8 wide" in capsys.readouterr().out
    assert Path("other.png").exists()


def test_data_views_compares_the_loaders(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("data views digits --view simclr --images 3 --side 10")) == 0
    printed = capsys.readouterr().out
    for pair in ("resident and", "reference and") if find_spec("nvidia.dali") else ("reference and resident",):
        (line,) = [line for line in printed.splitlines() if line.startswith(pair)]
        levels = re.search(r": (\S+) levels", line)
        assert levels is not None
        assert float(levels[1]) < 1
    with Image.open("digits-views.png") as picture:
        assert picture.size[0] > picture.size[1]
    assert main(shlex.split("data views folder:photos --images 2 --side 16")) == 0
    assert "picture: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("data views digits --view fancy", "'fancy' is none of paper, simclr"),
        ("data views digits --images 0", "0 images cannot be shown"),
        ("data views digits --images 1000000", "images 1000000 are too many for a picture; give 100 at most"),
        ("data views digits --side 9", "side 9 must be even"),
        ("data views digits --side 1000000", "side 1000000 must be even and lie in 2..8192"),
        ("data views digits --seed -1", "seed -1 must be 0 or more"),
        ("data inspect mnist", "dataset 'mnist' is none of"),
        ("data inspect digits --out x.jpg", "must end in .png"),
    ],
)
def test_wrong_usage_of_looks_is_named(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("data inspect digits --out nowhere/x.png", "there is no folder nowhere"),
        ("data views digits --side 2", "blur_kernel 5 is too wide for views of side 2"),
        ("data views folder:photos --images 90", "90 images cannot be shown of 80"),
    ],
)
def test_wrong_looks_are_named(arguments: str, named: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(arguments)) == 2
    assert named in capsys.readouterr().err


@pytest.mark.usefixtures("photos")
def test_a_missing_folder_to_look_at_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("data inspect folder:absent")) == 1
    assert "absent is not a folder" in capsys.readouterr().err


def test_a_folder_is_trained_on_and_evaluated(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = TINY.replace("--dataset digits", "--dataset folder:photos").replace("--train-images 320 ", "")
    command = command.replace("--validation-images 64", "--validation-images 10")
    assert main(shlex.split(command)) == 0
    run = Path("runs/mnclglf-folder-photos-quick-seed1")
    assert (run / "report.html").exists()
    assert main(["knn", str(run), "--k", "3"]) == 0
    assert main(["knn", str(run), "--k", "3", "--split", "validation"]) == 0
    shutil.rmtree(photos / "val")
    for path in (photos / "train").rglob("*.png"):
        path.rename(photos / f"{path.parent.name}{path.name}")
    shutil.rmtree(photos / "train")
    capsys.readouterr()
    assert main(["knn", str(run)]) == 1
    assert "photos has no labels to evaluate on; give each class a subfolder" in capsys.readouterr().err
    for path in list(photos.glob("*.png")):
        (photos / path.name[:4]).mkdir(exist_ok=True)
        path.rename(photos / path.name[:4] / path.name)
    assert main(["knn", str(run)]) == 1
    said = "photos has no test images; give the folder subfolders train and val, or evaluate with --split validation on"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_keeps_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it can be evaluated from anywhere; ~ stays, so that no user's name is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/somebody")
    for given, whole in (("a/b", tmp_path / "a/b"), ("~/b", Path("~/b"))):
        command = shlex.split(f"train --dataset folder:{given} --data-dir {given}")
        config = with_whole_paths(parse_as(Train, command).config)
        assert (config.dataset, config.data.data_dir) == (f"folder:{whole}", whole)
    config = parse_as(Train, ["train"]).config
    assert with_whole_paths(config) == config


def test_corrupt_images_end_a_run_before_it_starts(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "train" / "cats" / "3.png").write_bytes(b"half")
    command = TINY.replace("--dataset digits", "--dataset folder:photos").replace("--train-images 320 ", "")
    command = command.replace("--validation-images 64", "--epochs 1")
    assert main(shlex.split(command)) == 1
    assert "photos/train cannot be used: cats/3.png" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main([*shlex.split(command), "--skip-corrupt"]) == 0
    assert "79 images of side 8" in capsys.readouterr().out


def test_the_help_names_every_view(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "views", "--help"])
    words = " ".join(re.findall(r"[\w.:()-]+", capsys.readouterr().out))  # without the frame and its line breaks
    found = re.search(r"Named view: (.*?) \(default", words)
    assert found is not None
    assert set(re.findall(r"[a-z_0-9]+", found[1])) - {"or"} == set(VIEWS)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EBUSY])
def test_an_error_of_the_system_gets_a_remedy_once(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(error: OSError) -> str:
        def fail(*_: object) -> int:
            raise error

        monkeypatch.setattr(Train, "execute", fail)
        assert main(["train", "--recipe", "quick"]) == 1
        return " ".join(capsys.readouterr().err.split())

    problem = f"[Errno {number}] {os.strerror(number)}: 'runs/x/config.json'"
    assert told(OSError(number, os.strerror(number), "runs/x/config.json")) == f"mnclglf: {problem}; {REMEDIES[number]}"
    own = told(OSError(number, f"{os.strerror(number)}: give another --out", "runs/x"))
    assert own == f"mnclglf: [Errno {number}] {os.strerror(number)}: give another --out: 'runs/x'"
