"""Llama-3.1-8B, adapters of rank 16 on all linear maps, 4,096 tokens, one GPU.

Hardware: one GPU of 80 GB or more. Put the Hugging Face folder in MODEL_DIR and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/gpu_8b.py --config.run.dir=runs/gpu_8b

Nothing of it is measured: `sft-jax plan` compiles for TPUs, and no run of it has been timed. By count, the base takes
15 GiB in bfloat16, adapters and their optimizer 0.5, and each layer's input 32 MiB; attention is the reference, whose
score blocks are made one at a time. `--config.model.attention=pallas_gpu` makes none, by a kernel that has the same
answers where it is interpreted, and that no GPU has run yet.
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = os.environ.get("MODEL_DIR", "models/Llama-3.1-8B-Instruct")
    config.model.preset = "llama3.1-8b"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 4096
    config.batch.batch_size = 16
    config.batch.grad_accum_steps = 16
    config.model.frozen_dtype = "bfloat16"
    config.lora.rank = 16
    config.lora.alpha = 32
    config.optimizer.learning_rate = 1e-4
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
