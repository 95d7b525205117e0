"""`puna launch` prints what torchrun, Slurm and Kubernetes take as it is, or says why the run cannot be."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from puna.cli import run
from puna.config import parse_overrides
from puna.errors import UsageError
from puna.launch import GRACE_SECONDS, launch

RECIPE = "codellama-34b-pretrain"  # 128 rows
AWKWARD = ["data.train={it's $(HOME) $x: 0.9, 'a b': 0.1}", "parallel={}", 'run_dir=runs/Mine "2"']


def torchrun_arguments(words: list[str]) -> Any:
    """The words as torchrun itself understands them."""
    from torch.distributed.run import get_args_parser

    assert words[0] == "torchrun"
    return get_args_parser().parse_args(words[1:])


def lines_of(text: str) -> list[list[str]]:
    """The words of each command that a shell would run, without the assignments before it."""
    lines = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    settings = ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300"]
    assert all(words[:2] == settings for words in lines)
    return [words[2:] for words in lines]


def test_a_shell_gets_a_line_a_node_that_torchrun_understands() -> None:
    text = launch(RECIPE, AWKWARD, nodes=2, gpus=8, master_addr="10.0.0.1", port=4000, max_restarts=5)
    nodes = [torchrun_arguments(words) for words in lines_of(text)]
    assert len(nodes) == 2
    for arguments in nodes:
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.max_restarts) == ("2", "8", 5)
        assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("c10d", "10.0.0.1:4000")
        assert arguments.rdzv_id == "mine-2"
        assert (arguments.module, arguments.training_script) == (True, "puna")
        assert arguments.training_script_args == ["train", RECIPE, *AWKWARD]
    assert [arguments.rdzv_conf.split(",")[0] for arguments in nodes] == ["is_host=1", "is_host=0"]
    assert [arguments.local_addr for arguments in nodes] == ["10.0.0.1", None]


def test_overrides_from_python_are_printed_with_their_values() -> None:
    overrides = {
        "data.train": {"a b": 0.9, "it's: $x, é": 0.1}, "run_dir": "runs/1e5", "optimizer.peak_lr": 1e-5,
        "optimizer.max_grad_norm": None, "optimizer.betas": (0.9, 0.99), "compile": True, "device": "1e5",
    }  # fmt: skip
    (words,) = lines_of(launch(RECIPE, {**overrides, "parallel": {}}, gpus=8))
    written = torchrun_arguments(words).training_script_args[2:]
    assert parse_overrides(written) == {**overrides, "parallel": {}, "optimizer.betas": [0.9, 0.99]}


def test_a_run_that_would_begin_with_random_weights_says_so_beside_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    for start, said in (([], f"without start=MODEL, {RECIPE} begins with random weights\n"), (["start=here"], "")):
        launch(RECIPE, ["parallel={}", *start], gpus=8)
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", said)


def test_one_machine_needs_no_address() -> None:
    (words,) = lines_of(launch(RECIPE, ["parallel={}"], gpus=8))
    arguments = torchrun_arguments(words)
    assert (arguments.standalone, arguments.nproc_per_node) == (True, "8")


def test_fewer_nodes_will_do_where_min_nodes_says_so() -> None:
    words, *_ = lines_of(launch(RECIPE, ["parallel={}"], nodes=2, min_nodes=1, gpus=8, master_addr="fd00::1"))
    arguments = torchrun_arguments(words)
    assert (arguments.nnodes, arguments.rdzv_endpoint) == ("1:2", "[fd00::1]:29500")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodes 2 --gpus 8", "--master-addr is missing: the name or address of the first of the 2 nodes"),
        ("--gpus 8 --format kubernetes", "--image is missing"),
        ("--gpus 8 --format lsf", "there is no format 'lsf'; there are shell, slurm, kubernetes"),
        ("--gpus 8 --format slurm --image x", "--image is only for --format kubernetes, not slurm"),
        ("--gpus 8 --format slurm --master-addr x", "--master-addr is only for --format shell, not slurm"),
        ("--gpus 8 --master-addr 'x; rm'", "'x; rm' is neither a host's name nor an address"),
        ("--gpus 0", "must be 1 or more"),
        ("--nodes 2 --gpus 8 --min-nodes 3", "--min-nodes 3 must be 1 to 2"),
        ("--gpus 8", "Missing option '--gpus'"),
    ],
)
def test_what_is_missing_or_too_much_is_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [] if "Missing" in message else shlex.split(arguments)
    assert run(["launch", RECIPE, "parallel={}", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


@pytest.mark.parametrize(
    ("override", "nodes", "message"),
    [
        ("parallel={tp: 16}", 2, "2 x 8 devices: parallel.tp=16 must divide the 8 key/value heads"),
        ("parallel={tp: 3}", 1, "1 x 8 devices: parallel: .* does not make the 8 devices"),
        ("parallel={}", 3, "3 x 8 devices: the 128 rows of a batch cannot be shared by .* = 24"),
        ("model=nowhere", 1, "nowhere/config.json does not exist, so the model's shape is not known; do this where"),
    ],
)
def test_an_impossible_layout_is_refused(override: str, nodes: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launch(RECIPE, [override], nodes=nodes, gpus=8, master_addr="a")


def test_every_number_of_nodes_that_may_be_left_is_checked() -> None:
    with pytest.raises(UsageError, match="3 x 8 devices: the 128 rows of a batch cannot be shared"):
        launch(RECIPE, ["parallel={}"], nodes=4, min_nodes=2, gpus=8, master_addr="a")


def test_the_folders_own_shape_is_believed_over_the_presets(tiny_model_folder: Path) -> None:
    with pytest.raises(UsageError, match="must divide the 2 key/value heads"):
        launch(RECIPE, ["parallel={tp: 8}", f"start={tiny_model_folder}"], gpus=8)


def test_nothing_loads_torch() -> None:
    code = f"import sys; from puna.cli import run; run(['launch', {RECIPE!r}, 'parallel={{}}', '--gpus', '8'])\n"
    done = subprocess.run([sys.executable, "-c", f"{code}print(*sys.modules)"], capture_output=True, text=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "puna.parallel.layout" in loaded
    assert "torch" not in loaded


def test_kubernetes_gets_a_pytorchjob() -> None:
    text = launch(RECIPE, AWKWARD, nodes=2, min_nodes=1, gpus=8, port=4000, format="kubernetes", image="hub/puna:1",
                  claim="disk")  # fmt: skip
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"], job["metadata"]) == ("kubeflow.org/v1", "PyTorchJob", {"name": "mine-2"})
    policy = job["spec"]["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"], policy["maxRestarts"]) == (1, 2, 3)
    assert policy["rdzvConf"] == [{"key": "read_timeout", "value": "600"}], "to read where the others are"
    assert job["spec"]["runPolicy"]["backoffLimit"] == 3
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 2
    pod = worker["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > GRACE_SECONDS, "to save"
    (container,) = pod["containers"]
    assert container["image"] == "hub/puna:1"
    arguments = torchrun_arguments([*container["command"], *container["args"]])
    assert arguments.nproc_per_node == "8"
    expanded = [word.replace("$$", "$") for word in arguments.training_script_args]
    assert expanded == ["train", RECIPE, *AWKWARD]
    assert "$$(HOME)" in container["args"][4]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["ports"] == [{"name": "pytorchjob-port", "containerPort": 4000}]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes[mounts["/work"]] == {"persistentVolumeClaim": {"claimName": "disk"}}
    assert volumes[mounts["/dev/shm"]] == {"emptyDir": {"medium": "Memory"}}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm's programs and torchrun are small stand-ins: two nodes, `a` and `b`."""
    programs = {
        "scontrol": 'if [ "$1" = show ]; then printf "a\\nb\\n"; else echo "$@" > requeued; fi',
        "srun": (
            'while [[ "$1" == --* ]]; do shift; done\n'
            "pids=()\ntrap 'kill -KILL \"${pids[@]}\"' TERM\n"
            'for node in 0 1; do SLURM_NODEID=$node SLURMD_NODENAME=n$node "$@" & pids+=($!); done\n'
            'echo "${pids[@]}" > tasks\n'
            'code=0\nfor pid in "${pids[@]}"; do\n'
            '    while true; do wait "$pid"; last=$?; kill -0 "$pid" 2>/dev/null || break; done\n'
            "    [ $last -eq 0 ] || code=$last\ndone\nexit $code"
        ),
        "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID.0" ] && kill -TERM $(cat tasks)',
        "torchrun": f'exec {sys.executable} "$(dirname "$0")/torchrun.py" "$@"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "torchrun.py").write_text(
        "import json, os, signal, sys, time\n"
        "def stop(*_): sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "with open('torchrun-' + os.environ['SLURM_NODEID'], 'w') as file: json.dump(sys.argv[1:], file)\n"
        "deadline = time.monotonic() + float(os.environ['STUB_SECONDS'])\n"
        "while time.monotonic() < deadline: time.sleep(0.05)\n"
        "sys.exit(int(os.environ['STUB_CODE']))\n"
    )
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "[ab]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "4",
        "STUB_SECONDS": "0",
        "STUB_CODE": "0",
    }


def test_slurm_starts_one_torchrun_a_node(cluster: dict[str, str], tmp_path: Path) -> None:
    text = launch(RECIPE, AWKWARD, nodes=2, gpus=8, format="slurm")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    settings = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert "srun --kill-on-bad-exit=1 " in text
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "requeue", "signal=B:USR1@600"} <= settings
    assert subprocess.run(["bash", "-c", text], env=cluster, cwd=tmp_path, timeout=60).returncode == 0
    for node in range(2):
        arguments = torchrun_arguments(["torchrun", *json.loads((tmp_path / f"torchrun-{node}").read_text())])
        assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
        assert (arguments.rdzv_endpoint, arguments.rdzv_id) == ("a:29500", "77")
        assert arguments.rdzv_conf == f"is_host={int(node == 0)},read_timeout=600"
        assert arguments.local_addr == f"n{node}"
        assert arguments.training_script_args == ["train", RECIPE, *AWKWARD]
    assert not (tmp_path / "requeued").exists()


def test_slurm_may_give_fewer_nodes(cluster: dict[str, str], tmp_path: Path) -> None:
    text = launch(RECIPE, ["parallel={}"], nodes=2, min_nodes=1, gpus=8, format="slurm")
    assert "#SBATCH --nodes=1-2\n" in text
    assert "#SBATCH --no-kill\n" in text
    assert "srun --kill-on-bad-exit=0 " in text, "the others go on without the node that is lost"
    subprocess.run(["bash", "-c", text], env=cluster, cwd=tmp_path, timeout=60, check=True)
    assert json.loads((tmp_path / "torchrun-0").read_text())[0] == "--nnodes=1:2"


@pytest.mark.parametrize(("is_signalled", "code"), [(True, 1), (False, 3)])
def test_slurm_requeues_what_ran_out_of_time_and_not_what_failed(
    cluster: dict[str, str], tmp_path: Path, is_signalled: bool, code: int
) -> None:
    text = launch(RECIPE, ["parallel={}"], nodes=2, gpus=8, format="slurm")
    environment = {**cluster, "STUB_SECONDS": "60" if is_signalled else "0", "STUB_CODE": "3"}
    script = subprocess.Popen(["bash", "-c", text], env=environment, cwd=tmp_path)
    try:
        if is_signalled:
            _wait_for(tmp_path / "torchrun-0", tmp_path / "torchrun-1")
            script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=30) == code
    finally:
        script.kill()
    assert (tmp_path / "requeued").exists() == is_signalled


def _wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.stat().st_size for file in files):
        assert time.monotonic() < deadline, f"{files} did not appear"
        time.sleep(0.05)


def test_the_lines_of_a_shell_meet_and_start_a_process_each(tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(
        "import json, os, sys\n"
        "with open('rank-' + os.environ['RANK'], 'w') as file:\n"
        "    json.dump([os.environ['WORLD_SIZE'], os.environ['MASTER_ADDR'], *sys.argv[1:]], file)\n"
    )
    text = launch("tiny-pretrain", ["batch_tokens=2048", "run_dir=runs/{a}"], nodes=2, gpus=1, master_addr="127.0.0.1",
                  port=_free_port())  # fmt: skip
    commands = [line.replace("-m puna", "-m stand_in") for line in text.splitlines() if not line.startswith("#")]
    bin_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": bin_first, "PET_LOCAL_ADDR": "127.0.0.1", "PYTHONPATH": str(tmp_path)}
    nodes = [subprocess.Popen(["bash", "-c", f"exec env {line}"], env=environment, cwd=tmp_path) for line in commands]
    try:
        assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank-{rank}").read_text())
        assert seen == ["2", "127.0.0.1", "train", "tiny-pretrain", "batch_tokens=2048", "run_dir=runs/{a}"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
