"""The files for clusters: their shell, their fields, their commands, and what the scripts do at a signal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.faults.processes import OPTIONS, ROOT, STEPS, newest_step
from mnclglf.cli import parse

FOLDER = ROOT / "docs" / "howto" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
SLURM = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
names = pytest.mark.parametrize


def commands_of(path: Path) -> list[list[str]]:
    """Returns the words after each `mnclglf` that a script or a manifest starts; `train` is the first."""
    text = re.sub(r"\s+#.*|^#.*", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    if path.suffix == ".yaml":
        text = "\n".join(" ".join(command_of(resource)) for resource in yaml.safe_load_all(text))
    found = re.findall(r"\bmnclglf (train .*)", text)
    return [shlex.split(line.removesuffix("&")) for line in found]


def command_of(resource: dict[str, Any]) -> list[str]:
    container = container_of(resource)
    return [] if container is None else [*container["command"], *container["args"]]


def container_of(resource: dict[str, Any]) -> dict[str, Any] | None:
    if resource["kind"] == "TrainJob":
        return resource["spec"]["trainer"]
    if resource["kind"] == "Job":
        (container,) = resource["spec"]["template"]["spec"]["containers"]
        return container
    return None


def resources(name: str) -> dict[str, dict[str, Any]]:
    return {resource["kind"]: resource for resource in yaml.safe_load_all((FOLDER / name).read_text())}


@names("script", SCRIPTS, ids=lambda path: path.name)
def test_shell(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script], check=False).returncode == 0
    assert "#SBATCH --signal=B:USR1@120" in script.read_text()


@names("path", [path for path in (*SCRIPTS, *MANIFESTS) if path.name != "tables.sbatch"], ids=lambda path: path.name)
def test_commands_are_taken_by_the_parser(path: Path) -> None:
    (command,) = commands_of(path)
    parse(command)


def test_the_page_names_every_file() -> None:
    page = (FOLDER / "index.md").read_text()
    assert {path.name for path in FOLDER.iterdir()} == {
        *re.findall(r"\]\(([\w-]+\.(?:sbatch|yaml))\)", page),
        "index.md",
    }


def assert_volumes(pod: dict[str, Any], mounts: list[dict[str, str]]) -> None:
    assert pod["terminationGracePeriodSeconds"] == 120
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    places = {mount["mountPath"]: volumes[mount["name"]] for mount in mounts}
    assert places["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in places["/work"]


def test_pods_of_the_job_find_each_other() -> None:
    found = resources("job.yaml")
    job, service = found["Job"], found["Service"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = " ".join(container["args"])
    assert (job["apiVersion"], job["spec"]["completionMode"]) == ("batch/v1", "Indexed")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:" in command
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert f"--nnodes={job['spec']['completions']} " in command
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']} " in command
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert_volumes(pod, container["volumeMounts"])


@names(("index", "host"), [("0", "1"), ("1", "0")])
def test_pod_0_of_the_job_hosts_the_rendezvous(index: str, host: str, tmp_path: Path) -> None:
    shim(tmp_path, "torchrun", 'echo "$@"')
    container = container_of(resources("job.yaml")["Job"])
    assert container is not None
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": index}
    done = subprocess.run(command_of(resources("job.yaml")["Job"]), env=environment, capture_output=True, text=True)
    assert f" --rdzv-conf=is_host={host} " in done.stdout
    from torch.distributed.run import config_from_args, get_args_parser

    config, _, _ = config_from_args(get_args_parser().parse_args(shlex.split(done.stdout)))
    assert (config.min_nodes, config.nproc_per_node, config.rdzv_backend) == (2, 8, "c10d")


def test_fields_of_the_trainjob() -> None:
    job = resources("trainjob.yaml")["TrainJob"]
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert not [variable for variable in trainer["env"] if variable["name"].startswith("PET_")]  # Trainer sets them
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"
    assert_volumes(pod, container["volumeMounts"])


def shim(folder: Path, name: str, text: str) -> None:
    """Writes a program that stands in for one of a cluster."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def cluster(folder: Path) -> dict[str, str]:
    """Writes stand-ins for Slurm's programs; returns the environment of a job that finds them."""
    shim(folder, "srun", 'exec "$@"')
    shim(folder, "scontrol", f'[[ $1 == show ]] && echo node1 || echo "$@" >> {folder}/requeued')
    shim(folder, "scancel", f"kill -USR1 $(cat {folder}/pid)")
    return {**os.environ, **SLURM, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}


def stop(job: subprocess.Popen[Any], *processes: int, number: signal.Signals) -> int:
    """Signals a script and other processes until it ends, as bash may miss one just before its `wait`."""
    while job.poll() is None:
        for process in (job.pid, *processes):
            with suppress(ProcessLookupError):
                os.kill(process, number)
        with suppress(subprocess.TimeoutExpired):
            job.wait(3)
    return job.returncode


@names("script", SCRIPTS, ids=lambda path: path.name)
@names("told", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_stop_waits_for_its_run(script: Path, told: signal.Signals, tmp_path: Path) -> None:
    environment = cluster(tmp_path)
    code = 1 if script.name == "nodes.sbatch" else 128 + told  # torchrun's after a signal, and that of mnclglf
    for name in ("mnclglf", "torchrun"):
        text = (
            f'trap "sleep 0.5; echo saved > saved; exit {code}" {told}; echo $$ > pid\nwhile true; do sleep 0.1; done'
        )
        shim(tmp_path, name, text)
    (tmp_path / "plan.txt").write_text("false\nmnclglf\nfalse\n")
    job = subprocess.Popen(["bash", script], cwd=tmp_path, env=environment)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        time.sleep(0.02)
    others = [] if told == signal.SIGUSR1 else [int((tmp_path / "pid").read_text())]  # SIGTERM comes to all processes
    assert stop(job, *others, number=told) == code
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").exists() == (told == signal.SIGUSR1)  # Slurm requeues a job that it preempts
    if told == signal.SIGUSR1:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@names("script", SCRIPTS, ids=lambda path: path.name)
@names("code", [0, 1])
def test_a_job_ends_as_its_run_does(script: Path, code: int, tmp_path: Path) -> None:
    environment = cluster(tmp_path)
    for name in ("mnclglf", "torchrun"):
        shim(tmp_path, name, f'echo "$@" > arguments; exit {code}')
    (tmp_path / "plan.txt").write_text("false\nmnclglf 'second  line'\nfalse\n")
    assert subprocess.run(["bash", script], cwd=tmp_path, env=environment).returncode == code
    assert not (tmp_path / "requeued").exists()
    if script.name == "tables.sbatch":
        assert (tmp_path / "arguments").read_text() == "second  line\n"


@pytest.mark.slow
def test_a_training_goes_on_after_the_time_limit(tmp_path: Path) -> None:
    """Runs the script for one node with two processes on the CPU: stopped by SIGUSR1, requeued, run to its end."""
    environment = cluster(tmp_path)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "runs" / "eight"
    shim(tmp_path, "mnclglf", f'exec {shlex.quote(sys.executable)} -m mnclglf "$@"')
    text = (FOLDER / "one-node.sbatch").read_text()
    options = shlex.join([*OPTIONS, "--gpus", "2", "--out", str(out)])
    script = tmp_path / "one-node.sbatch"
    script.write_text(re.sub(r"^mnclglf train .* &$", f"mnclglf train {options} &", text, flags=re.M))
    log = tmp_path / "log"

    with log.open("w") as file:
        job = subprocess.Popen(["bash", script], cwd=tmp_path, env=environment, stdout=file, stderr=file)
    while newest_step(out) < 4 and job.poll() is None:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)  # as Slurm does with B:
    assert job.wait(120) == 128 + signal.SIGUSR1, log.read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert 4 <= newest_step(out) < STEPS

    with log.open("a") as file:
        again = subprocess.run(["bash", script], cwd=tmp_path, env=environment, stdout=file, stderr=file)
    assert again.returncode == 0, log.read_text()
    assert newest_step(out) == STEPS
    said = log.read_text()
    assert said.count("stopped and saved") == said.count("resuming after step") == 1
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1
