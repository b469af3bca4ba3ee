"""What every test shares: two threads, one seed, hypothesis without a clock, the backends under test."""

import os

# OpenMP's threads spin by default: on shared cores a step of 14 ms took 2 s. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. Read when triton is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["MNCLGLF_TUNING"] = os.path.join(os.sep, "nonexistent", "tuning.json")  # this user's own is not tested

import hypothesis
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import round_to_nearest_bf16

    round_to_nearest_bf16()

BACKENDS = ["torch", "triton"]

torch.set_num_threads(2)

# No deadline: the first call of an operator pays for lazy initialisation. Derandomised: the same examples every run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed of torch's generators at the start of every test."""
    value = 20240607
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; session-wide, so that a hypothesis test may use it."""
    return request.param
