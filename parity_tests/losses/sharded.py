"""The losses of `lsce_jax` with their classes divided over devices, as losses of whole arrays."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from parity_tests.losses.adapters import JaxAdapter, UnavailableError
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.devices import of_own_losses

AXIS = "model"
# What fills up the classes, and is outside the class mask then.
_FILL = {"logits": float("nan"), "labels": float("nan"), "class_weight": 1.0, "prior": 0.0, "class_mask": False}


def divided(loss: Callable[..., Any], num_devices: int, *, check_vma: bool = True) -> Callable[..., Any]:
    """Return a vocab-parallel loss as a function of logits of all classes, in `jax.shard_map` over so many devices.

    Where their number does not divide the classes, classes outside a class mask are added, whose logits are NaN.
    """
    import jax

    mesh = jax.make_mesh((num_devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    spec: Any = jax.P

    def of_all_classes(logits: Any, labels: Any, **keywords: Any) -> Any:
        arrays = {name: keywords.pop(name) for name in list(keywords) if hasattr(keywords[name], "dtype")}
        arrays |= {"logits": logits, "labels": labels}
        axis = keywords.get("axis", -1) % logits.ndim
        class_axes = _class_axes(arrays, axis)
        added = -logits.shape[axis] % num_devices
        if added:
            arrays, class_axes = _filled_up(arrays, class_axes, axis, added)
        specs = {name: spec(*[None] * class_axes[name], AXIS) if name in class_axes else spec() for name in arrays}

        def of_slices(slices: dict[str, Any]) -> Any:
            return loss(slices.pop("logits"), slices.pop("labels"), axis_name=AXIS, **slices, **keywords)

        return jax.shard_map(of_slices, mesh=mesh, in_specs=(specs,), out_specs=spec(), check_vma=check_vma)(arrays)

    return of_all_classes


def _class_axes(arrays: dict[str, Any], axis: int) -> dict[str, int]:
    """Return where each array has its classes, if it has any."""
    found = {"logits": axis}
    for name in ("class_weight", "prior"):
        if name in arrays:
            found[name] = 0
    if arrays["labels"].dtype.kind not in "iu":
        found["labels"] = axis
    if "class_mask" in arrays:
        found["class_mask"] = 0 if arrays["class_mask"].ndim == 1 else axis
    return found


def _filled_up(
    arrays: dict[str, Any], class_axes: dict[str, int], axis: int, added: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the arrays with so many classes more, outside of a class mask."""
    import jax.numpy as jnp

    if "class_mask" not in arrays:
        arrays = {**arrays, "class_mask": jnp.ones(arrays["logits"].shape[axis], bool)}
        class_axes = {**class_axes, "class_mask": 0}
    filled = {
        name: jnp.concatenate(
            [
                arrays[name],
                jnp.full(
                    (*arrays[name].shape[:of_classes], added, *arrays[name].shape[of_classes + 1 :]),
                    _FILL[name],
                    arrays[name].dtype,
                ),
            ],
            axis=of_classes,
        )
        for name, of_classes in class_axes.items()
    }
    return {**arrays, **filled}, class_axes


class ShardedAdapter(JaxAdapter):
    """The dense loss of `lsce_jax` with its classes divided over devices.

    Args:
        num_devices: how many.
        check_vma: whether JAX keeps track of what is the same on all devices.
        options: as in `JaxAdapter`.

    Raises:
        UnavailableError: there are not so many devices.
    """

    def __init__(self, num_devices: int, check_vma: bool = True, **options: Any) -> None:
        """Find the devices."""
        import jax

        import lsce_jax

        if jax.device_count() < num_devices:
            remedy = f"with XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} a CPU counts as so many"
            raise UnavailableError(f"JAX finds {jax.device_count()} devices, and {num_devices} are needed; {remedy}")
        self.num_devices = num_devices
        loss = divided(lsce_jax.vocab_parallel_label_smoothed_cross_entropy, num_devices, check_vma=check_vma)
        super().__init__(loss, **{"name": f"jax vocab-parallel, {num_devices} devices", **options})
        own = of_own_losses(self.arithmetic, self.device_model.family)
        self.arithmetic = on_shards(own, num_devices)


def on_shards(arithmetic: Arithmetic, num_devices: int) -> Arithmetic:
    """Return the arithmetic with a sum over devices after each sum, one more term for each, in any order."""
    return replace(arithmetic, depth=partial(_depth_on_shards, arithmetic.depth, num_devices))


def _depth_on_shards(depth: Callable[[int], int], num_devices: int, length: int) -> int:
    # Devices without a term add 0, which rounds nothing.
    return max(0, min(length - 1, depth(length) + num_devices - 1))
