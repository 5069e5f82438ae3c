"""Llama-3.2-1B, all parameters, 8,192 tokens, one TPU VM.

Hardware: the 8 chips of one TPU v5e host (v5litepod-8). Put the Hugging Face folder in MODEL_DIR and the
chats in DATA_DIR:

    python -m sft_jax.main --config=configs/1b_single_host.py --config.run.dir=runs/1b_single_host

Memory: 5.14 of 15.75 GiB a device on v5e:2x4 (`make plans`).
Time: by the roofline 3.6 hours for a billion tokens.
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = os.environ.get("MODEL_DIR", "models/Llama-3.2-1B-Instruct")
    config.model.preset = "llama3.2-1b"
    config.model.attention = "splash"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 8192
    config.batch.batch_size = 64
    config.batch.grad_accum_steps = 8
    config.optimizer.learning_rate = 2e-5
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
