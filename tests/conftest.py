"""Setup of all tests: threads, one seed, no network, hypothesis without a clock, the backends under test."""

import importlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

# OpenMP's threads spin by default: on shared cores a step of 14 ms took 2 s. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: one thread each, also in subprocesses
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests are the same on every machine: on the CPU, with the Triton kernels in Triton's interpreter. `make test-gpu`
# sets this variable and runs those marked gpu. Both settings are read when torch and triton are loaded. With "rehearse"
# those marked gpu are not left out on a CPU: the rehearsal of `make gpu-day` runs some of them, interpreted.
if os.environ.get("MNCLGLF_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

os.environ["MNCLGLF_TUNING"] = "/nonexistent/tuning.json"  # not the user's own file

# No test needs the network. These reach what tests start, too; the fixture no_network stops the rest in this process.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
os.environ.pop("MLFLOW_TRACKING_URI", None)

import hypothesis
import pytest
import torch

ON_GPU = os.environ.get("MNCLGLF_TEST_GPU") == "1"
REHEARSED = os.environ.get("MNCLGLF_TEST_GPU") == "rehearse"
if not ON_GPU:
    from interpreter import index_one_element, round_to_nearest_bf16

    round_to_nearest_bf16()
    index_one_element()

BACKENDS = ["torch"] if ON_GPU else ["torch", "triton"]

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# No deadline: the first call of an operator includes lazy initialization. Derandomized: the same examples every run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("repeatable")


NOT_ON_GPU = pytest.StashKey[str]()  # the line that counts what was not run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked gpu on a machine without one, and counts them."""
    waiting = [item for item in items if item.get_closest_marker("gpu")]
    if waiting and not (ON_GPU and torch.cuda.is_available()) and not REHEARSED:
        reason = "torch sees no CUDA device" if ON_GPU else "they run with `make test-gpu`"
        config.stash[NOT_ON_GPU] = f"{len(waiting)} tests marked gpu were not run: {reason}"
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if item not in waiting]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    workeroutput: dict[str, str] | None = getattr(session.config, "workeroutput", None)  # in one of several processes
    if NOT_ON_GPU in session.config.stash and workeroutput is not None:
        workeroutput["not on a GPU"] = session.config.stash[NOT_ON_GPU]
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and NOT_ON_GPU in session.config.stash:
        session.exitstatus = pytest.ExitCode.OK  # all there was to run needs a GPU, and the line below says so


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over the count of one of several processes; all of them have the same count."""
    if line := getattr(node, "workeroutput", {}).get("not on a GPU"):
        node.config.stash[NOT_ON_GPU] = line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if NOT_ON_GPU in config.stash:
        terminalreporter.write_line(config.stash[NOT_ON_GPU], yellow=True)


def _is_here(host: object) -> bool:
    """Returns whether a host is this machine, by a name or number of the loopback interface."""
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuses to look up or connect to another machine; Unix sockets and loopback stay. C++ code is not covered."""

    def refused(address: object) -> OSError:
        return OSError(f"tests use no network, and this one asks for {address}; serve it on 127.0.0.1")

    def guarded(call: Any) -> Any:
        def guard(self: socket.socket, *arguments: Any) -> Any:
            address = arguments[-1]  # sendto has the data before it
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
                raise refused(address)
            return call(self, *arguments)

        return guard

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if not _is_here(host):
            raise refused(host)
        return found(host, *arguments, **options)

    found = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", look_up)
        yield


@pytest.fixture
def fused_sgd_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets PyTorch's fused SGD run on the meta device, and as a fake, where it computes nothing."""
    optimizer = importlib.import_module("torch.optim.optimizer")  # torch.optim has no attribute of that name
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_sgd_", "_fused_sgd_.tensor_lr"):
        library.impl(name, lambda *args, **kwargs: None, "Meta")
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed of torch's generators at the start of every test."""
    value = 20240607
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Gives each backend in turn; session-wide, so that a hypothesis test may use it."""
    return request.param
