"""The messages that only JAX users can get. All others are in `lsce_spec.errors`."""

from lsce_spec import MESSAGES as SHARED_MESSAGES

MESSAGES: dict[str, tuple[type[Exception], str]] = {
    "explicit_axes": (
        TypeError,
        "jax.shard_map leaves out the axes {given} of this mesh, which are explicit and divide operands of the loss; "
        "JAX finds no type for an array that is computed from them. Expected automatic axes, as of jax.make_mesh(..., "
        "axis_types=(jax.sharding.AxisType.Auto,) * {number}), or a jax.shard_map over all axes of the mesh.",
    ),
    "bad_labels_staged": (
        ValueError,
        "bad_labels='raise' under jax.jit needs checkify, which returns the error: with "
        "`from jax.experimental import checkify` call `problem, loss = jax.jit(checkify.checkify(f))(...)`, where f is "
        "your function, and then `problem.throw()`. Or use bad_labels='nan' there.",
    ),
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
