"""Launching on many machines: the exact thing to run, printed, for a shell, for Slurm or for Kubernetes.

    puna launch codellama-34b-finetune-16 start=CodeLlama-34b-hf --nodes 2 --gpus 8 --format slurm > run.sbatch

Nothing is started here. What is printed starts torchrun once a node, which starts `puna train` once a device, and all
of them again from the newest checkpoint when one dies. Nodes meet at the first one: when that is lost, what is printed
is to be run again, and continues the run. The recipe is checked against the devices first, without torch.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from puna.config import Recipe, load_recipe, override_words
from puna.errors import UsageError
from puna.model.config import PRESETS, config_at_hand
from puna.parallel.layout import Layout
from puna.progress import say
from puna.twins import make_callable

make_callable(__name__)

#: Time that torchrun gives its workers to save when they are told to stop; torch 2.11 does not read it and gives 30.
#: A worker that hangs because another has died is waited for as long.
GRACE_SECONDS = 300

#: What torchrun is told by its environment. Processes meet in a store of their own: in the agents' store, which is the
#: default, those that start again find the addresses of those that died (pytorch/pytorch#135712), and a node that comes
#: anew finds none.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS)}

#: How long a node waits for the one that holds the rendezvous: images are pulled, machines boot.
JOIN_SECONDS = 600

#: Where a Kubernetes job mounts the volume with data and runs, and works.
WORK = "/work"


@dataclass(frozen=True)
class Job:
    """What is to be started, and on what."""

    recipe: Recipe
    train: list[str]
    """What torchrun starts: -m puna train RECIPE a.b=c …"""
    nodes: int
    gpus: int
    min_nodes: int
    port: int
    max_restarts: int
    master_addr: str | None
    image: str | None
    claim: str | None

    @property
    def name(self) -> str:
        """The run folder's name as Kubernetes takes names: a run has one folder, so it has one name."""
        letters = re.sub(r"[^a-z0-9]+", "-", Path(self.recipe.run_dir).name.lower()).strip("-")
        return (letters if letters[:1].isalpha() else f"run-{letters}")[:40].strip("-")

    @property
    def is_elastic(self) -> bool:
        """Whether the run may go on with fewer nodes."""
        return self.min_nodes < self.nodes


def launch(
    recipe: str,
    overrides: list[str] | dict[str, Any] | None = None,
    *,
    nodes: int = 1,
    gpus: int,
    format: str = "shell",
    master_addr: str | None = None,
    port: int = 29500,
    max_restarts: int = 3,
    min_nodes: int | None = None,
    image: str | None = None,
    claim: str | None = None,
) -> str:
    """The text that starts a recipe on `nodes` x `gpus` devices.

    Args:
        recipe: a shipped recipe's name or a YAML file, as for `puna train`.
        overrides: dotted fields and their values, as for `load_recipe`.
        gpus: devices of each node.
        format: one of FORMATS.
        master_addr: the first node's name or address; a shell on more than one node needs it.
        port: where the nodes meet, on the first one.
        max_restarts: how often all processes are started again after one has died.
        min_nodes: the run goes on with so many nodes where others are lost; None: it waits for all of them.
        image: a container image with puna installed; Kubernetes needs it.
        claim: the Kubernetes volume claim with data and runs; None: "puna".

    Raises:
        UsageError: the recipe or its layout cannot be, or an argument is missing or of another format.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    checked = load_recipe(recipe, overrides)
    words = ["-m", "puna", "train", recipe, *override_words(overrides or [])]
    job = Job(checked, words, nodes, gpus, nodes if min_nodes is None else
              min_nodes, port, max_restarts, master_addr, image, claim)  # fmt: skip
    _check(job, format)
    if checked.start is None and checked.model in PRESETS:
        say(f"without start=MODEL, {recipe} begins with random weights")
    return FORMATS[format](job)


def _check(job: Job, format: str) -> None:
    if job.nodes < 1 or job.gpus < 1 or job.max_restarts < 0 or not 0 < job.port < 2**16:
        raise UsageError("--nodes and --gpus must be 1 or more, --max-restarts 0 or more, --port 1 to 65535")
    if not 1 <= job.min_nodes <= job.nodes:
        raise UsageError(f"--min-nodes {job.min_nodes} must be 1 to {job.nodes}, the number of --nodes")
    if job.master_addr is not None and not re.fullmatch(r"[\w.:-]+", job.master_addr):
        raise UsageError(f"--master-addr {job.master_addr!r} is neither a host's name nor an address")
    of_formats = {"master_addr": "shell", "image": "kubernetes", "claim": "kubernetes"}
    for field, owner in of_formats.items():
        if getattr(job, field) is not None and format != owner:
            raise UsageError(f"--{field.replace('_', '-')} is only for --format {owner}, not {format}")
    config = config_at_hand(job.recipe.model, job.recipe.start)
    for nodes in range(job.min_nodes, job.nodes + 1):
        try:
            Layout.of(job.recipe, config, nodes * job.gpus)
        except UsageError as error:
            raise UsageError(f"{nodes} x {job.gpus} devices: {error}") from None


def _torchrun(job: Job, nnodes: str, endpoint: str, run_id: str, is_host: str, *more: str) -> list[str]:
    return [
        "torchrun",
        f"--nnodes={nnodes}",
        f"--nproc-per-node={job.gpus}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={run_id}",
        f"--rdzv-conf=is_host={is_host},read_timeout={JOIN_SECONDS}",
        f"--max-restarts={job.max_restarts}",
        *more,
    ]


def _settings() -> str:
    return " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())


def _shell(job: Job) -> str:
    """A line for each node."""
    if job.nodes == 1:
        alone = ["torchrun", "--standalone", f"--nproc-per-node={job.gpus}", f"--max-restarts={job.max_restarts}"]
        return f"{_settings()} {shlex.join([*alone, *job.train])}\n"
    if job.master_addr is None:
        raise UsageError(
            f"--master-addr is missing: the name or address of the first of the {job.nodes} nodes, as the others see it"
        )
    address = job.master_addr
    endpoint = f"[{address}]:{job.port}" if ":" in address else f"{address}:{job.port}"
    nnodes = f"{job.min_nodes}:{job.nodes}" if job.is_elastic else str(job.nodes)
    lines = [
        "# One line a node, each in the same folder of a disk that all nodes share. Run again, they continue the run.",
        "# Where nodes cannot look each other's names up, set PET_LOCAL_ADDR to each one's address first.",
    ]
    for node in range(job.nodes):
        own = [f"--local-addr={address}"] if node == 0 else []
        command = _torchrun(job, nnodes, endpoint, job.name, "01"[node == 0], *own)
        lines += [
            f"# node {node}{f' ({address})' if node == 0 else ''}",
            f"{_settings()} {shlex.join([*command, *job.train])}",
        ]
    return "\n".join(lines) + "\n"


def _slurm(job: Job) -> str:
    """A batch script: one torchrun a node; back into the queue when its time is up."""
    nnodes = f"{job.min_nodes}:$SLURM_JOB_NUM_NODES" if job.is_elastic else "$SLURM_JOB_NUM_NODES"
    # The words stand in double quotes in the inner shell, which knows its node; what follows is passed on as it is.
    command = _torchrun(job, nnodes, f"$MASTER:{job.port}", "$SLURM_JOB_ID", "$((SLURM_NODEID == 0))",
                        "--local-addr=$SLURMD_NODENAME")  # fmt: skip
    words = " \\\n    ".join(f'"{word}"' if "$" in word else word for word in command)
    spare = "#SBATCH --no-kill\n" if job.is_elastic else ""
    nodes = f"{job.min_nodes}-{job.nodes}" if job.is_elastic else str(job.nodes)
    return _SBATCH.format(
        name=job.name,
        nodes=nodes,
        gpus=job.gpus,
        spare=spare,
        kill_on_bad_exit=int(not job.is_elastic),
        stop_seconds=2 * GRACE_SECONDS,
        settings=_settings(),
        words=words,
        train=shlex.join(job.train),
    )


_SBATCH = """\
#!/bin/bash
# Submit it from a folder on a disk that all nodes share, with puna's environment active; partition, account and another
# time limit go before its name: sbatch --partition=… --time=… SCRIPT
# Whenever it runs again, it continues the run from its newest checkpoint.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@{stop_seconds}
{spare}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER {settings}

# The signal comes {stop_seconds} seconds before the time limit: save, then back into the queue. srun itself would kill,
# told to end.
is_time_up=
stop() {{
    is_time_up=yes
    scancel --signal=TERM "$SLURM_JOB_ID.0"
}}
trap stop USR1

srun --kill-on-bad-exit={kill_on_bad_exit} --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c 'exec {words} \\
    "$@"' bash {train} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the run
    wait "$step"
    code=$?
done
if [ "$code" -gt 128 ]; then # or both ended at once: ask again, 127 says that this was the run's own code
    wait "$step"
    again=$?
    [ "$again" -eq 127 ] || code=$again
fi
if [ -n "$is_time_up" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _kubernetes(job: Job) -> str:
    """A PyTorchJob of the Kubeflow training operator, whose elastic policy tells torchrun where the nodes meet."""
    if job.image is None:
        raise UsageError(
            "--image is missing: a container image with puna installed, e.g. registry.example.com/puna:0.1"
        )
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": job.image,
        "workingDir": WORK,
        "command": ["torchrun", f"--nproc-per-node={job.gpus}"],
        "args": [word.replace("$", "$$") for word in job.train],  # Kubernetes expands $(NAME)
        "env": [{"name": name, "value": value} for name, value in ENVIRONMENT.items()],
        "ports": [{"name": "pytorchjob-port", "containerPort": job.port}],
        "resources": {"limits": {"nvidia.com/gpu": job.gpus}},
        "volumeMounts": [{"name": "work", "mountPath": WORK}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS + 60,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": job.claim or "puna"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    elastic_policy = {
        "rdzvBackend": "c10d",
        "rdzvId": job.name,
        "rdzvConf": [{"key": "read_timeout", "value": str(JOIN_SECONDS)}],
        "minReplicas": job.min_nodes,
        "maxReplicas": job.nodes,
        "maxRestarts": job.max_restarts,
    }
    worker = {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": pod}}
    manifest: dict[str, Any] = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name},
        "spec": {
            "nprocPerNode": str(job.gpus),
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": job.max_restarts},
            "elasticPolicy": elastic_policy,
            "pytorchReplicaSpecs": {"Worker": worker},
        },
    }
    return _KUBERNETES + yaml.safe_dump(manifest, sort_keys=False, width=120)


_KUBERNETES = f"""\
# For Kubeflow's training operator: kubectl apply -f FILE. The claim is mounted at {WORK}, where the recipe's relative
# paths begin; every pod must be able to write to it. Deleted and applied again, it goes on from the newest checkpoint.
"""

#: Format -> the function that writes it.
FORMATS: dict[str, Callable[[Job], str]] = {"shell": _shell, "slurm": _slurm, "kubernetes": _kubernetes}
