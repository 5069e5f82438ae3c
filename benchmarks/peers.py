"""The references of `train_speed.py`, run by a Python that has torch, transformers and trl (never by ours).

    python peers.py prepare --assets DIR --to DIR     GSM8K as chats, and the Llama-2 tokenizer as transformers reads it
    python peers.py trl     --data DIR                TRL's SFTTrainer, packing="bfd"
    python peers.py torch   --data DIR                a minimal hand-written loop: eager, full head, AdamW

Each of the last two prints one JSON object: supervised tokens per second over the measured steps.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

SHAPE = dict(vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6)
ROWS, LENGTH = 8, 512

# What sft_jax's built-in llama2 template writes for a chat of one user and one assistant turn, marked for TRL.
TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{%- else -%}{%- generation -%}{{ ' ' + m['content'] + ' ' + eos_token }}{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}"
)


def prepare(assets: Path, to: Path) -> None:
    """`chats.jsonl` and `tokenizer/`."""
    import sentencepiece
    from transformers import LlamaTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    to.mkdir(parents=True, exist_ok=True)
    with (to / "chats.jsonl").open("w") as out:
        for line in (assets / "sft/gsm8k/train.jsonl").read_text().splitlines():
            row = json.loads(line)
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            out.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    model = sentencepiece.SentencePieceProcessor(model_file=str(assets / "tokenizers/llama2/tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces)}
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # Merges in the order of scores: transformers' own reading of the bare .model orders them by id, and differs.
    tokenizer = LlamaTokenizerFast(
        vocab=vocab, merges=generate_merges(vocab, scores), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(to / "tokenizer")


def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPE, max_position_embeddings=2048, tie_word_embeddings=True, rope_theta=10000.0, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def report(marks: list[tuple[float, int]], warmup: int) -> None:
    """`marks` holds (time at its end, supervised tokens) of every step."""
    seconds = marks[-1][0] - marks[warmup - 1][0]
    supervised = sum(tokens for _, tokens in marks[warmup:])
    print(json.dumps({"supervised_tokens_per_second": supervised / seconds, "first_step_at": marks[0][0]}))


def run_trl(data: Path, steps: int, warmup: int) -> None:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets_")
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    marks: list[tuple[float, int]] = []
    supervised = 0

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            nonlocal supervised
            supervised += int((inputs["labels"] != -100).sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            nonlocal supervised
            marks.append((time.time(), supervised))
            supervised = 0

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="trl_"), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=ROWS, max_length=LENGTH, max_steps=warmup + steps, learning_rate=3e-4,
        assistant_only_loss=True, packing=True, packing_strategy="bfd", report_to="none", save_strategy="no",
        disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Counting(
        model=LlamaForCausalLM(llama_config()),
        args=config,
        train_dataset=load_dataset("json", data_files=str(data / "chats.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(data / "tokenizer"),
        callbacks=[Clock()],
    )
    trainer.train()
    shutil.rmtree(config.output_dir)
    report(marks, warmup)


def run_torch(data: Path, steps: int, warmup: int) -> None:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import AutoTokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    embed, mlp, num_heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_attention_heads"]
    head_dim = embed // num_heads
    angles = torch.outer(torch.arange(LENGTH).float(), 1e4 ** (-torch.arange(0, head_dim, 2).float() / head_dim))
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(embed, 3 * embed, bias=False), nn.Linear(embed, embed, bias=False)
            self.gate_up, self.down = nn.Linear(embed, 2 * mlp, bias=False), nn.Linear(mlp, embed, bias=False)
            self.norm1, self.norm2 = nn.RMSNorm(embed, eps=1e-5), nn.RMSNorm(embed, eps=1e-5)

        def forward(self, x):
            q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(x.shape))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)

    embedding = nn.Embedding(SHAPE["vocab_size"], embed)
    nn.init.normal_(embedding.weight, std=0.02)
    body = nn.Sequential(*(Layer() for _ in range(SHAPE["num_hidden_layers"])), nn.RMSNorm(embed, eps=1e-5))
    params = [*embedding.parameters(), *body.parameters()]
    optimizer = torch.optim.AdamW(params, lr=3e-4, weight_decay=0.0, fused=True)

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    ids, labels, needed = [], [], (warmup + steps) * ROWS * LENGTH
    for line in (data / "chats.jsonl").read_text().splitlines():
        chat = tokenizer.apply_chat_template(
            json.loads(line)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids += chat["input_ids"]
        pairs = zip(chat["input_ids"], chat["assistant_masks"], strict=True)
        labels += [token if supervised else -100 for token, supervised in pairs]
        if len(ids) >= needed:
            break
    rows, wanted = (torch.tensor(values[:needed]).view(-1, ROWS, LENGTH) for values in (ids, labels))

    marks = []
    for inputs, targets in zip(rows, wanted, strict=True):
        hidden = body(embedding(inputs))[:, :-1].reshape(-1, embed)
        targets = targets[:, 1:].reshape(-1)
        F.cross_entropy(hidden @ embedding.weight.T, targets).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append((time.time(), int((targets != -100).sum())))
    report(marks, warmup)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "trl", "torch"))
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.assets, options.to)
    else:
        {"trl": run_trl, "torch": run_torch}[options.what](options.data, options.steps, options.warmup)
