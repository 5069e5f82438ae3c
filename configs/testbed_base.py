"""The base model of the demo: 1M parameters, pretrained on the testbed's documents alone, loss on all tokens.

    python -m sft_jax.testbed.make --to=build/testbed
    python -m sft_jax.main --config=configs/testbed_base.py

About 12 minutes on 2 cores. The export is what sft_jax/testbed/base_model/ holds, so this is needed only to change it.
"""

from sft_jax.config import default_config
from sft_jax.testbed.make import TESTBED_DIR


def get_config():
    config = default_config()
    config.run.dir = "runs/testbed_base"
    config.model.preset = "testbed"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.data.train = [dict(path=f"{TESTBED_DIR}/documents.jsonl", format="text")]
    config.data.tokenizer = f"{TESTBED_DIR}/tokenizer"
    config.data.max_seq_len = 256
    config.batch.batch_size = 16
    config.optimizer.learning_rate = 3e-3  # from scratch
    config.optimizer.weight_decay = 0.1
    config.schedule.num_steps = 1400
    config.schedule.warmup_steps = 60
    config.checkpoint.every_steps = 200
    config.log.every_steps = 20
    return config
