"""The tenth method of docs/howto/add-a-method.md: put where the page says, held against its equations, trained."""

import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console

from mnclglf import recipes
from mnclglf.config import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from mnclglf.methods import METHODS, Method
from mnclglf.runs.checkpoint import list_checkpoints, load_checkpoint
from mnclglf.runs.metrics import read_records
from mnclglf.training.loop import Trainer
from mnclglf.training.start import build_method

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "add-a-method.md"
METHOD_FILE, RECIPE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
MODEL = ModelConfig(width=2, projector_width=6)


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    path = tmp_path / "barlow_twins.py"
    path.write_text(METHOD_FILE)
    spec = importlib.util.spec_from_file_location("barlow_twins", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_loss_is_the_equations(module: ModuleType) -> None:
    method: Method = module.BarlowTwins(MODEL, ObjectiveConfig()).double().train()
    views = [torch.randn(5, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    losses = method(views)
    z1, z2 = (method.projector(method.encoder(view)).detach().numpy() for view in views)
    width = MODEL.projector_width
    correlation = np.corrcoef(z1, z2, rowvar=False)[:width, width:]
    invariance = sum((1 - correlation[i, i]) ** 2 for i in range(width))
    redundancy = sum(correlation[i, j] ** 2 for i in range(width) for j in range(width) if i != j)
    # The loss is summed in fp32: 36 terms below 4, of 2^-24 each.
    assert losses.terms["loss_invariance"].item() == pytest.approx(invariance, rel=1e-5)
    assert losses.terms["loss_redundancy"].item() == pytest.approx(redundancy, rel=1e-5)
    assert losses.total.item() == pytest.approx(invariance + 0.005 * redundancy, rel=1e-5)


def test_it_trains_as_any_other(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(METHODS, "barlow_twins", module.BarlowTwins)
    config = RunConfig(
        method="barlow_twins",
        dataset="digits",
        data=DataConfig(image_size=8, train_images=16, loader="reference", loader_threads=1),
        model=MODEL,
        optim=OptimConfig(epochs=1, batch_size=8),
        engine=EngineConfig(device="cpu", log_every=1),
    )
    out = tmp_path / "run"
    assert Trainer(config, out, console=Console(file=io.StringIO())).train() is None
    first, second = read_records(out / "metrics.jsonl")[0]
    for record in (first, second):
        expected = record["loss_invariance"] + 0.005 * record["loss_redundancy"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    ((step, path),) = list_checkpoints(out / "checkpoints")
    assert step == 2
    trained, untrained = load_checkpoint(path)["method"], build_method(config, torch.float32).state_dict()
    assert all(not torch.equal(trained[name], untrained[name]) for name in trained)


def test_its_recipe_is_one_of_the_table_s(monkeypatch: pytest.MonkeyPatch) -> None:
    (settings,) = eval(f"{{{RECIPE}}}", vars(recipes)).values()
    monkeypatch.setitem(recipes.TUNED, "barlow_twins", settings)
    config = recipes.tuned("barlow_twins", "cifar100")
    assert (config.method, config.dataset, config.recipe) == ("barlow_twins", "cifar100", "tuned")
    assert (config.optim.batch_size, config.optim.lr) == (512, 0.24)
