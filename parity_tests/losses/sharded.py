"""The losses of `lsce_jax` with their classes divided over devices, as losses of whole arrays."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from parity_tests.losses.adapters import JaxAdapter, UnavailableError
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.devices import of_own_losses

AXIS = "model"
# What fills up the classes, and is outside the class mask then. A weight is multiplied, masked or not.
_FILL = {"logits": float("nan"), "labels": float("nan"), "class_weight": 1.0, "prior": 0.0, "class_mask": False}


def divided(
    loss: Callable[..., Any], num_devices: int, *, linear: bool = False, check_vma: bool = True
) -> Callable[..., Any]:
    """Return a vocab-parallel loss as a function of arrays with all classes, in `jax.shard_map` over so many devices.

    Where their number does not divide the classes, classes outside a class mask are added, whose logits are NaN.

    Args:
        loss: one of `lsce_jax`.
        num_devices: how many.
        linear: whether it takes hidden and weight, and not logits.
        check_vma: whether JAX keeps track of what is the same on all devices.
    """
    import jax

    mesh = jax.make_mesh((num_devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    spec: Any = jax.P
    operands = ("hidden", "weight", "labels") if linear else ("logits", "labels")

    def of_all_classes(*given: Any, **keywords: Any) -> Any:
        keywords |= dict(zip(operands, given, strict=False))
        arrays = {name: keywords.pop(name) for name in list(keywords) if hasattr(keywords[name], "dtype")}
        class_axes = class_axes_of(arrays, keywords.get("axis", -1))
        arrays, class_axes = _filled_up(arrays, class_axes, num_devices)
        specs = {name: spec(*[None] * class_axes[name], AXIS) if name in class_axes else spec() for name in arrays}

        def of_slices(slices: dict[str, Any]) -> Any:
            positional = [slices.pop(name) for name in operands]
            return loss(*positional, axis_name=AXIS, **slices, **keywords)

        return jax.shard_map(of_slices, mesh=mesh, in_specs=(specs,), out_specs=spec(), check_vma=check_vma)(arrays)

    return of_all_classes


def class_axes_of(arrays: dict[str, Any], axis: int) -> dict[str, int]:
    """Return where each array has its classes, if it has any."""
    of_all = {"weight": 1, "bias": 0, "class_weight": 0, "prior": 0}
    found = {name: of_classes for name, of_classes in of_all.items() if name in arrays}
    if "logits" in arrays:
        found["logits"] = axis % arrays["logits"].ndim
        if arrays["labels"].dtype.kind not in "iu":
            found["labels"] = found["logits"]
    if "class_mask" in arrays:
        num_dimensions = arrays["class_mask"].ndim
        found["class_mask"] = 0 if num_dimensions == 1 else axis % num_dimensions
    return found


def _filled_up(
    arrays: dict[str, Any], class_axes: dict[str, int], num_devices: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the arrays with classes added outside of a class mask, so that the devices divide them."""
    import jax.numpy as jnp

    of_classes = "logits" if "logits" in arrays else "weight"
    num_classes = arrays[of_classes].shape[class_axes[of_classes]]
    added = -num_classes % num_devices
    if not added:
        return arrays, class_axes
    if "class_mask" not in arrays:
        arrays = {**arrays, "class_mask": jnp.ones(num_classes, bool)}
        class_axes = {**class_axes, "class_mask": 0}

    def filled(name: str, axis: int) -> Any:
        array = arrays[name]
        shape = (*array.shape[:axis], added, *array.shape[axis + 1 :])
        return jnp.concatenate([array, jnp.full(shape, _FILL.get(name, 0.0), array.dtype)], axis=axis)

    return {**arrays, **{name: filled(name, axis) for name, axis in class_axes.items()}}, class_axes


class ShardedAdapter(JaxAdapter):
    """The dense or the linear loss of `lsce_jax` with its classes divided over devices.

    Args:
        num_devices: how many.
        check_vma: whether JAX keeps track of what is the same on all devices.
        linear: as in `JaxAdapter`.
        options: as in `JaxAdapter`.

    Raises:
        UnavailableError: there are not so many devices.
    """

    def __init__(self, num_devices: int, check_vma: bool = True, linear: bool = False, **options: Any) -> None:
        """Find the devices."""
        import jax

        import lsce_jax

        if jax.device_count() < num_devices:
            remedy = f"with XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} a CPU counts as so many"
            raise UnavailableError(f"JAX finds {jax.device_count()} devices, and {num_devices} are needed; {remedy}")
        self.num_devices = num_devices
        dense, layer = (
            lsce_jax.vocab_parallel_label_smoothed_cross_entropy,
            lsce_jax.vocab_parallel_linear_label_smoothed_cross_entropy,
        )
        loss = divided(layer if linear else dense, num_devices, linear=linear, check_vma=check_vma)
        name = f"jax vocab-parallel{' linear' if linear else ''}, {num_devices} devices"
        super().__init__(loss, **{"name": name, "linear": linear, **options})
        self.arithmetic = arithmetic_on(num_devices, self)


def arithmetic_on(num_devices: int, adapter: JaxAdapter) -> Arithmetic:
    """Return what the bounds may assume of an adapter's loss when its classes are divided over so many devices."""
    own = on_shards(of_own_losses(adapter.arithmetic, adapter.device_model.family), num_devices)
    # The linear loss multiplies the exponentials of each device by another one.
    return replace(own, exp=2 * own.exp + 1) if adapter.linear else own


def on_shards(arithmetic: Arithmetic, num_devices: int) -> Arithmetic:
    """Return the arithmetic with a sum over devices after each sum, one more term for each, in any order."""
    return replace(arithmetic, depth=partial(_depth_on_shards, arithmetic.depth, num_devices))


def _depth_on_shards(depth: Callable[[int], int], num_devices: int, length: int) -> int:
    # Devices without a term add 0, which rounds nothing.
    return max(0, min(length - 1, depth(length) + num_devices - 1))
