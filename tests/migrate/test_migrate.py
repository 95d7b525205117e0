"""YAML of MindFormers: every key accounted for, the numbers where they belong, the arithmetic kept if asked."""

import copy
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

import puna
from puna.checkpoint import convert
from puna.cli import run
from puna.config import load_recipe
from puna.data import loader
from puna.data.rows import open_rows
from puna.data.shards import Dataset
from puna.errors import PunaError, UsageError
from puna.migrate.keys import GENERATION, NO_EFFECT, NOT_NEEDED, NOT_THERE, TRANSLATED
from puna.model.config import preset
from puna.parallel.layout import Layout

#: What the three YAMLs for training share, in their words and with their values.
TRAINING = yaml.safe_load("""
seed: 0
output_dir: './output'
load_checkpoint: ''
auto_trans_ckpt: False
only_save_strategy: False
resume_training: False
run_mode: 'train'
trainer: {type: CausalLanguageModelingTrainer, model_name: 'codellama_34b'}
do_eval: False
eval_step_interval: -1
eval_epoch_interval: 50
runner_config: {epochs: 2, batch_size: 1, sink_mode: True, sink_size: 1}
optimizer: {type: FP32StateAdamWeightDecay, beta1: 0.9, beta2: 0.95, eps: 1.e-8}
lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 1.e-5, lr_end: 0, warmup_ratio: 0.03, total_steps: -1}
train_dataset: &train_dataset
  data_loader: {type: MindDataset, dataset_dir: "", shuffle: True}
  input_columns: ["input_ids", "labels"]
  num_parallel_workers: 8
  python_multiprocessing: False
  drop_remainder: True
  repeat: 1
  numa_enable: False
  prefetch_size: 1
train_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *train_dataset}
eval_dataset: &eval_dataset
  data_loader: {type: MindDataset, dataset_dir: "", shuffle: False}
  input_columns: ["input_ids"]
  drop_remainder: False
eval_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *eval_dataset}
use_parallel: True
parallel:
  parallel_mode: 1
  gradients_mean: False
  enable_alltoall: False
  full_batch: True
  search_mode: "sharding_propagation"
  enable_parallel_optimizer: True
  strategy_ckpt_save_file: "./ckpt_strategy.ckpt"
  parallel_optimizer_config: {gradient_accumulation_shard: False, parallel_optimizer_threshold: 64}
parallel_config:
  data_parallel: 1
  model_parallel: 8
  pipeline_stage: 2
  use_seq_parallel: True
  micro_batch_num: 128
  vocab_emb_dp: False
  gradient_aggregation_group: 4
micro_batch_interleave_num: 1
recompute_config:
  recompute: False
  select_recompute: False
  parallel_optimizer_comm_recompute: False
  mp_comm_recompute: True
  recompute_slice_activation: True
callbacks:
  - type: MFLossMonitor
  - {type: CheckpointMonitor, prefix: "codellama_34b", save_checkpoint_steps: 1000, integrated_save: False,
     async_save: False}
  - type: ObsMonitor
context:
  mode: 0
  device_target: "Ascend"
  max_call_depth: 10000
  max_device_memory: "55GB"
  save_graphs: False
  save_graphs_path: "./graph"
  device_id: 0
  jit_config: {jit_level: "O1"}
  memory_optimize_level: "O0"
model:
  model_config:
    {type: LlamaConfig, batch_size: 1, seq_length: 4096, hidden_size: 8192, num_layers: 48, num_heads: 64,
     vocab_size: 32000, multiple_of: 256, n_kv_heads: 8, rms_norm_eps: 1.0e-5, bos_token_id: 1, eos_token_id: 2,
     pad_token_id: 0, ignore_token_id: -100, theta: 1000000.0, compute_dtype: "float16",
     layernorm_compute_type: "float32", softmax_compute_type: "float16", rotary_dtype: "float16",
     param_init_type: "float16", use_past: False, extend_method: "None", use_flash_attention: True,
     fine_grain_interleave: 2, offset: 0, checkpoint_name_or_path: "", repetition_penalty: 1, max_decode_length: 512,
     top_k: 3, top_p: 1, do_sample: False}
  arch: {type: LlamaForCausalLM}
processor:
  return_tensors: ms
  tokenizer: {unk_token: '<unk>', bos_token: '<s>', eos_token: '</s>', pad_token: '<unk>', type: LlamaTokenizer}
  type: LlamaProcessor
metric: {type: PerplexityMetric}
runner_wrapper:
  type: MFTrainOneStepCell
  scale_sense: {type: DynamicLossScaleUpdateCell, loss_scale_value: 65536, scale_factor: 2, scale_window: 1000}
  use_clip_grad: True
eval_callbacks: [{type: ObsMonitor}]
auto_tune: False
filepath_prefix: './autotune'
autotune_per_step: 10
profile: False
profile_start_step: 1
profile_stop_step: 10
init_start_profile: False
profile_communication: False
profile_memory: True
layer_scale: False
layer_decay: 0.65
lr_scale_factor: 256
remote_save_url: "Please input obs url on AICC platform."
""")

PRETRAIN = {"train_dataset.input_columns": ["input_ids"]}
ON_32 = {"parallel_config.data_parallel": 2, "parallel_config.model_parallel": 4, "parallel_config.pipeline_stage": 4}
PREDICT = {
    "run_mode": "predict",
    "parallel_config.model_parallel": 4,
    "parallel_config.pipeline_stage": 1,
    "parallel_config.micro_batch_num": 1,
    "parallel_config.vocab_emb_dp": True,
    "context.ascend_config": {"precision_mode": "must_keep_origin_dtype"},
    "model.model_config.use_past": True,
    "model.model_config.block_size": 16,
    "model.model_config.num_blocks": 1024,
    "model.model_config.is_dynamic": True,
    "model.model_config.scaling_factor": 1.0,
    "processor.tokenizer.vocab_file": "path/to/tokenizer.model",
}


@pytest.fixture
def written(tmp_path):
    """A function that writes the YAML with changes, by dotted key; None removes one."""

    def write(changes: dict | None = None) -> Path:
        content = copy.deepcopy(TRAINING)
        for key, value in (changes or {}).items():
            *owners, name = key.split(".")
            place = content
            for owner in owners:
                place = place.setdefault(owner, {})
            if value is None:
                del place[name]
            else:
                place[name] = value
        path = tmp_path / "mf.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize("changes", [PRETRAIN, {}, ON_32, PREDICT], ids=["pretrain", "16p", "32p", "predict"])
def test_every_key_of_the_four_yamls_is_accounted_for(written, changes):
    keys = puna.migrate(written(changes)).keys
    assert len(keys) > 100
    assert [key.key for key in keys if key.fate == "unknown"] == []


@pytest.mark.parametrize(
    ("changes", "shipped", "devices"),
    [
        (PRETRAIN, "codellama-34b-pretrain", 16),
        ({}, "codellama-34b-finetune-16p", 16),
        (ON_32, "codellama-34b-finetune-32p", 32),
    ],
)
def test_the_numbers_are_those_of_the_recipes_that_ship_with_puna(written, tmp_path, changes, shipped, devices):
    recipe = puna.migrate(written(changes), tmp_path / "recipe.yaml").recipe
    expected = load_recipe(shipped)
    own = {field: getattr(expected, field) for field in ("data", "run_dir", "checkpoint", "compile")}
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    made = recipe.model_copy(update=own)
    layouts = [Layout.of(each, preset(each.model), devices) for each in (made, expected)]
    assert layouts[0] == layouts[1]
    assert made.model_copy(update={"parallel": expected.parallel}) == expected


#: Change to the YAML -> field of the recipe that follows it, and its value.
@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"seed": 7}, "seed", 7),
        ({"run_mode": "finetune", "seed": 7}, "seed", 7),
        ({"output_dir": "./runs/a"}, "run_dir", "runs/a/puna"),
        ({"load_checkpoint": "X.ckpt"}, "start", "weights"),
        ({"do_eval": True}, "data.valid", "data/valid"),
        ({"eval_step_interval": 50}, "validation.every", 50),
        ({"runner_config.batch_size": 2}, "micro_batch_rows", 2),
        ({"runner_config.batch_size": 2}, "batch_tokens", 256 * 4096),
        (
            {"parallel_config.pipeline_stage": 1, "runner_config.gradient_accumulation_steps": 4},
            "batch_tokens",
            4 * 4096,
        ),
        (
            {
                "parallel_config.pipeline_stage": 1,
                "runner_config.gradient_accumulation_steps": 4,
                "parallel.parallel_mode": 0,
            },
            "batch_tokens",
            4096,
        ),
        ({"optimizer.beta1": 0.8}, "optimizer.betas", (0.8, 0.95)),
        ({"optimizer.betas": [0.7, 0.9]}, "optimizer.betas", (0.7, 0.9)),
        ({"optimizer.eps": "1e-7"}, "optimizer.eps", 1e-7),
        ({"optimizer.eps": None}, "optimizer.eps", 1e-6),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.eps", 1e-8),
        ({"optimizer.weight_decay": 0.1}, "optimizer.weight_decay", 0.1),
        ({"lr_schedule.learning_rate": None, "optimizer.learning_rate": 2e-5}, "optimizer.peak_lr", 2e-5),
        ({"lr_schedule": None, "optimizer.learning_rate": 2e-5}, "schedule.name", "constant"),
        ({"lr_schedule.type": "LinearWithWarmUpLR"}, "schedule.name", "linear"),
        ({"lr_schedule.lr_end": 5e-6}, "schedule.final_fraction", 0.5),
        ({"lr_schedule.lr_end": 5e-6, "lr_schedule.type": "LinearWithWarmUpLR"}, "schedule.final_fraction", 0),
        ({"lr_schedule.total_steps": 500}, "steps", 500),
        ({"lr_schedule.total_steps": 500}, "schedule.warmup_steps", 15),
        ({"lr_schedule.warmup_ratio": None, "lr_schedule.warmup_steps": 9}, "schedule.warmup_steps", 9),
        ({"parallel.enable_parallel_optimizer": False, **ON_32}, "parallel.dp_replicate", 2),
        ({"parallel_config.context_parallel": 2}, "parallel.cp", 2),
        ({"parallel_config.data_parallel": 4}, "parallel.dp_shard", 4),
        ({"micro_batch_interleave_num": 2}, "batch_tokens", 256 * 4096),
        ({"use_parallel": False}, "parallel.tp", 1),
        ({"use_parallel": False, "parallel_config.data_parallel": 8}, "batch_tokens", 4096),
        ({"recompute_config.recompute": True}, "recompute", "block"),
        ({"recompute_config.recompute": [0, 5]}, "recompute", "block"),
        ({"recompute_config.recompute": [0, 5]}, "recompute_layers", 5),
        ({"recompute_config.recompute": [24, 24]}, "recompute_layers", None),  # all of a stage
        ({"recompute_config.recompute": [True, 0]}, "recompute_layers", None),
        ({"recompute_config.recompute": [0, 0]}, "recompute", "none"),
        ({"recompute_config.select_recompute": [2, 2]}, "recompute_layers", 2),
        ({"recompute_config.select_recompute": {"feed_forward.mul": [1, 3]}}, "recompute_layers", 3),
        ({"recompute_config.select_recompute": [r"feed_forward\.mul"]}, "recompute_layers", None),
        ({"recompute_config.select_recompute": {"feed_forward.mul": True}}, "recompute", "selective"),
        ({"swap_config": {"swap": True, "default_prefetch": 1}}, "recompute", "offload"),
        ({"callbacks": [{"type": "MFLossMonitor", "per_print_times": 10}]}, "log.every", 10),
        ({"callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 20}]}, "checkpoint.every", 20),
        ({"callbacks": [{"type": "CheckpointMonitor", "keep_checkpoint_max": 2}]}, "checkpoint.keep", 2),
        ({"callbacks": [{"type": "CheckpointMointor", "keep_checkpoint_max": 2}]}, "checkpoint.keep", 2),
        ({"context.device_target": "CPU"}, "device", "cpu"),
        ({"runner_wrapper.use_clip_grad": False}, "optimizer.max_grad_norm", None),
        ({"runner_wrapper.max_grad_norm": 0.5}, "optimizer.max_grad_norm", 0.5),
        ({"model.model_config.seq_length": 2048}, "sequence_length", 2048),
        ({"model.model_config.compute_dtype": "float32"}, "precision", "fp32"),
        ({"model.model_config.pp_interleave_num": 2}, "parallel.stages_per_rank", 2),
        ({"model.model_config.num_layers": 2}, "model", "weights"),
        ({"model.model_config.theta": 1e4}, "model", "weights"),  # not codellama-34b, whose base is 1e6
        ({"model.model_config.extend_method": "PI", "model.model_config.scaling_factor": 2}, "model", "weights"),
        ({"model.model_config.rms_norm_eps": 1e-6}, "model", "weights"),
    ],
)
def test_a_value_goes_where_it_belongs(written, changes, field, value):
    found = puna.migrate(written(changes)).recipe
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


def test_of_two_presets_of_one_size_the_one_with_the_rotary_base_is_taken(written):
    sizes = {"num_layers": 80, "vocab_size": 32016, "intermediate_size": 28672}
    changes = {f"model.model_config.{name}": value for name, value in sizes.items()}
    assert puna.migrate(written(changes)).recipe.model == "codellama-70b"
    assert puna.migrate(written({**changes, "model.model_config.theta": 1e4})).recipe.model == "codellama-70b-python"


def test_what_values_ask_for_beyond_a_recipe_is_named(written):
    changes = {
        "model.model_config.theta": 1e4,
        "lr_schedule.warmup_lr_init": "1e-6",
        "optimizer.type": "Lamb",
    }
    model, warmup, optimizer, *_ = puna.migrate(written(changes), faithful=True).differences
    assert model.startswith("model: no preset has these sizes and rotary positions")
    assert warmup == "lr_schedule.warmup_lr_init: the warm-up starts from 0, not from 1e-06"
    assert optimizer == "optimizer.type: Lamb is not there; the optimizer is AdamW"
    with_weights = puna.migrate(written({"model.model_config.theta": 1e4, "load_checkpoint": "X.ckpt"}), faithful=True)
    assert (with_weights.recipe.model, with_weights.recipe.start) == ("weights", None)
    assert not [line for line in with_weights.differences if line.startswith("model")]


@pytest.mark.parametrize(
    ("optimizer", "is_faithful", "said"),
    [
        ("AdamW", True, ["optimizer.type: AdamW corrects the bias of its running means; this recipe does not"]),
        ("AdamW", False, []),
        ("adamw", True, []),  # there an alias of AdamWeightDecay
        ("adamw", False, [
            "AdamW corrects the bias of its running means; adamw does not, and has smaller first steps"
        ]),
    ],
)  # fmt: skip
def test_whether_the_bias_is_corrected_is_said_where_mindformers_did_otherwise(written, optimizer, is_faithful, said):
    found = puna.migrate(written({"optimizer": {"type": optimizer}}), faithful=is_faithful).differences
    assert [line for line in found if "bias" in line] == said


def test_which_mean_the_loss_is_is_said_where_mindformers_took_the_other(written):
    for is_mean in (True, False):
        path = written({"calculate_per_token_loss": is_mean})
        faithful, sound = (str(puna.migrate(path, faithful=keeps).differences) for keeps in (True, False))
        assert ("the mean of the means of micro-batches" in faithful) == is_mean
        assert ("the mean of the means of micro-batches" in sound) == (not is_mean)


def test_epochs_become_steps_where_the_rows_are_known(written):
    assert puna.migrate(written(), rows=10_000).recipe.steps == 2 * (10_000 // 128)
    unknown = puna.migrate(written())
    assert unknown.recipe.steps == 1000
    assert any("the YAML counts epochs; give --rows" in difference for difference in unknown.differences)


def test_dialogs_are_counted_as_they_are_packed(shared, written, tmp_path):
    fixtures = shared / "fixtures/mindspore"
    with tarfile.open(fixtures / "preprocess/qa512.mindrecord.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    data = tmp_path / "qa512.mindrecord"
    path = written({
        "train_dataset.data_loader.dataset_dir": str(data), "use_parallel": False, "parallel_config.pipeline_stage": 1,
        "runner_config.epochs": 10, "model.model_config.seq_length": 2048,
    })  # fmt: skip
    tokenizer = fixtures / "tokenizer/tokenizer.model"
    puna.prepare("mindrecord", data, tmp_path / "train", tokenizer=tokenizer, workers=1)
    dialogs, packed = (len(open_rows(Dataset.open(tmp_path / "train"), length)) for length in (2, 2048))
    assert dialogs == 4 * packed
    found = puna.migrate(path)
    assert abs(found.recipe.steps - 10 * packed) <= 10
    assert not [line for line in found.differences if line.startswith("steps")]
    assert puna.migrate(path, faithful=True).recipe.steps >= 10 * dialogs


def test_steps_that_were_counted_in_rows_of_one_dialog_are_named(written):
    stated, counted = ({"lr_schedule.total_steps": 500}, None, "stated"), ({}, 10_000, "counted from --rows")
    for changes, rows, word in (stated, counted):
        line = puna.migrate(written(changes), rows=rows).differences[-1]
        assert re.fullmatch(rf"steps: \d+ are {word}; rows of one dialog .*`puna inspect .* 4096` counts them", line)
        assert "steps: " not in str(puna.migrate(written({**PRETRAIN, **changes}), rows=rows).differences)
        assert not puna.migrate(written(changes), rows=rows, faithful=True).differences


def test_epochs_of_another_length_than_the_schedule_are_named(written):
    path = written({"lr_schedule.total_steps": 156})
    assert not puna.migrate(path, rows=10_000, faithful=True).differences
    (line,) = puna.migrate(path, rows=5_000, faithful=True).differences
    assert line.startswith("steps: 156 of lr_schedule.total_steps")
    assert line.endswith("the epochs have 78")


def test_layers_that_recompute_are_counted_by_stage_and_run_of_layers(written):
    changes = {"model.model_config.pp_interleave_num": 2, "recompute_config.recompute": [[1, 2], [2, 2]]}
    found = puna.migrate(written(changes), faithful=True)
    assert (found.recipe.recompute, found.recipe.recompute_layers) == ("block", 2)
    assert found.differences[0].startswith("recompute_config.recompute: 1 to 2 layers by stage; recompute_layers")
    even = puna.migrate(written({"recompute_config.recompute": [3, 3]}), faithful=True)
    assert not [difference for difference in even.differences if "recompute" in difference]


def test_a_second_way_of_recomputing_is_named(written):
    changes = {"recompute_config.recompute": [1, 1], "recompute_config.select_recompute": True}
    found = puna.migrate(written(changes), faithful=True)
    assert (found.recipe.recompute, found.recipe.recompute_layers) == ("block", 1)
    assert found.differences[0].startswith("recompute_config.select_recompute: left out beside recompute_config.rec")


def test_slices_are_converted_by_their_strategy_files(written):
    path = written({"load_checkpoint": "my out/checkpoint", "src_strategy_path_or_dir": "out/strategy"})
    first = puna.migrate(path).steps[0]
    assert first == f"puna convert 'my out/checkpoint' -o weights --config {path} --strategy out/strategy"


def test_fates_are_told_apart(written):
    changes = {"profile": True, "lr_scale": True, "parallel_config.mystery": 3}
    found = {key.key: key for key in puna.migrate(written(changes)).keys}
    assert found["parallel_config.vocab_emb_dp"].fate == "had no effect"
    assert found["parallel_config.model_parallel"].why == "parallel.tp"
    assert found["profile"].fate == "not there"
    assert found["lr_scale"].fate == "not there"
    assert found["lr_scale_factor"].why == "only lr_scale uses it"
    assert found["layer_scale"].fate == "not there, was off"
    assert found["callbacks.ObsMonitor"].fate == "not there"
    assert found["parallel_config.mystery"].fate == "unknown"
    assert found["train_dataset_task.dataset_config.repeat"].fate == "not needed"


def test_of_two_monitors_the_first_counts_and_the_second_is_named(written):
    every = [{"type": "CheckpointMonitor", "save_checkpoint_steps": steps} for steps in (1000, 50)]
    found = puna.migrate(written({"callbacks": every}))
    assert found.recipe.checkpoint.every == 1000
    monitors = [(key.key, key.value, key.fate) for key in found.keys if "CheckpointMonitor" in key.key]
    assert monitors == [
        ("callbacks.CheckpointMonitor.save_checkpoint_steps", 1000, "translated"),
        ("callbacks.CheckpointMonitor 2.save_checkpoint_steps", 50, "not there"),
    ]


def test_a_yaml_for_prediction_becomes_a_command(written, capsys):
    path = written(PREDICT)
    assert run(["migrate", str(path)]) == 0
    convert_line, generate_line = capsys.readouterr().out.splitlines()
    assert convert_line == f"puna convert CKPT -o weights --config {path}"
    assert generate_line == "puna generate weights 'def quick_sort(arr):' --max-tokens 512"
    short = puna.migrate(written({**PREDICT, "model.model_config.max_new_tokens": 64}))
    assert short.steps[-1].endswith("--max-tokens 64")
    sampled = puna.migrate(written({**PREDICT, "model.model_config.do_sample": True, "model.model_config.top_p": 0.9}))
    assert sampled.steps[-1].endswith("--max-tokens 512 --temperature 1 --top-k 3 --top-p 0.9")


def test_the_command_writes_the_recipe_and_names_the_keys(written, tmp_path, capsys):
    path, recipe = written({"load_checkpoint": "out/X.ckpt"}), tmp_path / "my recipe.yaml"
    assert run(["migrate", str(path), "-o", str(recipe)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{recipe}\n"
    assert "parallel_config.vocab_emb_dp = False: MindFormers set it to False with more" in err
    assert "AdamW corrects the bias of its running means" in err
    text = recipe.read_text()
    assert f"#   puna convert out/X.ckpt -o weights --config {path}\n" in text
    assert "#   puna prepare mindrecord X.mindrecord -o data/train --tokenizer tokenizer.model\n" in text
    assert f"#   puna launch '{recipe}' --nodes 2 --gpus 8 --master-addr HOST\n" in text
    assert run(["migrate", str(path), "-o", str(recipe)]) == 1
    capsys.readouterr()
    assert run(["migrate", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["model"] == "codellama-34b"
    assert run(["migrate", str(path), "--faithful"]) == 0
    out, err = capsys.readouterr()
    assert "arithmetic: mindformers" in out
    assert "\ntrains otherwise:\n" in err
    assert "AdamW corrects" not in err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"arch": {}}}, PunaError, "has no model.model_config"),
        (
            {"model.model_config.moe_config": {"expert_num": 8}},
            PunaError,
            r"model\.model_config\.moe_config\.expert_num is 8; puna has no network with experts",
        ),
        ({"run_mode": "eval"}, UsageError, "run_mode 'eval' is not one .* one of train, finetune, predict; `puna eval"),
        ({**PREDICT, "moe_config": {"expert_num": 8}}, PunaError, r"moe_config\.expert_num is 8"),
        ({"model.model_config.type": "QwenConfig"}, PunaError, "describes QwenConfig, not LlamaConfig"),
        (
            {"lr_schedule.type": "PolynomialWithWarmUpLR"},
            UsageError,
            "'PolynomialWithWarmUpLR' is not one that puna",
        ),
        ({"optimizer.eps": "tiny"}, UsageError, r"optimizer\.eps is 'tiny'; a number was expected"),
        ({"optimizer.beta1": 1.5}, UsageError, r"optimizer\.betas"),
    ],
)
def test_what_cannot_be_taken_is_said(written, changes, error, message):
    with pytest.raises(error, match=message):
        puna.migrate(written(changes))


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "", "a: b: c"])
def test_what_is_no_yaml_of_mindformers_is_said(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(PunaError, match=r"x\.yaml"):
        puna.migrate(tmp_path / "x.yaml")


@pytest.mark.parametrize("key", TRANSLATED)
def test_no_value_breaks_it_without_a_word(written, key):
    for value in ("x", -1, 0, 1.5, 3, True, float("inf"), float("nan"), [], [1, 2, 3], {"a": 1}, ["a"], "1e-5"):
        changes = {"callbacks": {}, key: value} if key.startswith("callbacks") else {key: value}
        try:
            puna.migrate(written(changes))
        except PunaError as error:
            assert len(str(error)) > 10  # noqa: PT017


def test_a_yaml_that_repeats_itself_without_end_is_refused(tmp_path):
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}")
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with pytest.raises(PunaError, match=r"x\.yaml has more than 10,000 values"):
        puna.migrate(tmp_path / "x.yaml")
    (tmp_path / "y.yaml").write_text("a: &a {b: *a}")
    with pytest.raises(PunaError, match=r"y\.yaml refers to itself without end"):
        puna.migrate(tmp_path / "y.yaml")


def test_the_guide_names_every_key():
    guide = (Path(__file__).parents[2] / "docs/coming_from_mindformers.md").read_text(encoding="utf-8")
    keys = {key for table in (TRANSLATED, NOT_NEEDED, NO_EFFECT, NOT_THERE, GENERATION) for key in table}
    missing = [key for key in keys if not any(part in guide for part in (key, key.rpartition(".")[2]))]
    assert missing == []


@pytest.mark.parametrize(
    ("reference", "rows", "weight_decay"),
    [("train_wiki", "wiki128", 0.0), ("train_qa", "qa512", 0.0), ("train_qa_wd0.1", "qa512", 0.1)],
)
def test_a_faithful_run_repeats_mindformers_own(shared, written, tmp_path, monkeypatch, reference, rows, weight_decay):
    """The YAML, rows and weights of MindFormers' own six steps, through migrate, prepare, convert and train."""
    fixtures = shared / "fixtures/mindspore"
    with tarfile.open(fixtures / f"preprocess/{rows}.mindrecord.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    length = int(rows.lstrip("wikqa"))
    small = {"seq_length": length, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
             "vocab_size": 512, "multiple_of": 16, "max_position_embedding": 1024,
             "compute_dtype": "float32"}  # fmt: skip
    path = written({
        "load_checkpoint": str(fixtures / "ckpt/tiny_llama_fp32.ckpt"),
        "train_dataset.data_loader.dataset_dir": f"{rows}.mindrecord",
        "runner_config.batch_size": 2, "use_parallel": False, "parallel_config.pipeline_stage": 1,
        "lr_schedule.learning_rate": 1e-3, "lr_schedule.warmup_ratio": 0.3, "lr_schedule.total_steps": 10,
        "optimizer.weight_decay": weight_decay, "context.device_target": "CPU",
        **{f"model.model_config.{name}": value for name, value in small.items()},
    })  # fmt: skip
    migration = puna.migrate(path, "recipe.yaml", faithful=True)
    convert(fixtures / "ckpt/tiny_llama_fp32.ckpt", "weights", config=path)
    tokenizer = fixtures / "tokenizer/tokenizer.model"
    puna.prepare("mindrecord", f"{rows}.mindrecord", "data/train", tokenizer=tokenizer, workers=1, faithful=True)
    assert migration.recipe.sequence_length == length + 1
    monkeypatch.setattr(loader, "shuffled", lambda places, length, key: places)  # MindFormers' order is in the file
    puna.train("recipe.yaml")
    expected = np.load(fixtures / f"reference/{reference}.npz")
    steps = [json.loads(line) for line in Path("output/puna/metrics.jsonl").read_text().splitlines()]
    for i in range(6):
        assert steps[i]["lr"] == pytest.approx(expected["lr"][i], rel=1e-6)
        assert steps[i]["loss"] == pytest.approx(expected["loss"][i], rel=1e-5, abs=1e-7)
        assert steps[i]["grad_norm"] == pytest.approx(expected["gnorm"][i], rel=1e-4, abs=1e-6)
