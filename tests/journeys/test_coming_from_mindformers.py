"""Old slices, rows and YAML go on in puna: the commands of the guide, in its order, on MindFormers' own small files."""

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import puna
from puna.checkpoint.formats.mindspore.ckpt import open_ckpt
from puna.cli import load_commands, run
from puna.data.shards import Dataset
from puna.testing import write_tiny_tasks

GUIDE = (Path(puna.__file__).parents[1] / "docs/coming_from_mindformers.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)[0].splitlines()

#: What makes a command fit two processor cores and a model with two key/value heads.
FITTED = {
    "puna train recipe.yaml": "puna train recipe.yaml steps=2 device=cpu parallel.pp=1 parallel.tp=1",
    "--max-tokens 512": "--max-tokens 8",
    "puna evaluate humaneval exports/mine": "puna evaluate humaneval exports/mine --max-tokens 4",
    "mp=8": "mp=2",
}


@pytest.fixture(scope="module")
def old_place(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as MindFormers leaves it: slices with optimizer state beside their strategy files, rows, YAML."""
    fixtures, folder = shared / "fixtures/mindspore", tmp_path_factory.mktemp("old")
    slices = fixtures / "distributed/mp2pp2_fp16"
    shutil.copytree(slices / "strategy", folder / "output/strategy")
    for rank in range(4):
        place = folder / f"output/checkpoint/rank_{rank}"
        place.mkdir(parents=True)
        for step in ("1_5", "2_12"):
            shutil.copyfile(slices / f"rank_{rank}/checkpoint_{rank}.ckpt", place / f"llama_rank_{rank}-{step}.ckpt")
    with tarfile.open(fixtures / "preprocess/qa512.mindrecord.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    (folder / "qa512.mindrecord.db").unlink()
    (folder / "qa512.mindrecord").rename(folder / "qa.mindrecord")
    shutil.copy(fixtures / "tokenizer/tokenizer.model", folder)
    (folder / "finetune_codellama_34b_16p.yaml").write_text(yaml.safe_dump(settings()))
    write_tiny_tasks(folder / "HumanEval.jsonl.gz", 1)
    return folder


def settings() -> dict:
    """The YAML of the fine-tuning, with the sizes of the small model."""
    model = {"type": "LlamaConfig", "seq_length": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
             "n_kv_heads": 2, "vocab_size": 512, "intermediate_size": 176, "rms_norm_eps": 1e-5, "theta": 1000000.0,
             "compute_dtype": "float32", "extend_method": "None"}  # fmt: skip
    return {
        "seed": 0,
        "output_dir": "./output",
        "run_mode": "finetune",
        "load_checkpoint": "output/checkpoint",
        "runner_config": {"epochs": 2, "batch_size": 1},
        "optimizer": {"type": "FP32StateAdamWeightDecay", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
        "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 1e-5, "lr_end": 0, "warmup_ratio": 0.03},
        "train_dataset": {"data_loader": {"type": "MindDataset", "dataset_dir": "qa.mindrecord", "shuffle": True}},
        "use_parallel": True,
        "parallel": {"parallel_mode": 1, "enable_parallel_optimizer": True},
        "parallel_config": {"data_parallel": 1, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 4},
        "callbacks": [{"type": "MFLossMonitor"}, {"type": "CheckpointMonitor", "save_checkpoint_steps": 1000}],
        "runner_wrapper": {"type": "MFTrainOneStepCell", "use_clip_grad": True},
        "model": {"model_config": model, "arch": {"type": "LlamaForCausalLM"}},
    }


def test_the_commands_of_the_guide_run_on_what_mindformers_left(old_place: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(old_place)
    assert len(COMMANDS) == 8
    said: dict[str, str] = {}
    for line in COMMANDS:
        if line.startswith("puna evaluate humaneval") and shutil.which("bwrap") is None:
            continue
        for words, fitted in FITTED.items():
            line = line.replace(words, fitted)
        _, *arguments = shlex.split(line)
        code = run(arguments)
        captured = capsys.readouterr()
        assert code == 0, f"{line}\n{captured.err}"
        said.setdefault(arguments[0], captured.out + captured.err)
    assert "llama_rank_0-2_12.ckpt is taken" in said["convert"]
    assert "parallel_config.model_parallel = 2: parallel.tp" in said["migrate"]
    dataset = Dataset.open(old_place / "data/train")
    assert (len(dataset), dataset.info["left_out"]) == (8, {"nothing to learn": 4})
    steps = [json.loads(line) for line in (old_place / "output/puna/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["loss"] > 0 for step in steps)
    back = open_ckpt(old_place / "back/rank_3/checkpoint_3.ckpt")
    theirs = open_ckpt(old_place / "output/checkpoint/rank_3/llama_rank_3-2_12.ckpt")
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in theirs.items()}


def test_the_table_of_commands_names_those_of_the_old_card() -> None:
    for old in (
        "llama_preprocess.py", "alpaca_converter.py", "convert_weight.py", "msrun_launcher.sh", "run_mindformer.py",
        "transform_checkpoint.py", "run_codellama_predict.sh", "HumanEval by hand", "WORKER_NUM", "LOCAL_WORKER",
        "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOG_DIR", "JOIN", "CLUSTER_TIME_OUT",
    ):  # fmt: skip
        assert old in GUIDE


def test_every_puna_command_in_the_guide_exists() -> None:
    known = set(get_command(load_commands()).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"(?:^|`)puna ([a-z]+) ", GUIDE, flags=re.MULTILINE))
    assert named <= known
    assert {"convert", "prepare", "migrate", "train", "export", "generate", "evaluate", "launch"} <= named
