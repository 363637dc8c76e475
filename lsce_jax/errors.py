"""The messages that only JAX users can get. All others are in `lsce_spec.errors`."""

from lsce_spec import MESSAGES as SHARED_MESSAGES

MESSAGES: dict[str, tuple[type[Exception], str]] = {
    "merge_state": (
        TypeError,
        "only a metric of the same kind and options can be merged into a {expected}, got {given}.",
    ),
    "denominator_axis": (
        ValueError,
        "axis_name={given} names no axis here. Call mean_denominator inside jax.shard_map, or inside jax.vmap or "
        "jax.pmap with this axis_name. Under plain jit the mean is over all rows already.",
    ),
    "axis_name": (
        ValueError,
        "axis_name={given} names no axis here. Call the loss inside jax.shard_map, or inside jax.vmap or jax.pmap with "
        "this axis_name. Logits that have all classes go to label_smoothed_cross_entropy.",
    ),
}


def error(key: str, **given: object) -> Exception:
    """Return the exception for `key` of this table or of the shared one, filled in with `given`."""
    kind, text = (MESSAGES if key in MESSAGES else SHARED_MESSAGES)[key]
    return kind(text.format(**given))
