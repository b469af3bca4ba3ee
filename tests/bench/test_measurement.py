"""bench/measurement.py: ratios, and what survives the JSON of pytest-benchmark."""

import pytest

from bench.measurement import OperatorMeasurement, Ratio, StepMeasurement, ratio

OPERATOR = OperatorMeasurement(
    operator="divide",
    shape="N 1",
    direction="forward",
    backend="torch",
    dtype="bf16",
    seconds=[1.0, 2.0],
    ratio=Ratio(2.0, 1.5, 4.0),
    like_with_like=None,
    peak_bytes=None,
)
STEP = StepMeasurement(
    kind="ablation", name="+ kernels", size="tiny", images=4, seconds=[2.0], tflop=None, ratio=None, peak_bytes=1
)


def entry(measured: OperatorMeasurement | StepMeasurement) -> dict:
    """Returns an entry in pytest-benchmark's format, with tuples as lists."""
    info = {name: list(value) if isinstance(value, tuple) else value for name, value in measured.extra_info().items()}
    return {"extra_info": info, "stats": {"data": measured.seconds}}


def test_ratio_compares_each_round_with_itself():
    assert ratio([4.0, 6.0, 10.0], [2.0, 2.0, 1.0]) == Ratio(median=3.0, least=2.0, greatest=10.0)


@pytest.mark.parametrize("measured", [OPERATOR, STEP], ids=["operator", "step"])
def test_measurements_survive_json(measured):
    assert "seconds" not in measured.extra_info()
    assert type(measured).from_json(entry(measured)) == measured


def test_older_files_name_the_ablation_differently():
    old = entry(STEP)
    old["extra_info"]["kind"] = "ladder"
    assert StepMeasurement.from_json(old) == STEP
    old["extra_info"]["kind"] = "peers"
    assert StepMeasurement.from_json(old).kind == "peers"
