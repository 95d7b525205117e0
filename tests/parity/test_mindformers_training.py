"""Six training steps of the real MindFormers, repeated: loss, masks, clipping, schedule and weights.

Its arithmetic is stated beside the files: Adam without bias correction, targets masked where the *input* token is
padding, weight decay on matrices alone, and a learning rate that is 0 at the first update.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.config import Optimizer, Schedule
from puna.data.loader import Batch
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.parallel.model import DistributedModel
from puna.train.gradients import Gradients
from puna.train.loss import IGNORE
from puna.train.optimizer import AdamW
from puna.train.schedule import learning_rate
from puna.train.step import train_step

#: MindFormers' name of a weight -> ours.
RENAMED = [
    ("tok_embeddings.embedding_weight", "embed_tokens.weight"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("norm_out", "norm"),
]


def _model(fixtures: Path) -> Llama:
    model = Llama(ModelConfig.from_json(json.loads((fixtures / "ckpt/hf_config.json").read_text())))
    weights = np.load(fixtures / "ckpt/tiny_llama_hf_fp32.npz")
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    return model


def _batch(rows: np.lib.npyio.NpzFile, step: int) -> Batch:
    ids = rows["input_ids"]
    chosen = [(2 * step) % len(ids), (2 * step + 1) % len(ids)]
    tokens = ids[chosen, :-1]
    targets = rows["labels" if "labels" in rows else "input_ids"][chosen, 1:].copy()
    targets[tokens == 0] = IGNORE
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, targets, np.zeros_like(tokens), positions)


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
@pytest.mark.parametrize(
    ("reference", "rows", "weight_decay"),
    [("train_wiki", "wiki128_rows", 0.0), ("train_qa", "qa512_rows", 0.0), ("train_qa_wd0.1", "qa512_rows", 0.1)],
)
def test_six_steps_of_mindformers(
    shared: Path, reference: str, rows: str, weight_decay: float, micro_batch_rows: int
) -> None:
    fixtures = shared / "fixtures/mindspore"
    expected = np.load(fixtures / f"reference/{reference}.npz")
    data = np.load(fixtures / f"preprocess/{rows}.npz")
    model = DistributedModel.alone(_model(fixtures))
    settings = Optimizer(peak_lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, max_grad_norm=1.0)
    optimizer = AdamW(model.weights.items(), settings, seed=0, bias_correction=False)
    schedule = Schedule(warmup_steps=3, final_fraction=0.0)
    for step in range(6):
        lr = learning_rate(step, schedule, peak_lr=1e-3, steps=10)
        assert lr == pytest.approx(expected["lr"][step], rel=1e-6)
        result = train_step(
            model, Gradients(optimizer), _batch(data, step), update=step + 1, lr=lr,
            micro_batch_rows=micro_batch_rows, max_grad_norm=1.0, skips_empty=False,
        )  # fmt: skip
        assert result.loss == pytest.approx(expected["loss"][step], rel=2e-6, abs=1e-7)
        assert result.grad_norm == pytest.approx(expected["gnorm"][step], rel=2e-5, abs=1e-6)
    heads = {key.removeprefix("head/"): expected[key] for key in expected.files if key.startswith("head/")}
    ours = model.weights
    assert len(heads) == len(ours)
    for name, head in heads.items():
        for theirs, mine in RENAMED:
            name = name.replace(theirs, mine)
        np.testing.assert_allclose(ours[name].detach().flatten()[: len(head)].numpy(), head, atol=1e-6)
