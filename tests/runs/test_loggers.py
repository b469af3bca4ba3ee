"""Tests of the loggers against the real libraries: what was written is read back."""

import shutil
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mnclglf
from mnclglf.config import EngineConfig, RunConfig, UsageError
from mnclglf.runs import loggers
from mnclglf.runs.loggers import Loggers, check_loggers, log_results, open_loggers
from mnclglf.runs.metrics import line_of
from mnclglf.runs.results import Result

pytestmark = pytest.mark.filterwarnings("ignore")  # of wandb, mlflow and what they import

CONFIG = RunConfig(method="simsiam", engine=EngineConfig(loggers=("tensorboard",)))
IMAGES = np.arange(2 * 8 * 24 * 3, dtype=np.uint8).reshape(2, 8, 24, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store of MLflow; making one takes ten seconds."""
    folder = tmp_path_factory.mktemp("store")
    write(folder / "run", ("mlflow",), 0, range(0))
    return folder / "mlflow.db"


SAID: list[str] = []


def never(text: str) -> None:
    """Is no warning; `killed_and_resumed` asserts it, as an error in a logger's thread would not be seen."""
    SAID.append(text)


def write(
    folder: Path, names: tuple[str, ...], start: int | None, steps: range, say: Callable[[str], Any] = never
) -> None:
    """Logs steps as a run does that goes on after `start` steps: its records lie in metrics.jsonl too."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = open_loggers(names, folder, CONFIG, start=start, say=say)
    if start == 0:
        opened.images(0, "views", IMAGES)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            record = {"step": step, "loss": 1 / step, "skipped": None, "broken": float("nan")}
            file.write(line_of(record))
            opened.scalars(step, {name: value for name, value in record.items() if name != "step"})
    opened.close()


def killed_and_resumed(folder: Path, name: str) -> None:
    """Logs 4 steps; goes on from a checkpoint after 2, to 6; then adds an accuracy."""
    write(folder, (name,), 0, range(1, 5))
    write(folder, (name,), 2, range(3, 7))
    result = Result(protocol="knn", representation="raw pixels", top1=0.25, top5=0.5, settings={"k": 20, "step": 6})
    config = RunConfig(method="simsiam", engine=EngineConfig(loggers=(name,)))  # pyright: ignore[reportArgumentType]
    log_results(folder, config, [result], never)
    assert SAID == []


EXPECTED = [(step, 1 / step) for step in range(1, 7)]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed(tmp_path / "é 1", "tensorboard")
    read = EventAccumulator(str(tmp_path / "é 1" / "tensorboard"))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("loss")]
    assert found == [(step, float(np.float32(value))) for step, value in EXPECTED]
    assert [(event.step, event.value) for event in read.Scalars("top1/knn/raw pixels")] == [(6, 0.25)]
    assert set(read.Tags()["scalars"]) == {"loss", "top1/knn/raw pixels"}
    assert [(image.width, image.height) for image in read.Images("views")] == [(2 * 24, 8)]
    plugin = read.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"batch_size" in plugin
    assert b"simsiam" in plugin


def records_of(path: Path) -> Iterator[Any]:
    """Iterates over the records of a .wandb file, a log as LevelDB's: blocks of 32 KiB, each record in parts."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, parts = path.read_bytes(), 7, b""  # after the file's header
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline(tmp_path: Path) -> None:
    folder = tmp_path / "é 1"
    killed_and_resumed(folder, "wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 3  # one per process
    assert len({path.stem for path in files}) == 1  # all of one run
    for path in files:  # another process writes it, and may be a moment behind
        for _ in range(300):
            if any(record.WhichOneof("record_type") == "exit" for record in records_of(path)):
                break
            time.sleep(0.1)
    records = [record for path in files for record in records_of(path)]
    assert {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"} == {
        files[0].stem.removeprefix("run-")
    }
    assert any("simsiam" in item.value_json for record in records for item in record.run.config.update)
    rows = [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row] == EXPECTED
    assert [(int(row["step"]), float(row["top1/knn/raw pixels"])) for row in rows if "top1/knn/raw pixels" in row] == [
        (6, 0.25)
    ]
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2


@pytest.mark.parametrize("name", ["a b", "é #1", "100%41", "what?x=1"])
def test_mlflow_in_sqlite(name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient
    from sqlalchemy.engine import URL

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name / "run"
    folder.mkdir(parents=True)
    shutil.copy(store, folder.parent)
    killed_and_resumed(folder, "mlflow")
    uri = URL.create("sqlite", database=str(tmp_path / name / "mlflow.db")).render_as_string()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("mnclglf")
    assert experiment is not None
    run, made = client.search_runs([experiment.experiment_id])  # newest first
    assert made.data.metrics == {}  # that of the fixture
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert (run.data.params["method"], run.data.params["lr"]) == ("simsiam", "0.1")
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == EXPECTED
    assert run.data.metrics == {"loss": 1 / 6, "top1/knn/raw pixels": 0.25}
    place = client.download_artifacts(run.info.run_id, "views")
    assert len(list(Path(place).glob("*.png"))) == 2
    assert not (tmp_path / "mlruns").exists()


def test_a_run_that_begins_anew_is_another_one(store: Path, tmp_path: Path) -> None:
    shutil.copy(store, tmp_path)
    write(tmp_path / "run", ("mlflow",), 0, range(1, 3))
    first = (tmp_path / "run" / "loggers.json").read_text()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    write(tmp_path / "run", ("mlflow",), 0, range(1, 3))
    assert (tmp_path / "run" / "loggers.json").read_text() != first


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_logger_is_refused_with_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.startswith(f"mnclglf.runs.loggers.{name}")]:
        monkeypatch.delitem(sys.modules, module)
    for module in (name, f"{name}.entities"):  # the second is what is imported of mlflow
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError, match=rf"logger {name} .*pip install 'mnclglf\[{name}\]'"):
        check_loggers([name])
    with pytest.raises(UsageError, match="pip install"):
        mnclglf.train(method="simsiam", dataset="digits", loggers=[name], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_loggers(["auto"])  # TensorBoard if it is there
    said: list[str] = []
    open_loggers(["auto"], tmp_path, CONFIG, start=0, say=said.append).close()
    assert said == []
    assert (tmp_path / "tensorboard").exists() == (name != "tensorboard")


def test_an_unknown_logger_is_named() -> None:
    with pytest.raises(UsageError, match=r"loggers \('wanbd',\) is none of auto, tensorboard, wandb, mlflow"):
        EngineConfig(loggers=("wanbd",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="loggers 'wandb' must be a list"):
        EngineConfig(loggers="wandb")  # pyright: ignore[reportArgumentType]


class Broken:
    """A logger whose disk is full after the first step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.hold = threading.Event()
        self.hold.set()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.hold.wait()
        self.steps.append(step)
        if step > 1:
            raise OSError(28, "No space left on device")

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        pass

    def close(self) -> None:
        raise AssertionError("it is left out by now")


def test_a_logger_that_fails_is_left_out_with_one_warning() -> None:
    said: list[str] = []
    broken = Broken()
    opened = Loggers({"made up": broken}, said.append)
    for step in range(1, 6):
        opened.scalars(step, {"loss": 1.0})
    opened.close()
    assert broken.steps == [1, 2]
    assert len(said) == 1
    assert "made up" in said[0]
    assert "No space left" in said[0]
    assert "goes on" in said[0]


def test_a_logger_that_hangs_holds_up_neither_a_step_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.01)
    said: list[str] = []
    hanging = Broken()
    hanging.hold.clear()
    opened = Loggers({"made up": hanging}, said.append)
    for step in range(1, 4):
        opened.scalars(step, {"loss": 1.0})  # returns, though no step has been written
    assert hanging.steps == []
    opened.close()
    assert len(said) == 1
    assert "did not end" in said[0]
    hanging.hold.set()


def test_a_logger_that_hangs_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 5.0)
    monkeypatch.setattr(loggers, "MOST_WAITING", 3)
    said: list[str] = []
    hanging = Broken()
    hanging.hold.clear()
    opened = Loggers({"made up": hanging}, said.append)
    for _ in range(20):
        opened.scalars(0, {"loss": 1.0})
    assert opened.workers["made up"].calls.qsize() <= 3
    assert said == ["logger made up does not keep up: it gets no more than the 3 calls that wait for it"]
    hanging.hold.set()
    opened.close()
    assert len(hanging.steps) in (3, 4)  # what waited is written


def test_a_store_that_goes_away_during_the_run_is_left_out(store: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run").mkdir()
    shutil.copy(store, tmp_path)
    opened = open_loggers(["mlflow"], tmp_path / "run", CONFIG, start=0, say=said.append)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE metrics")
    for step in (1, 2):
        opened.scalars(step, {"loss": 1.0})
    opened.close()
    assert len(said) == 1
    assert "mlflow failed" in said[0]


def test_a_logger_that_cannot_be_opened_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where the folder belongs")
    with pytest.raises(UsageError, match=r"tensorboard cannot be opened .*--loggers"):
        open_loggers(["tensorboard"], tmp_path / "run", CONFIG, start=0, say=never)
    said: list[str] = []
    open_loggers(["auto"], tmp_path / "run", CONFIG, start=0, say=said.append).close()
    log_results(tmp_path / "run", CONFIG, [Result(protocol="knn", representation="x", top1=0, top5=0)], said.append)
    assert len(said) == 2
