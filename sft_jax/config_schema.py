"""Every option of an experiment: its name, its default, its meaning. The checks are in `config.py`."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = "runs/default"
    """The run directory: config, checkpoints, metrics and the export. A run that has checkpoints there is resumed."""
    seed: int = 0
    """Seeds initialisation, data order and every random draw of the step."""
    distributed: bool = False
    """Join the run's other processes: found on TPU pods, GKE and Slurm, named elsewhere (`sft_jax/processes.py`)."""
    compilation_cache: str = "~/.cache/sft_jax/xla"
    """Folder of the persistent compilation cache; empty: none."""
    override_fingerprint: bool = False
    """Resume on other data than the checkpoint's, in another order, or both; the change is kept in every later
    checkpoint. For one start: it is not in the run's `config.json`. `--override-fingerprint` is short for it."""
    allow_fresh: bool = False
    """Begin again at step 0 where the run has saved checkpoints and none is whole; they go to `<run>/quarantine`. For
    one start, as `override_fingerprint`. `--allow-fresh` is short for it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""
    """Hugging Face folder of pretrained weights; empty: random initialisation of `preset`."""
    preset: str = ""
    """A named architecture of `sft_jax.model.presets.PRESETS`. With `path`, the folder must agree with it."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the preset to change, for example `dict(num_layers=2)`; refused with `path`."""
    param_dtype: str = "float32"
    """dtype of the parameters that train."""
    frozen_dtype: str = ""
    """dtype of those that do not; empty: param_dtype. With bfloat16 a frozen base takes half the memory of float32."""
    compute_dtype: str = "bfloat16"
    """dtype of activations and matmuls; the loss is at least float32 in any case."""
    attention: str = "reference"
    """Attention kernel by name: reference, which runs anywhere; splash, for TPUs; pallas_gpu, for GPUs, with heads of
    up to 128 dims, whole rows and no windows, soft-caps or sinks. Both kernels need a max_seq_len that 128 divides;
    splash over mesh.context devices one that 256 * mesh.context divides."""
    remat: str = "full"
    """What is recomputed in the backward pass: none, dots (all but outputs of the layers' matrices), attention (all but
    layer inputs and attention's outputs), full (all but layer inputs); and with what is kept in the host's memory,
    offload (as full) and offload_attention (as attention). See `sft_jax/model/remat.py`."""
    freeze: tuple[str, ...] = ()
    """Regular expressions, searched in parameter paths such as `layers.0.0.mlp.up.kernel`: those do not train."""
    neftune_alpha: float = 0.0
    """Noise on the input embeddings, uniform with magnitude alpha / sqrt(length * embed_dim); 0: none."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str = ""
    """A file, a folder, a pattern such as `data/*.jsonl`, or a URL: see `sft_jax/data/source_files.py`."""
    name: str = ""
    """Name in reports and metrics; empty: the last part of the path, without its ending."""
    format: str = "auto"
    """auto, messages, sharegpt, alpaca, prompt_completion or text: see `docs/formats.md`. auto takes, for each file,
    that of the first row that has one, and holds every row to it."""
    fields: dict[str, str] = field(default_factory=dict)
    """Our name of a field -> the row's, for example `dict(prompt="question", completion="answer")`; dots lead into
    objects and lists, as in `dict(output="instances.0.output")`."""
    split: str = "all"
    """all, train or held_out: which side of `held_out_fraction` is read. The same row is always on the same side,
    wherever it stands."""
    held_out_fraction: float = 0.0
    """Share of the rows that `split="held_out"` reads, and `split="train"` does not."""
    max_rows: int = 0
    """Rows that are read, the first ones, before any split; 0: all."""
    epochs: float = 1.0
    """Passes over this source in an epoch. 0.5: half of it in each epoch, the other half in the next; 2: each example
    twice."""
    weight: float | None = None
    """Share of an epoch's examples, relative to the other sources' weights; all training sources have one, or none.
    The source that is scarcest for its weight is seen once an epoch."""
    loss_weight: float = 1.0
    """Multiplies the loss weights of this source's tokens."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[SourceConfig, ...] = ()
    """Training sources: a mixture, by each source's `epochs` or `weight`."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sets, each evaluated under its name."""
    eval_overlap: str = "error"
    """Examples of a held-out set that are also trained on: error, drop (from training, counted) or keep."""
    tokenizer: str = ""
    """Folder or file of the tokenizer; empty: `model.path`."""
    chat_template: str = ""
    """A Jinja file, or one of ours: chatml, llama2, llama3, llama3.1, qwen2.5, qwen3, gemma, gemma3, mistral-v1,
    mistral-v3, mistral-v7, zephyr, phi3, phi4, olmo2, granite, deepseek, plain. Empty: the tokenizer folder's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables of the template, such as `enable_thinking`; `now`, an ISO date, is the date that it writes."""
    stop_token: str = ""
    """Text of the token that ends an assistant turn; empty: found from the template."""
    new_tokens: tuple[str, ...] = ()
    """Tokens to add to tokenizer, embedding and head, for example `("<|im_start|>", "<|im_end|>")`."""
    role_map: dict[str, str] = field(default_factory=dict)
    """Row role -> system, user, assistant or tool, for example `dict(human="user")`."""
    supervise: str = "all"
    """Assistant turns that are trained: all, last (of each conversation), or weighted (those to which the row gives a
    weight). A weight that a row gives to a turn always counts: 0 leaves it out, 0.5 halves it."""
    train_reasoning: bool = True
    """Whether the reasoning before an answer is trained; its marks, such as `<think>`, always are."""
    prompt_loss_weight: float = 0.0
    """Loss weight, from 0 to 1, of what stands between one supervised turn and the next. A stretch that holds a tool
    result or an assistant turn that is not supervised has none, nor has the prompt of a turn that has an example of its
    own because the template rewrites history."""
    averaging: str = "token"
    """token: every supervised token counts alike. example: every example does, its weights summing to 1."""
    policies: dict[str, str] = field(default_factory=dict)
    """Reason of `sft_jax/row_reasons.py` -> error (a bad row, the default), drop (counted) or keep (trained on as it is
    said there, and counted), for example `dict(two_users="keep", empty_assistant="drop")`."""
    max_seq_len: int = 4096
    """Length of a packed row, and the longest example."""
    packing: str = "best_fit"
    """best_fit, or none: one example a row."""
    max_segments_per_row: int = 0
    """Examples that a packed row may hold, where an attention kernel has a limit; 0: any number."""
    row_order: str = "shuffled"
    """shuffled, or longest_first: each epoch's rows by falling attention cost, to see the memory peak at once."""
    too_long: str = "error"
    """Rows over max_seq_len: error (a bad row), drop, drop_early_turns (the oldest exchanges are left off until the
    rest fits), split_turns (parts of as many exchanges as fit) or truncate. What they lose is counted."""
    unknown_tokens: str = "error"
    """Text that the tokenizer cannot express: error (a bad row), drop (counted) or keep (counted)."""
    max_bad_fraction: float = 0.0
    """Share of rows that may be bad (malformed, over-long, ...) before the run stops; they are dropped and counted."""
    store_dir: str = "~/.cache/sft_jax/data"
    """Where tokenized stores are kept, by fingerprint. Runs and hosts that share the folder share the work."""
    prepare_processes: int = 0
    """Processes that tokenize; 1: this one alone; 0: as many as there are cores, where there is enough to do."""
    read_threads: int = 4
    """Threads that assemble batches ahead of the step; 0: none."""

    @functools.cached_property
    def kept_reasons(self) -> frozenset[str]:
        """The reasons whose policy is `keep`."""
        return frozenset(reason for reason, policy in self.policies.items() if policy == "keep")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    batch_size: int = 64
    """Global packed rows per optimizer step."""
    grad_accum_steps: int = 1
    """Microbatches per step; divides batch_size and never changes which rows a step sees."""
    eval_batch_size: int = 0
    """Global rows per evaluation batch; 0: batch_size / grad_accum_steps."""

    @property
    def micro_batch_size(self) -> int:
        """Global rows per microbatch."""
        return self.batch_size // self.grad_accum_steps

    @property
    def eval_rows(self) -> int:
        return self.eval_batch_size or self.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    z_loss_weight: float = 0.0
    """Weight of log(Z)^2 per supervised token; 0: none. 1e-4 in PaLM (arXiv:2204.02311, section 5)."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread over the whole vocabulary, in [0, 1)."""
    router_balance_weight: float = 0.0
    """Weight of the balance loss of mixtures of experts, the mean over their layers: 1 where a segment's tokens choose
    all experts alike, more where they do not; 0: none. 0.001 to 0.01 is usual."""
    router_z_loss_weight: float = 0.0
    """Weight of the mean of logsumexp(router logits)^2; 0: none. 1e-3 in ST-MoE (arXiv:2202.08906, section 3)."""
    router_tokens: str = "all"
    """Tokens that count in the two router losses: all, or supervised (by their loss weights)."""
    chunk_tokens: int = 1024
    """Positions per chunk of the loss on each device: bounds its memory at chunk_tokens * vocab_size logits."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = "adamw"
    """adamw, adafactor, lion or sgd."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (norm scales and biases are left out)."""
    b1: float | None = None
    """First-moment decay (adamw 0.9, lion 0.9) or momentum (sgd 0.9); None: that default."""
    b2: float | None = None
    """Second-moment decay (adamw 0.95, lion 0.99); None: that default."""
    eps: float | None = None
    """adamw's epsilon, 1e-8; None: that default."""
    grad_clip_norm: float = 1.0
    """Gradients are scaled to at most this global norm; 0: no clipping."""
    accum_dtype: str = "float32"
    """dtype of the accumulated gradients."""
    moment_dtype: str = "float32"
    """dtype of what the optimizer remembers of each parameter: 8 bytes of it for adamw in float32, 4 for lion and sgd;
    half of that in bfloat16, rounded at random so that it is right in the mean (`sft_jax/training/moments.py`).
    adafactor's is small, and float32."""
    offload: bool = False
    """Whether the moments of layers lie in the host's memory, and on the device a layer at a time. Needs float32."""
    max_skipped_steps: int = 10
    """So many non-finite steps in a row stop the run."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str = "cosine"
    """cosine, linear, constant or wsd (warmup, stable, decay), each after a linear warmup from 0."""
    num_epochs: int = 2
    """Passes over the data; used where num_steps is None."""
    num_steps: int | None = None
    """Optimizer steps in all; None: from num_epochs."""
    warmup_fraction: float = 0.03
    """Share of all steps that warm up; used where warmup_steps is None."""
    warmup_steps: int | None = None
    """Steps of warmup; None: from warmup_fraction."""
    final_fraction: float | None = None
    """Last learning rate as a share of the peak (cosine, linear, wsd: 0.1); None: that default."""
    decay_fraction: float | None = None
    """Share of all steps in wsd's decay (0.2); None: that default."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters (LoRA, arXiv:2106.09685): the base is frozen, and each target learns a product of two small matrices."""

    rank: int = 0
    """Rank of the adapters; 0: none, and all parameters train that model.freeze leaves."""
    alpha: float = 16.0
    """What adapters add is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of what an adapter reads that is dropped while training; what the base reads is whole."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv:2312.03732), which suits large ranks."""
    use_dora: bool = False
    """Learn the lengths of the kernels' columns apart from their directions (arXiv:2402.09353)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear maps of the layers that get an adapter: regular expressions for the end of their path from a dot on, in
    our names (`attention.query`) or in those of Hugging Face folders (`self_attn.q_proj`). `all-linear` is all of them
    but those of experts."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train whole, named likewise: `embed_tokens` (needed with new tokens), `lm_head`, `.*norm`."""
    quantize: str = "none"
    """How the frozen kernels of the layers are held: none (in model.frozen_dtype), int8, int4 or nf4, in blocks of 64
    with a scale each (QLoRA, arXiv:2305.14314)."""
    init_from: str = ""
    """Folder of an adapter to go on from, as PEFT and `sft-jax export --adapter` write; empty: a new one."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank) if self.rank else 1.0


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left."""

    replica: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    expert: int = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_steps: int = 0
    """Evaluate the held-out sets every so many steps; 0: only before the first and after the last."""
    stop_by: str = ""
    """Name of a held-out set whose loss stops the run early; empty: none."""
    stop_patience: int = 3
    """Evaluations without a new best loss before stopping."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Steps whose loss or gradient norm jumps: logged as `spike/loss` and `spike/grad_norm`."""

    window: int = 100
    """Steps whose median says what is usual; 0: jumps are not looked for."""
    threshold: float = 10.0
    """A jump is so many robust standard deviations (1.48 median distances from the median) above the median."""
    rewind: bool = False
    """Go back from a jump to the last checkpoint, and pass over its batch. Before the first one it is only logged."""
    max_rewinds: int = 3
    """So often in a run; further jumps are only logged."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What looks whether the machines do what they should; if not, the run ends with status 6."""

    stall_factor: float = 20.0
    """A step that takes so many times as long as steps do is stuck; 0: none is."""
    stall_seconds: float = 300.0
    """No step is stuck before."""
    replicas_every: int = 0
    """Compare the copies of parameters and optimizer state that several devices hold every so many steps, and before
    each save; 0: never."""
    replay_every: int = 0
    """Compute the gradients of every so many steps twice, and compare them bit by bit; 0: never. Not on GPUs, where XLA
    may add in another order each time unless XLA_FLAGS has --xla_gpu_deterministic_ops=true."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 500
    """Save every so many steps, besides the last; 0: only the last."""
    keep_latest: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good; 0: none. A multiple of `every_steps`."""
    best_by: str = ""
    """Name of a held-out set: the checkpoint with its lowest loss is kept as well; empty: none."""
    export: bool = True
    """Write `<run>/export` as a Hugging Face folder when the run ends."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 10
    tensorboard: bool = True
    profile_steps: tuple[int, ...] = ()
    """(first, last): steps of a jax.profiler trace written to `<run>/profile`; empty: none."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole experiment. See each section's fields."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """sha256 of the resolved config, hex."""
        return digest_json(self.to_dict())


def digest_json(value: Any) -> str:
    """sha256 of an object that JSON can hold, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def source_name(source: SourceConfig) -> str:
    """The name of a source in reports and metrics: its own, or the last part of its path without the ending."""
    last = source.path.rstrip("/").rsplit("/", 1)[-1]
    return source.name or re.sub(r"\.(jsonl|ndjson|json|parquet|arrow)(\.gz|\.zst)?$", "", last)
