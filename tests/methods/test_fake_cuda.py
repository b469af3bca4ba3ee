"""A step on CUDA tensors that are not there: every tensor of it is on the GPU, and the host is asked for none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from mnclglf.config import ModelConfig, ObjectiveConfig
from mnclglf.methods import METHODS, Method
from mnclglf.training.guard import Guard
from mnclglf_kernels import Backend, Backends

N, SIDE, K = 6, 16, 20
CUDA = torch.device("cuda")


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fused_sgd_on_meta: None) -> Backend:
    monkeypatch.setattr("mnclglf_kernels.backend.triton_problem", lambda tensors, kind: None)  # it asks the driver
    return request.param


def make(name: str, backend: Backend, **objective: Any) -> Method:
    """A method with its tensors replaced by fake ones on CUDA; to be called in FakeTensorMode."""
    with unset_fake_temporarily():
        settings = ObjectiveConfig(queue_size=K, **objective)
        method = METHODS[name](ModelConfig(width=4, projector_width=24, predictor_width=12, classes=3), settings)
    method.backends = Backends.all(backend)
    for module in method.modules():
        for key, p in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(torch.empty(p.shape, device=CUDA), p.requires_grad))
        for key, x in module.named_buffers(recurse=False):
            module.register_buffer(key, torch.empty(x.shape, dtype=x.dtype, device=CUDA))
    return method.train()


def step(method: Method) -> dict[str, Tensor]:
    """Forward, guard, moving average and queue (a backward asks for a driver); gives every tensor that came of it."""
    views = torch.randn(method.views * N, 3, SIDE, SIDE, device=CUDA)
    losses = method(views, torch.zeros(N, dtype=torch.int64, device=CUDA) if method.needs_labels else None)
    keys = {} if losses.keys is None else {"keys": losses.keys}
    keep = Guard(CUDA).check(0, {**losses.terms, **keys})
    method.after_step(losses, torch.arange(N, device=CUDA), momentum=0.9, should_update=keep)
    made = {"total": losses.total, "features": losses.features, "keep": keep, **losses.terms, **keys}
    return made | dict(method.state_dict())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("objective", [{}, {"one_embedding": True}], ids=str)
def test_every_tensor_of_a_step_is_on_the_gpu(name, objective, backend):
    with FakeTensorMode(allow_non_fake_inputs=False):
        for key, value in step(make(name, backend, **objective)).items():
            assert value.device.type == "cuda", key


def test_a_tensor_on_the_host_is_found(backend, monkeypatch):
    made = torch.arange

    def arange(*size: int, device: object = None) -> Tensor:
        return made(*size)

    monkeypatch.setattr("mnclglf.models.feature_queue.torch.arange", arange)
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"device"):
        step(make("mnclglf", backend))


def test_reading_from_the_device_is_found(backend):
    with FakeTensorMode(), pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        float(step(make("mnclglf", backend))["total"])
