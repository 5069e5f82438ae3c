"""jaxtyping's annotations where it is installed (tests), plain stand-ins where it is not (a user's install)."""

from typing import TYPE_CHECKING, Any

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Key, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Key, Shaped
    except ImportError:

        class _Annotation:
            """`Float[Array, "B L"]` and its like mean nothing when nothing checks them."""

            def __class_getitem__(cls, item: Any) -> Any:
                return Any

        Bool = Float = Int = Key = Shaped = _Annotation

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Shaped"]
