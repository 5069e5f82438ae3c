"""The objects that travel through the house, the errors that stop it, and the dimension legend. numpy only.

Dimension letters, used in shape annotations and as suffixes of intermediate arrays (`hidden_BLD`):

    B  rows of the global batch        N  query heads          V  vocabulary
    b  rows of this process            K  key/value heads      R  LoRA rank
    L  length of a packed row          G  N / K                E  experts
    M  key length                      H  head dim             T  B * L
    D  embed dim                       F  mlp dim
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class SftError(ValueError):
    """An error that a user can mend: the message says where, what, and what to do. `exit_code` is the process's."""

    exit_code = 1


class ConfigError(SftError):
    """The configuration, or a file that it names as configuration, is wrong."""

    exit_code = 2


class DataError(SftError):
    """A row, a template, a tokenizer or a data store is wrong."""

    exit_code = 3


class NumericError(SftError):
    """Training produced non-finite numbers too many times in a row."""

    exit_code = 4


class StorageError(SftError):
    """Weights, a checkpoint or a run directory cannot be read or written."""

    exit_code = 5


class MachineError(SftError):
    """A process or a device does not do what it should: it is stuck, gone, or computes wrongly."""

    exit_code = 6


PREEMPTED_EXIT_CODE = 75
"""Exit status of a run that was told to stop (SIGTERM) and saved its last finished step."""


class Origin(NamedTuple):
    """Where a row came from: `path:line`, and in a file that is one JSON array `path:line#element`. Both count from 1;
    elsewhere `element` is 0."""

    path: str
    line: int
    element: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}{f'#{self.element}' if self.element else ''}"


class RawRow(NamedTuple):
    """One JSON object, as read."""

    fields: dict[str, Any]
    origin: Origin


class ToolCall(NamedTuple):
    """A call of a tool by an assistant turn. `arguments` is the object; `arguments_json` is the text of it as the row
    has it, or, where the row has an object, that object in JSON. `id` is empty where the row gives none."""

    name: str
    arguments: dict[str, Any]
    arguments_json: str
    id: str = ""


class Message(NamedTuple):
    """One turn. `role` is system, user, assistant or tool; the fields that do not belong to the role are empty.

    `reasoning` is what an assistant turn thinks before `content`. `name` and `tool_call_id` say which tool a tool
    result is of and which call it answers. `loss_weight` is the row's own weight of an assistant turn, None where the
    row gives none.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    loss_weight: float | None = None


class Conversation(NamedTuple):
    """A demonstration: its assistant turns are trained on. `tools` are the schemas it offers, exactly as the row gives
    them."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()


class Document(NamedTuple):
    """Plain text: trained on as a whole, but for the first token (BOS, where there is one), which nothing predicts."""

    text: str
    origin: Origin


def shift(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs, targets, loss_weights) of an example's ids and their weights: the one place that shifts."""
    return ids[:-1], ids[1:], weights[1:]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids, already shifted: at position i the model reads `inputs[i]` and is asked for `targets[i]`.

    >>> TokenizedExample.from_ids([1, 15, 7, 9, 2], [0, 0, 1, 1, 1], Origin("a.jsonl", 1))
    inputs       1 15  7  9
    targets     15  7  9  2
    loss_weights 0  1  1  1      # the weight travels with the target; the first id is never one
    """

    inputs: np.ndarray  # int32 [n]
    targets: np.ndarray  # int32 [n]
    loss_weights: np.ndarray  # float32 [n]
    origin: Origin

    @classmethod
    def from_ids(cls, ids: Any, weights: Any, origin: Origin) -> "TokenizedExample":
        """`ids` and `weights` have equal length n + 1; `weights[0]` has no prediction."""
        return cls(*shift(np.asarray(ids, np.int32), np.asarray(weights, np.float32)), origin)

    @property
    def ids(self) -> np.ndarray:
        """The unshifted ids, int32 [n + 1]."""
        return np.concatenate([self.inputs[:1], self.targets])

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Examples laid one after another in a row of fixed length L.

    Segment 0 is padding; examples count 1, 2, 3, ...; positions restart at 0 in each; padding has weight 0. With L = 8,
    an example of 4 and one of 3:

        segment_ids   1 1 1 1 2 2 2 0
        positions     0 1 2 3 0 1 2 0
        source_ids    0 0 0 0 1 1 1 0      # index into the sources of the data set, 0 on padding
    """

    inputs: np.ndarray  # int32 [L]
    targets: np.ndarray  # int32 [L]
    loss_weights: np.ndarray  # float32 [L]
    segment_ids: np.ndarray  # int32 [L]
    positions: np.ndarray  # int32 [L]
    source_ids: np.ndarray  # int32 [L]
    origins: tuple[Origin, ...]  # one per segment


@dataclass(frozen=True, slots=True)
class HostBatch:
    """This process's rows of global batch number `step`; arrays are [b, L], as in PackedRow."""

    step: int
    inputs: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    source_ids: np.ndarray
    origins: tuple[tuple[Origin, ...], ...] = field(repr=False)
