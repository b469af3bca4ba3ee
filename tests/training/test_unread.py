"""Tests of the settings that a run does not read, against each method's equations."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import mnclglf.api
from mnclglf.config import EngineConfig, ObjectiveConfig, RunConfig, ViewConfig
from mnclglf.methods import METHODS
from mnclglf.training.unread import unread_settings

QUEUE, MOMENTUM = {"queue_size", "queue_dtype"}, {"ema_momentum", "ema_schedule"}
PATCHES = {"k", "one_embedding"}
HEADS = {"projector_width", "predictor_width"}
ALL = {*QUEUE, *MOMENTUM, *PATCHES, *HEADS, "lambda_", "temperature", "lookup", "classes"}
READ = {  # from the equations at the top of each method's file
    "supervised": {"classes"},
    "simclr": {"temperature", "projector_width"},
    "mocov2": {"temperature", "projector_width", *QUEUE, *MOMENTUM},
    "simsiam": HEADS,
    "byol": HEADS | MOMENTUM,
    "nnclr": {"temperature", "lookup", *HEADS, *QUEUE},
    "fast_moco": {"temperature", "k", *HEADS, *MOMENTUM},
    "mnclglf": ALL - {"classes"},
    "mnclglf_official": ALL - {"classes", "one_embedding"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_the_letters_of_its_equations(method: str) -> None:
    before = torch.get_rng_state()
    unread = unread_settings(RunConfig(method=method), ALL)
    assert set(unread) == ALL - READ[method]
    assert set(unread.values()) <= {f"method {method}"}
    assert torch.equal(torch.get_rng_state(), before)


def test_only_what_was_given_is_named() -> None:
    config = RunConfig(method="byol", objective=ObjectiveConfig(lambda_=99.0))
    assert unread_settings(config, {"lambda_", "epochs"}) == {"lambda_": "method byol"}
    assert unread_settings(config, set()) == {}


def test_a_switched_off_operation_has_no_strength() -> None:
    given = {"hue", "brightness", "blur_sigma", "blur_kernel", "jitter_probability"}
    config = RunConfig(view=ViewConfig(blur_probability=0.0))
    assert set(unread_settings(config, given)) == {"blur_sigma", "blur_kernel"}
    config = RunConfig(view=ViewConfig(jitter_probability=0.0))
    assert unread_settings(config, given) == dict.fromkeys(("brightness", "hue"), "jitter_probability 0")


def test_a_device_a_precision_and_a_source_rule_settings_out() -> None:
    def names(config: RunConfig) -> set[str]:
        given = {"tf32", "cudnn_benchmark", "keep_memory", "skip_corrupt", "combo_kernels", "choices"}
        return set(unread_settings(config, given))

    config = RunConfig(dataset="folder:photos", engine=EngineConfig(device="cpu"))
    assert names(config) == {"tf32", "cudnn_benchmark", "combo_kernels", "choices"}
    assert names(replace(config, engine=EngineConfig(compile="off"))) == {"choices"}
    assert names(replace(config, engine=EngineConfig(precision="bf16"))) == {"tf32"}
    assert names(replace(config, engine=EngineConfig(device="cuda", precision="fp32"))) == {"keep_memory"}
    assert names(RunConfig(dataset="digits")) == {"skip_corrupt"}


def test_the_api_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr(mnclglf.api, "Trainer", stop)
    unread: dict[str, Any] = {"lambda": 99.0}
    with pytest.warns(UserWarning, match=r"lambda_ has no effect with method byol.*leave"), pytest.raises(Stop):
        mnclglf.api.train(method="byol", dataset="digits", recipe="quick", **unread)
