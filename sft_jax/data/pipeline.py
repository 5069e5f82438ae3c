"""Sources and a config in, this process's rows of any global batch out.

Batch `i` is rows [i * B, (i + 1) * B) of the epochs' plans laid end to end, whatever the number of processes. With
three rows an epoch and B = 2, two epochs are

    epoch      0 0 0 1 1 1
    row        0 1 2 0 1 2       each epoch has its own order
    batch      0 0 1 1 2 2       batch 1 straddles the border; a last batch of fewer rows is filled up with padding

Which rows a batch holds follows from (data, seed, step) alone, so a run starts at any step with nothing to replay, on
any number of processes. Importing grain imports jax, but nothing here starts a jax backend.
"""

import bisect
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sft_jax.config_schema import Config, SourceConfig, source_name
from sft_jax.data.mixture import MIXTURE_VERSION, Mixture, passes_per_epoch
from sft_jax.data.overlap import find_trained, refuse_overlap
from sft_jax.data.packing import (
    PLAN_VERSION,
    PackedArrays,
    PackingPlan,
    assemble_rows,
    attention_costs,
    balanced_order,
    plan_epoch,
)
from sft_jax.data.rendering import Renderer, open_renderer
from sft_jax.data.report import account_to_json, check_account, list_not_read
from sft_jax.data.sources import Found, NotRead, find_files
from sft_jax.data.store import TokenStore, open_store
from sft_jax.datatypes import DataError, HostBatch, Origin, PackedRow


def open_dataset(
    sources: Sequence[SourceConfig],
    config: Config,
    renderer: Renderer,
    *,
    batch_size: int,
    num_epochs: int | None,
    num_steps: int | None,
    shuffle: bool,
    held_out: Sequence[SourceConfig] = (),
    renderer_factory: Callable[[], Renderer] | None = None,
) -> "PackedDataset":
    """Tokenize what has not been tokenized yet, check every source's account, and plan the run.

    Args:
      batch_size: global rows per batch.
      num_epochs: passes over the data; None where num_steps is given.
      num_steps: batches in all, from as many epochs as they take; None where num_epochs is given.
      shuffle: by `config.run.seed`, each epoch anew; False: the same order always, as evaluation wants it.
      held_out: sources that `config.data.eval_overlap` keeps apart from these.
      renderer_factory: opens the renderer in another process; None: by the config.

    Raises:
      DataError: a source is missing, has more bad rows than `config.data.max_bad_fraction`, or nothing to train on; a
        held-out example is trained on.
    """
    if not sources:
        raise DataError("config.data.train: names no source to read. Add one: [dict(path='chats.jsonl')].")
    factory = renderer_factory or functools.partial(open_renderer, config.data, config.model.path)
    find_all = functools.partial(_find_files, config=config)
    open_all = functools.partial(_open_stores, config=config, renderer=renderer, renderer_factory=factory)
    found, overlap = find_all(sources), config.data.eval_overlap
    stores = open_all(sources, found)
    taken = [np.ones(len(store), bool) for store in stores]
    if held_out and overlap != "keep":
        held_out_stores = open_all(held_out, find_all(held_out))
        if overlap == "error":
            refuse_overlap(
                stores, {_field_of(source, config): s for source, s in zip(held_out, held_out_stores, strict=True)}
            )
        taken = [~trained for trained in find_trained(stores, held_out_stores)]
    return PackedDataset(
        stores,
        taken,
        [of_source.not_read for of_source in found],
        sources,
        config,
        batch_size=batch_size,
        num_epochs=num_epochs,
        num_steps=num_steps,
        seed=config.run.seed if shuffle else None,
    )


def _find_files(sources: Sequence[SourceConfig], config: Config) -> list[Found]:
    return [find_files(source.path, f"{_field_of(source, config)}.path") for source in sources]


def _open_stores(
    sources: Sequence[SourceConfig],
    found: Sequence[Found],
    config: Config,
    renderer: Renderer,
    renderer_factory: Callable[[], Renderer],
) -> list[TokenStore]:
    """The stores of all sources, their accounts checked together."""
    stores = [
        open_store(source, of_source.files, config.data, renderer, renderer_factory)
        for source, of_source in zip(sources, found, strict=True)
    ]
    errors = []
    for source, store in zip(sources, stores, strict=True):
        try:
            check_account(store.account, store.path, config.data.max_bad_fraction, _field_of(source, config))
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return stores


class PackedDataset:
    """The global batches of a run, by number.

    Args:
      taken: for each store, which of its examples are trained on.
      not_read: for each, what lies beside its files; for the report.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        taken: Sequence[np.ndarray],
        not_read: Sequence[Sequence[NotRead]],
        sources: Sequence[SourceConfig],
        config: Config,
        *,
        batch_size: int,
        num_epochs: int | None,
        num_steps: int | None,
        seed: int | None,
    ):
        self.source_names = tuple(source_name(source) for source in sources)
        self._stores, self._taken, self._sources = tuple(stores), tuple(taken), tuple(sources)
        self._not_read = tuple(not_read)
        self._starts = np.cumsum([0, *map(len, stores)])  # example ids of source s: [starts[s], starts[s + 1])
        self._lengths = np.concatenate([store.lengths for store in stores])
        weights = np.array([source.loss_weight for source in sources], np.float32)
        self._loss_weights = weights if (weights != 1).any() else None
        self._batch_size, self._seed = batch_size, seed
        self._max_seq_len, self._packing = config.data.max_seq_len, config.data.packing
        self._max_segments, self._row_order = config.data.max_segments_per_row, config.data.row_order
        self._read_threads = config.data.read_threads
        self._fields = [_field_of(source, config) for source in sources]

        examples = [start + np.flatnonzero(t) for start, t in zip(self._starts[:-1], taken, strict=True)]
        for field, store, ids in zip(self._fields, stores, examples, strict=True):
            if not len(ids):
                raise DataError(f"{field}.path: all examples of {store.path} are held out too. Remove the source.")
        passes = passes_per_epoch(sources, [len(ids) for ids in examples], self._fields)
        self._mixture = Mixture(examples, passes, seed)
        self._lock = threading.Lock()
        self._plans: dict[int, tuple[PackingPlan, np.ndarray]] = {}
        self._row_starts = self._count_rows(num_epochs, None if num_steps is None else num_steps * batch_size)
        if num_steps is None:
            self._num_filled = self._row_starts[-1]
        else:
            self._num_filled = num_steps * batch_size
        self.num_steps = -(-self._num_filled // batch_size)
        self.num_rows = self.num_steps * batch_size
        self.steps_per_epoch = self._row_starts[-1] / (len(self._row_starts) - 1) / batch_size

    def _count_rows(self, num_epochs: int | None, num_rows: int | None) -> list[int]:
        """The number of the first row of each epoch, and of the row after the last, for so many epochs, or for as many
        as so many rows take."""
        starts = [0]
        while len(starts) - 1 != num_epochs and (num_rows is None or starts[-1] < num_rows):
            epoch = 0 if self._mixture.is_constant else len(starts) - 1
            starts.append(starts[-1] + self._plan(epoch)[0].num_rows)
        return starts

    @property
    def fingerprint_fields(self) -> dict[str, Any]:
        """All that decides what each batch holds, as JSON values by name; the length of the run does not. Files,
        template and tokenizer stand as their sha256."""
        fields: dict[str, Any] = {}
        for field, store, source in zip(self._fields, self._stores, self._sources, strict=True):
            own = {name: getattr(source, name) for name in ("epochs", "weight", "loss_weight")}
            for name, value in store.fingerprint_fields.items():
                if name.startswith("source."):
                    own[name.removeprefix("source.")] = value
                else:
                    fields[name] = value
            fields |= {f"{field}.{name}": value for name, value in own.items()}
        dropped = [np.flatnonzero(~taken).tolist() for taken in self._taken]
        return {
            **fields,
            "config.data.eval_overlap": _digest(dropped) if any(dropped) else "",
            "config.data.packing": self._packing,
            "config.data.max_segments_per_row": self._max_segments,
            "config.data.row_order": self._row_order,
            "config.run.seed": self._seed,
            "config.batch.batch_size": self._batch_size,
            "plan_version": PLAN_VERSION,
            "mixture_version": MIXTURE_VERSION,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the fields, hex."""
        return _digest(self.fingerprint_fields)

    @property
    def report(self) -> dict[str, Any]:
        """data_report.json: every row accounted for, and what mixing and packing made of the rest. `tokens` and
        `examples` are of the rows; what an epoch holds of them is said of the first one."""
        accounts = [store.account for store in self._stores]
        tokens = sum(account.tokens for account in accounts)
        supervised_tokens = sum(account.supervised_tokens for account in accounts)
        ids, num_rows = self._mixture.epoch(0), self._row_starts[1]
        last = bisect.bisect_right(self._row_starts, self._num_filled - 1) - 1
        rows_in_last = self._row_starts[last + 1] - self._row_starts[last]
        return {
            "fingerprint": self.fingerprint,
            "rows_read": sum(account.rows_read for account in accounts),
            "rows_trained": sum(account.rows_trained for account in accounts),
            "rows_bad": sum(account.rows_bad for account in accounts),
            "rows_dropped": sum(account.rows_dropped for account in accounts),
            "rows_not_taken": sum(account.rows_not_taken for account in accounts),
            "examples": len(self._lengths),
            "examples_held_out": sum(int((~taken).sum()) for taken in self._taken),
            "tokens": tokens,
            "supervised_tokens": supervised_tokens,
            "supervised_fraction": supervised_tokens / tokens,
            "packing": self._packing,
            "max_seq_len": self._max_seq_len,
            "batch_size": self._batch_size,
            "examples_per_epoch": len(ids),
            "rows_per_epoch": num_rows,
            "fill_fraction": int(self._lengths[ids].sum()) / (num_rows * self._max_seq_len),
            "steps_per_epoch": self.steps_per_epoch,
            "num_epochs": last + (self._num_filled - self._row_starts[last]) / rows_in_last,
            "num_steps": self.num_steps,
            "padding_rows": self.num_rows - self._num_filled,
            "sources": {name: self._report_source(i) for i, name in enumerate(self.source_names)},
        }

    def _report_source(self, index: int) -> dict[str, Any]:
        store = self._stores[index]
        return {
            "path": store.path,
            "store": str(store.folder),
            "files_read": len(store.files),
            "files_not_read": list_not_read(self._not_read[index]),
            "examples_held_out": int((~self._taken[index]).sum()),
            "examples_per_epoch": self._mixture.count(index, 0),
            **account_to_json(store.account),
        }

    def row(self, index: int) -> PackedRow:
        """Row `index` of the run, exactly as the step receives it."""
        step, position = divmod(index, self._batch_size)
        arrays, (origins,) = self._assemble([self._contents(step)[position]])
        return PackedRow(**{name: array[0] for name, array in arrays._asdict().items()}, origins=origins)

    def iterate(self, start_step: int = 0, rows: Sequence[int] | None = None) -> Iterator[HostBatch]:
        """Batches start_step, start_step + 1, ..., num_steps - 1: of each, the given rows of its B; None: all."""
        rows = range(self._batch_size) if rows is None else rows

        def read_batch(step: int) -> HostBatch:
            contents = self._contents(step)
            arrays, origins = self._assemble([contents[row] for row in rows])
            return HostBatch(step, *arrays, origins)

        threads = self._read_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        batches = grain.MapDataset.range(start_step, self.num_steps).map(read_batch).to_iter_dataset(options)
        return _close_at_end(iter(batches))

    def _contents(self, step: int) -> list[np.ndarray]:
        """The example ids of each row of a global batch, in the order in which the rows are laid."""
        contents, costs = [], []
        for index in range(step * self._batch_size, (step + 1) * self._batch_size):
            if index < self._num_filled:
                epoch = bisect.bisect_right(self._row_starts, index) - 1
                row = index - self._row_starts[epoch]
                plan, plan_costs = self._plan(epoch)
                contents.append(plan.examples_of(row))
                costs.append(plan_costs[row])
            else:
                contents.append(np.empty(0, np.int64))
                costs.append(0)
        return [contents[rank] for rank in balanced_order(np.array(costs))]

    def _plan(self, epoch: int) -> tuple[PackingPlan, np.ndarray]:
        """An epoch's plan and the attention cost of its rows. Threads read around a border: two plans are kept."""
        with self._lock:
            if epoch not in self._plans:
                ids = self._mixture.epoch(epoch)
                lengths = self._lengths[ids]
                plan = plan_epoch(
                    lengths,
                    self._max_seq_len,
                    self._seed,
                    epoch,
                    self._packing,
                    max_segments_per_row=self._max_segments,
                    row_order=self._row_order,
                )
                costs = attention_costs(plan, lengths)
                kept = {other: self._plans[other] for other in self._plans if abs(other - epoch) == 1}
                self._plans = kept | {epoch: (PackingPlan(plan.row_offsets, ids[plan.example_ids]), costs)}
            return self._plans[epoch]

    def _assemble(self, contents: Sequence[np.ndarray]) -> tuple[PackedArrays, tuple[tuple[Origin, ...], ...]]:
        """Rows of the given example ids, and the origins of each row's examples."""
        example_ids = np.concatenate(contents)
        source_ids = np.searchsorted(self._starts, example_ids, side="right") - 1
        indices = example_ids - self._starts[source_ids]
        examples: list[Any] = [None] * len(example_ids)
        origins: list[Any] = [None] * len(example_ids)
        for source in np.unique(source_ids).tolist():
            places, store = np.flatnonzero(source_ids == source), self._stores[source]
            of_source = indices[places]
            for place, index, views in zip(places.tolist(), of_source.tolist(), store.views(of_source), strict=True):
                examples[place], origins[place] = views, store.origin(index)
        counts = [len(ids) for ids in contents]
        arrays = assemble_rows(examples, source_ids, counts, self._max_seq_len)
        if self._loss_weights is not None:
            arrays.loss_weights[...] *= self._loss_weights[arrays.source_ids]
        each = iter(origins)
        return arrays, tuple(tuple(itertools.islice(each, count)) for count in counts)


def _close_at_end(batches: Any) -> Iterator[HostBatch]:
    """The batches of a grain iterator; its threads end with the last batch, or when the caller stops."""
    try:
        yield from batches
    finally:
        batches.close()


def _field_of(source: SourceConfig, config: Config) -> str:
    """The place of a source in the config."""
    for group in ("train", "eval"):
        named = getattr(config.data, group)
        if source in named:
            return f"config.data.{group}[{named.index(source)}]"
    return "source"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
