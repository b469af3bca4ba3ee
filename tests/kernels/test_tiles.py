"""Tests of the launch configurations, and of the tuning file that overrides them."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from mnclglf.runs.files import cache_folder
from mnclglf_kernels import contrastive_loss, tune
from mnclglf_kernels._triton import launch, tiles
from mnclglf_kernels._triton.tiles import ARCHITECTURES, TABLE, WIDTHS, Tile, Tuning, tile
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import Sizes


@pytest.fixture(autouse=True)
def tuning(tmp_path, monkeypatch):
    """Returns the path of this test's own tuning file, which does not exist yet."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("MNCLGLF_TUNING", str(path))
    return path


def test_every_operator_has_a_tile_for_every_dtype_width_and_architecture():
    for operator, dtype, width, arch in itertools.product(
        {family for family, _ in TABLE},
        (torch.float32, torch.float16, torch.bfloat16),
        (1, *WIDTHS, 10**6),
        ARCHITECTURES,
    ):
        assert isinstance(tile(operator, dtype, width, arch), Tile)
    assert all(set(entry) == set(ARCHITECTURES) for entries in TABLE.values() for entry in entries)


@pytest.mark.parametrize(("arch", "known"), [(87, 86), (103, 90), (120, 90), (75, 80)])
def test_an_unknown_architecture_takes_the_nearest_one_below(arch, known):
    assert tile("neighbor", torch.bfloat16, 2048, arch) == tile("neighbor", torch.bfloat16, 2048, known)


def test_the_tuning_file_overrules_the_table_for_its_gpu(tuning):
    mine = Tile(64, 64, 64, 8, 2)
    tiles.write_tuning(tuning, {tiles.key("neighbor", torch.bfloat16, 2048, 86): mine})
    assert tile("neighbor", torch.float16, 1024, 86) == mine  # the same bucket
    for other in (("neighbor", torch.float32, 2048, 86), ("gradient", torch.float16, 2048, 86)):
        assert tile(*other) != mine
    for width, arch in ((512, 86), (2048, 80)):
        assert tile("neighbor", torch.bfloat16, width, arch) != mine
    assert [path.name for path in tuning.parent.iterdir()] == ["tuning.json"]


SIZES = '"columns": 64, "depth": 32, "warps": 4, "stages": 2'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"tiles": {"a": {"rows": 1}}}',
        "[1]",
        '{"tiles": 3}',
        f'{{"tiles": {{"a": {{"rows": "128", {SIZES}}}}}}}',
        f'{{"tiles": {{"a": {{"rows": 100, {SIZES}}}}}}}',
        f'{{"tiles": {{"a": {{"rows": 8, {SIZES}}}}}}}',
        f'{{"tiles": {{"a": {{"rows": -128, {SIZES}}}}}}}',
    ],
)
def test_a_broken_tuning_file_is_named_with_the_remedy(text, tuning):
    tuning.parent.mkdir()
    tuning.write_text(text)
    with pytest.raises(ValueError, match=r"tuning\.json is no tuning file .*delete it"):
        tile("neighbor", torch.bfloat16, 2048, 86)


def test_a_tuning_file_is_written_whole_or_not_at_all(tuning, monkeypatch):
    tiles.write_tuning(tuning, {"a": Tile(64, 64, 64, 8, 2)})
    before = tuning.read_text()

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tiles.write_tuning(tuning, {"a": Tile(32, 64, 64, 8, 2)})
    assert tuning.read_text() == before
    assert [path.name for path in tuning.parent.iterdir()] == ["tuning.json"]


def test_without_a_home_there_is_no_tuning_file(monkeypatch):
    for name in ("MNCLGLF_TUNING", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without a home directory
    assert isinstance(tile("neighbor", torch.bfloat16, 2048, 86), Tile)


def test_the_tuning_file_is_what_is_launched(tuning, monkeypatch):
    launched = []
    monkeypatch.setattr("mnclglf_kernels._triton.launch.run", lambda launches, _: launched.extend(launches))
    rows = torch.randn(70, 16)
    for rows_of_a_tile in (64, 32):
        tiles.write_tuning(
            tuning, {tiles.key("contrastive", torch.float32, 16, 86): Tile(rows_of_a_tile, 64, 16, 4, 2)}
        )
        contrastive_loss(rows, rows, 1.0, backend="triton")
    assert [x.grid for x in launched if x.kernel.fn.__name__ == "contrastive_losses_forward_kernel"] == [(2, 2), (2, 3)]


def test_without_a_gpu_tune_says_so_and_writes_nothing(tuning, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not tuning.exists()


SMALL = Example(sizes=Sizes(16, 8, 12, 2, 32, 70), dtype=torch.float32, device=torch.device("cpu"))


def test_every_family_of_the_table_is_tuned():
    tuned = [tuning.family for row in OPERATORS.values() for tuning in row.tunings(SMALL)]
    assert sorted(tuned) == sorted({family for family, _ in TABLE})


@pytest.mark.parametrize("family", sorted({family for family, _ in TABLE}))
def test_tune_takes_the_fastest_candidate_that_computes_the_same(family):
    (case,) = (x for row in OPERATORS.values() for x in row.tunings(SMALL) if x.family == family)
    table, fast, slow, wrong = (Tile(64, 64, 32, 4, stages) for stages in (1, 2, 3, 4))
    seconds = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5}
    last: list[Tile] = []

    def launches(t: Tile) -> list[launch.Launch]:
        last[:] = [t]
        return [] if t == wrong else case.launches(t)  # the wrong tile leaves all results unchanged

    watched = Tuning(case.family, launches, case.results)

    def milliseconds(call) -> float:
        call()
        return seconds[last[0].stages]

    found = tune.best(watched, table, [slow, wrong, fast], torch.device("cpu"), milliseconds)
    assert found == (fast, 1.0, 3.0)


def test_a_candidate_that_was_fast_once_only_is_not_taken():
    case = Tuning("none", lambda t: [], [])
    table, lucky = Tile(64, 64, 32, 4, 1), Tile(64, 64, 32, 4, 2)
    times = iter([2.0, 1.0, *[2.0, 2.5] * 3])  # the table, the candidate, then both interleaved
    assert tune.best(case, table, [lucky], torch.device("cpu"), lambda call: next(times)) == (table, 2.0, 2.0)


def test_a_candidate_that_cannot_be_launched_is_passed_over(capsys):
    def launches(t: Tile) -> list[launch.Launch]:
        if t.stages == 2:
            raise RuntimeError("out of resource: shared memory")
        return []

    case = Tuning("none", launches, [torch.ones(2)])
    table, impossible = Tile(64, 64, 32, 4, 1), Tile(64, 64, 32, 4, 2)
    assert tune.best(case, table, [impossible], torch.device("cpu"), lambda call: 1.0)[0] == table
    assert "out of resource" in capsys.readouterr().out


def test_a_tuning_that_is_cut_keeps_what_it_found(tuning):
    """Checks that each family is in the file before the next is measured."""
    families = [x.family for row in OPERATORS.values() for x in row.tunings(SMALL)]
    measuring = tune.tune(SMALL, tuning, 99 << 10, lambda call: 1.0, seconds=0)
    for number in (1, 2):
        next(measuring)
        assert [key.split("/")[0] for key in tiles.read_tuning(tuning)] == families[:number]


@pytest.mark.parametrize("name", [name for name, row in OPERATORS.items() if list(row.tunings(SMALL))])
def test_a_tuned_tile_is_the_one_that_a_call_looks_up(name, tuning, monkeypatch):
    """Also where the table's width is not D, as for a convolution, whose width is its channels."""
    looked_up, row = set(), OPERATORS[name]
    monkeypatch.setattr(tiles, "key", lambda *given, key=tiles.key: looked_up.add(key(*given)) or key(*given))
    example = Example(sizes=SMALL.sizes._replace(width=2048), dtype=torch.float32, device=torch.device("cpu"))
    row.launches(example)
    launched = looked_up.copy()
    looked_up.clear()
    monkeypatch.setattr("mnclglf_kernels.tune.OPERATORS", {name: row})
    monkeypatch.setattr(tune, "best", lambda tuning, table, *_: (table, 1.0, 1.0))
    assert [*tune.tune(example, tuning, 99 << 10, lambda call: 1.0)]
    assert looked_up <= launched  # nt_xent launches a family of contrastive_losses too


def test_a_tuning_ends_in_time(tuning, capsys):
    """Checks no time at all: every family keeps the table's configuration, and no other is launched."""
    found = [*tune.tune(SMALL, tuning, 99 << 10, lambda call: 1.0, seconds=0)]
    assert all(fastest == table for _, fastest, _, table, _ in found)
    assert {family for family, *_ in found} == {family for family, _ in TABLE}
    assert capsys.readouterr().out.count("the time is up after 0 of") == len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_fit_into_shared_memory(dtype):
    found = tune.candidates(dtype, 99 << 10)
    assert len(found) > 20
    assert len(set(found)) == len(found)
    assert all((t.stages - 1) * (t.rows + t.columns) * t.depth * dtype.itemsize <= 99 << 10 for t in found)


@pytest.mark.parametrize("home", [None, "/nonexistent", "here", "cached"])
def test_the_tuning_file_is_where_all_caches_are(home, tmp_path, monkeypatch):
    """Also without a home, and with one where nothing can be made, as in a container under any user number."""
    for name in ("MNCLGLF_TUNING", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_001)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    if home is not None:
        monkeypatch.setenv("HOME", str(tmp_path / home) if home in ("here", "cached") else home)
    if home == "cached":
        (tmp_path / home / ".cache" / "mnclglf").mkdir(parents=True)
    if home != "here":
        monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    path = tiles.tuning_path()
    assert path.parent == cache_folder()
    assert path.parent == tmp_path / {"here": "here/.cache/mnclglf", "cached": "cached/.cache/mnclglf"}.get(
        str(home), "temporary/mnclglf-4000000001"
    )
    tiles.write_tuning(path, {"x": Tile(64, 64, 64, 8, 2)})
    assert tiles.read_tuning(path) == {"x": Tile(64, 64, 64, 8, 2)}
    assert not (tmp_path / "~").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "chosen"))
    assert tiles.tuning_path().parent == cache_folder() == tmp_path / "chosen" / "mnclglf"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_a_home_of_another_user_is_no_home(tmp_path):
    """So it is where HOME=/root stays set in a container that runs under another number."""
    home = tmp_path / "root"
    home.mkdir(mode=0o700)
    code = """import os, tempfile
from pathlib import Path
from mnclglf.runs.files import cache_folder
from mnclglf_kernels._triton import tiles
os.setuid(4_000_000)
assert tiles.tuning_path().parent == cache_folder() == Path(tempfile.gettempdir(), "mnclglf-4000000")
assert tiles.read_tuning(tiles.tuning_path()) == {}
assert tiles.read_tuning(Path(os.environ["HOME"], "tuning.json")) == {}
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("MNCLGLF_TUNING", "XDG_CACHE_HOME")}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
