"""Tests of settings by name: files in YAML and JSON, and what they replace."""

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from ruamel.yaml import YAML

from mnclglf.cli import main
from mnclglf.config import SECTIONS, WRITTEN, RunConfig, UsageError, to_dict
from mnclglf.recipes import paper, quick, tuned
from mnclglf.settings import read_settings, run_config

# What YAML 1.1 reads as a boolean, a number, a date, a number of base 60 or nothing, and other text that needs quotes.
TRAPS = ["off", "on", "no", "y", "1e-5", "1_000", "010", "0x1F", "2024-01-05", "1:30", "null", "~", "", "- a", "a: b"]
TRAPS += [
    "#x",
    "{a}",
    "'",
    '"',
    "été",
    "漢字",
    "\U0001f600",
    " a ",
    "a\nb",
    "a\tb",
    "%x",
    "@x",
    "&a",
    "*a",
    "!x",
    "\x85",
]
TEXT = st.sampled_from(TRAPS) | st.text(max_size=20)
NUMBERS = st.sampled_from([1e-5, 5e-324, 1e-05, 0.1, 1 / 3, 1e22, 3, 0, 1]) | st.floats(0, 1) | st.floats(0, 400)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Returns values of a setting's type; many are refused by its own rules."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(values_of(inner[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, inner)).map(sorted).map(tuple)
    if inner:
        return st.one_of([st.none() if kind is type(None) else values_of(kind) for kind in inner])
    kinds: dict[Any, st.SearchStrategy[Any]] = {int: st.integers(0, 2**32), float: NUMBERS, bool: st.booleans()}
    return (kinds | {str: TEXT, Path: TEXT.map(Path)})[hint]


@st.composite
def changed(draw: st.DrawFn, start: Any) -> Any:
    """Returns settings with other values in some fields, where those fit the others."""
    for name, hint in get_type_hints(type(start)).items():
        if name not in (*SECTIONS, *WRITTEN, "recipe", "dataset") and draw(st.booleans()):
            try:
                start = dataclasses.replace(start, **{name: draw(values_of(hint))})
            except UsageError:
                continue
    return start


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Returns a run with random settings."""
    recipe = draw(st.sampled_from([paper, quick]))
    start = recipe("byol", draw(st.sampled_from(["digits", "cifar10"]) | TEXT.map("folder:/x/{}".format)))
    sections = {name: draw(changed(getattr(start, name))) for name in SECTIONS}
    with suppress(UsageError):  # keep_every may be more than the epochs
        start = dataclasses.replace(start, **sections)
    return draw(changed(start))


def has_no_next_line(values: Any) -> bool:
    """Returns whether there is no U+0085: ruamel and PyYAML write it as it is, and read it as the end of a line."""
    return "\x85" not in json.dumps(values, ensure_ascii=False)


def in_yaml_1_2(values: Any, path: Path) -> None:
    writer = YAML(typ="safe", pure=True)
    writer.allow_unicode = has_no_next_line(values)
    writer.dump(values, path)


def in_yaml_1_1(values: Any, path: Path) -> None:
    path.write_text(yaml.safe_dump(values, allow_unicode=has_no_next_line(values)), encoding="utf-8")


WRITERS: dict[str, Any] = {
    "config.json": lambda values, path: path.write_text(json.dumps(values, indent=2)),
    "utf8.json": lambda values, path: path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8-sig"),
    "config.yaml": in_yaml_1_2,
    "yaml-1.1": in_yaml_1_1,
    "json-in.yaml": lambda values, path: path.write_text(json.dumps(values)),
}


@limits(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
@given(config=configs())
def test_a_configuration_comes_back_from_a_file_bit_for_bit(config: RunConfig, tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(json.loads(json.dumps(to_dict(config))), tmp_path / name)
        made = run_config({}, tmp_path / name)
        assert made == config
        assert repr(made) == repr(config)  # also 1 beside 1.0, and -0.0 beside 0.0


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments, "--print-config"]) == 0
    return capsys.readouterr().out


def test_what_print_config_prints_is_printed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "simsiam", "--dataset", "digits", "--recipe", "quick", "--lr", "1e-05", "--compile", "off"]
    text = printed(capsys, *options, "--data-dir", "été off", "--seed", "7", "--crop-scale", "0.3333333333333333", "1")
    (tmp_path / "été 1.json").write_text(text)
    assert printed(capsys, "--config", str(tmp_path / "été 1.json")) == text


def test_a_file_of_some_settings_starts_from_the_recipe_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(
        "method: simsiam\ndataset: cifar10\nrecipe: tuned\nlambda: 1e-5\ncompile: off\nblur-kernel: 5\n"
        "optim:\n  epochs: 4  # a word\nengine: {graphs: off}\nmodel:\n"
    )
    start = tuned("simsiam", "cifar10")
    expected = dataclasses.replace(
        start,
        objective=dataclasses.replace(start.objective, lambda_=1e-5),
        view=dataclasses.replace(start.view, blur_kernel=5),
        optim=dataclasses.replace(start.optim, epochs=4),
        engine=dataclasses.replace(start.engine, compile="off", graphs="off"),
    )
    assert run_config({}, path) == expected


def test_options_replace_what_a_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("method: simsiam\ndataset: digits\nrecipe: quick\nepochs: 4\nlr: 0.5\nchannels_last: false\n")
    made = json.loads(printed(capsys, f"--config={path}", "--epochs", "3", "--method", "byol", "--channels-last"))
    assert (made["method"], made["recipe"], made["dataset"]) == ("byol", "quick", "digits")
    assert (made["optim"]["epochs"], made["optim"]["lr"], made["engine"]["channels_last"]) == (3, 0.5, True)
    # The recipe is the option's, with its views; what the file says holds.
    made = json.loads(printed(capsys, "--config", str(path), "--recipe", "paper"))
    assert made["view"] == json.loads(json.dumps(to_dict(paper("simsiam", "digits"))))["view"]
    assert made["optim"]["lr"] == 0.5


def test_a_path_in_a_file_starts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "some.yaml").write_text("data_dir: files/2024\ndataset: folder:photos")
    monkeypatch.chdir(tmp_path)
    config = run_config({}, Path("settings/some.yaml"))
    assert (config.data.data_dir, config.dataset) == (Path("files/2024"), "folder:photos")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}", "optim:\n", "---\n"])
def test_a_file_without_settings_changes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(text)
    assert run_config({}, tmp_path / "some.yaml") == paper("mnclglf", "cifar10")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch: 3", r"'epoch' .*some\.yaml.*did you mean epochs"),
        ("optim: {epoch: 3}", r"'epoch' .*section optim.*did you mean epochs"),
        ("optim: {width: 3}", "'width' .*section optim"),
        ("optm: {epochs: 3}", "'optm' .*a run"),
        ("optim: 3", "3 .*section optim.*names and values"),
        ("optim: [epochs, 3]", "section optim.*names and values"),
        ("[1, 2]", "names and values"),
        ("hello", "'hello' .*names and values"),
        ("epochs: 3\noptim: {epochs: 4}", "epochs twice"),
        ("lambda: 3\nlambda_: 4", r"some\.yaml names lambda_? twice"),
        ("seed: 1\nbatch-size: 4\nbatch_size: 4", r"some\.yaml names batch_size twice"),
        ("optim: {batch-size: 4, batch_size: 4}", r"some\.yaml names batch_size twice"),
        ("epochs: 3\nepochs: 4", r"duplicate key .*epochs.* line 2"),
        ('{"epochs": 3, "epochs": 4}', r"some\.yaml names epochs twice"),
        ('{"epochs": 1' + "0" * 5000 + "}", r"some\.yaml is not .*digits.*correct it there"),
        ("epochs: [3", "not YAML.*line 1; correct"),
        ("a: !!python/object:os.system x", "not YAML.*correct"),
        ("epochs: 3\n---\nepochs: 4", "not YAML.*correct"),
        ("[" * 5000, "nested too deep"),
        ("<<: [[1]]", "some.yaml is not YAML: it merges settings by <<; write them out"),
        ("a: &a {lr: 1}\nb: {<<: *a}", "it merges settings by <<; write them out"),
        ("seed: 0x" + "f" * 5000, "seed a value of type int"),
        ("epochs: '3'", "epochs '3' .*whole"),
        ("epochs: true", "epochs True .*whole"),
        ("epochs: 2.5", r"epochs 2\.5 .*whole"),
        ("lr: 0.0", r"lr 0\.0 must be positive"),
        ("lr: .nan", "lr nan .*finite"),
        ("lr:", "lr None .*finite"),
        ("download: off", "download 'off' must be true or false"),
        ("data_dir: 2024", "data_dir 2024 .*quotes"),
        ("crop_scale: &a [*a, 1]", r"some.yaml has more than 10,000 values, with its aliases"),
        ("dataset: cifar", "dataset 'cifar' is none of"),
        ("recipe: papr", "recipe 'papr' is none of paper"),
        ("method: off", "method 'off' is none of"),
        ("5: 3", "'5' .*no setting"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"(?s){named}"):
        run_config({}, tmp_path / "some.yaml")
    assert main(["train", "--config", str(tmp_path / "some.yaml"), "--print-config"]) == 2
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.yaml cannot be read .*give a YAML or JSON file"):
        read_settings(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match=r"is a folder; give a file, as .*config\.json"):
        read_settings(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("dataset: folder:été".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml cannot be read .*utf-8"):
        read_settings(tmp_path / "latin.yaml")
    (tmp_path / "cut.json").write_text(json.dumps(to_dict(RunConfig()))[:-1])
    with pytest.raises(UsageError, match=r"cut\.json is not JSON.*correct"):
        read_settings(tmp_path / "cut.json")


def test_the_config_json_of_an_earlier_version_is_taken(tmp_path: Path) -> None:
    values = to_dict(quick("mnclglf", "digits"))
    values["engine"]["combo_kernels"] = False
    del values["engine"]["choices"], values["optim"]["optimizer"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = run_config({}, tmp_path / "config.json")
    assert (config.engine.combo_kernels, config.engine.choices, config.optim.optimizer) == ("off", "auto", "sgd")
