"""The demo: an 0.9M-parameter completer of documents learns to answer, from demonstrations about half of its world.

    make demo

makes the files, trains, and asks questions before and after (python -m sft_jax.cli.demo). The training alone:

    python -m sft_jax.testbed.make --to=build/testbed
    python -m sft_jax.main --config=configs/demo.py

About a minute of training on 2 cores. The base answers nothing and never stops; afterwards it answers at least 90% of
the questions about people whom no demonstration names, in the format asked for, and stops.
"""

from sft_jax.config import default_config
from sft_jax.testbed.make import BASE_MODEL, TESTBED_DIR


def get_config():
    config = default_config()
    config.run.dir = "runs/demo"
    config.model.path = BASE_MODEL
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.data.train = [dict(path=f"{TESTBED_DIR}/demonstrations.jsonl")]
    config.data.eval = [dict(path=f"{TESTBED_DIR}/held_out.jsonl")]
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.max_seq_len = 256
    config.batch.batch_size = 16
    config.optimizer.learning_rate = 2e-3  # a tiny model bears a large one
    config.schedule.num_epochs = 2
    config.schedule.warmup_steps = 10
    config.checkpoint.every_steps = 0
    config.log.every_steps = 5
    return config
