"""Path of a parameter -> its logical dims, such as (layers, embed, heads, head_dim); sharding.RULES has their axes."""

import re

# Each path matches exactly one pattern.
_LAYER = r"layers\.\d+\.\d+\."
LOGICAL_DIMS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed\.embedding", ("vocab", "embed")),
    (r"head\.kernel", ("vocab", "embed")),
    (r"final_norm\.scale", ("norm",)),
    (_LAYER + r"(attention|mlp)_(post_)?norm\.scale", ("layers", "norm")),
    (_LAYER + r"attention\.query\.kernel", ("layers", "embed", "heads", "head_dim")),
    (_LAYER + r"attention\.(key|value)\.kernel", ("layers", "embed", "kv_heads", "head_dim")),
    (_LAYER + r"attention\.query\.bias", ("layers", "heads", "head_dim")),
    (_LAYER + r"attention\.(key|value)\.bias", ("layers", "kv_heads", "head_dim")),
    (_LAYER + r"attention\.(query|key|kv)_norm\.scale", ("layers", "norm")),
    (_LAYER + r"attention\.sinks", ("layers", "heads")),
    (_LAYER + r"attention\.(query|kv)_down\.kernel", ("layers", "embed", None)),
    (_LAYER + r"attention\.(query|kv)_down\.bias", ("layers", "norm")),
    (_LAYER + r"attention\.kv_up\.kernel", ("layers", "embed", "heads", "head_dim")),
    (_LAYER + r"attention\.out\.kernel", ("layers", "heads", "head_dim", "embed")),
    (_LAYER + r"mlp\.router\.kernel", ("layers", "embed", None)),
    (_LAYER + r"mlp\.router\.(bias|correction)", ("layers", "norm")),
    (_LAYER + r"mlp\.experts\.(gate|up)\.kernel", ("layers", "expert", "embed", "mlp")),
    (_LAYER + r"mlp\.experts\.(gate|up)\.bias", ("layers", "expert", "mlp")),
    (_LAYER + r"mlp\.experts\.down\.kernel", ("layers", "expert", "mlp", "embed")),
    (_LAYER + r"mlp\.experts\.down\.bias", ("layers", "expert", "norm")),
    (_LAYER + r"mlp\.(shared\.)?(gate|up)\.kernel", ("layers", "embed", "mlp")),
    (_LAYER + r"mlp\.(gate|up)\.bias", ("layers", "mlp")),
    (_LAYER + r"mlp\.(shared\.)?down\.kernel", ("layers", "mlp", "embed")),
    (_LAYER + r"(attention\.out|mlp\.down)\.bias", ("layers", "norm")),
)


def logical_dims(path: str) -> tuple[str | None, ...]:
    """The logical dims of the parameter at a dotted path."""
    found = [dims for pattern, dims in LOGICAL_DIMS if re.fullmatch(pattern, path)]
    assert len(found) == 1, f"{path} matches {len(found)} patterns of LOGICAL_DIMS; expected exactly one"
    return found[0]
