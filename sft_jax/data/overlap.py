"""Training and held-out stores in, the examples that are in both out: a held-out loss must be of what was not trained.

Examples are the same where all their ids are, wherever they come from.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from sft_jax.data.store import TokenStore
from sft_jax.datatypes import DataError

_NUM_SHOWN = 5


def find_trained(train: Sequence[TokenStore], held_out: Sequence[TokenStore]) -> list[np.ndarray]:
    """For each training store, which of its examples are held out too, bool [num_examples]."""
    hashes = np.concatenate([np.empty(0, np.uint64), *(store.hashes for store in held_out)])
    return [np.isin(store.hashes, hashes) for store in train]


def refuse_overlap(train: Sequence[TokenStore], held_out: Mapping[str, TokenStore]) -> None:
    """
    Args:
      held_out: by the config field that names each.

    Raises:
      DataError: a held-out example is trained on; names the first ones and counts them, for all sets together.
    """
    trained = np.concatenate([store.hashes for store in train])
    order = np.argsort(trained, kind="stable")
    errors = []
    for field, store in held_out.items():
        shared = np.flatnonzero(np.isin(store.hashes, trained))
        if not len(shared):
            continue
        places = order[np.searchsorted(trained, store.hashes[shared[:_NUM_SHOWN]], sorter=order)]
        pairs = zip(shared[:_NUM_SHOWN].tolist(), places.tolist(), strict=True)
        shown = "\n".join(f"  {store.origin(index)} is {_origin(train, place)}" for index, place in pairs)
        errors.append(
            f"{field}.path: {len(shared):,} of the {len(store):,} held-out examples of {store.path} are also trained "
            f"on:\n{shown}{' ...' if len(shared) > _NUM_SHOWN else ''}"
        )
    if errors:
        raise DataError(
            "\n".join(errors) + "\nTake them out of one of the two, or set config.data.eval_overlap = 'drop', which "
            "takes them out of training, or 'keep'."
        )


def _origin(stores: Sequence[TokenStore], place: int) -> str:
    for store in stores:
        if place < len(store):
            return str(store.origin(place))
        place -= len(store)
    raise AssertionError
