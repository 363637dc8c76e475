r"""The linear layer before the loss: logits and gradients of one chunk of rows.

The gradient with respect to a chunk's logits z = h W + b gives those with respect to h, W and b by two matrix products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching
from jaxtyping import Array, Bool, Float, Int

from lsce_jax.inputs import compute_dtype, varying_like
from lsce_jax.primitives import define
from lsce_jax.sums import CLASS_VECTORS, Operands

# Classes in a tile of the weight's gradient on the CPU, and in a tile of the classes that `gradient_filter` keeps.
_TILE = 1024

Gradients = dict[str, Array]


class Layer(NamedTuple):
    """The linear layer that makes the logits.

    Args:
        hidden: its input, in the dtype to multiply in.
        weight: in any dtype; its gradient has the same.
        bias: in any dtype, or None; its gradient has the same.
    """

    hidden: Float[Array, "*batch D"]
    weight: Float[Array, "D K"]
    bias: Float[Array, " K"] | None


_STATIC = {"static": True}  # fixed when JAX traces the function


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerOperands:
    """A layer and the arrays to sum over, in C chunks of rows, or those of one chunk, without that dimension."""

    hidden: Float[Array, "n C D"]
    weight: Float[Array, "D K"]
    bias: Float[Array, " K"] | None
    labels: Int[Array, "n C"]
    counted: Bool[Array, "n C"] | None
    class_mask: Bool[Array, " K"] | Bool[Array, "n C K"] | None
    prior: Float[Array, " K"] | None
    class_weight: Float[Array, " K"] | None
    softcap: float | None = field(metadata=_STATIC)
    prior_entropy: bool = field(metadata=_STATIC)  # these three as in `Operands`
    largest: bool = field(metadata=_STATIC)
    stats: bool = field(metadata=_STATIC)
    skip: bool = field(metadata=_STATIC)  # whether the rows that count come first, and the others may be left out

    @staticmethod
    def of(layer: Layer, operands: Operands, *, skip: bool) -> "LayerOperands":
        """Return the operands of a layer, given what is to be summed over its logits."""
        names = ("labels", "counted", *CLASS_VECTORS, "softcap", "prior_entropy", "largest", "stats")
        return LayerOperands(*layer, **{name: getattr(operands, name) for name in names}, skip=skip)

    @property
    def rows(self) -> dict[str, Any]:
        """The operands with values for each row."""
        names = ("hidden", "labels", "counted", *(("class_mask",) if self.has_row_masks else ()))
        return {name: getattr(self, name) for name in names}

    @property
    def has_row_masks(self) -> bool:
        """Whether rows have class masks of their own."""
        return self.class_mask is not None and self.class_mask.ndim > 1

    def of_logits(self, logits: Float[Array, "*rows K"]) -> Operands:
        """Return what to sum over, given the logits of these rows."""
        return Operands(
            logits=logits,
            labels=self.labels,
            counted=self.counted,
            **{name: getattr(self, name) for name in CLASS_VECTORS},
            softcap=self.softcap,
            prior_entropy=self.prior_entropy,
            largest=self.largest,
            stats=self.stats,
            in_place=True,
        )


class Filter(NamedTuple):
    """The operands of `add_large`: see there."""

    threshold: float
    off: Float[
        Array, " n"
    ]  # target away from the label, without its factor; 0 for bad labels and rows that do not count
    factor: Float[Array, " K"]  # factor of `off` at each class; 0 outside the class mask


def chunk_logits(layer: Layer) -> Float[Array, "n K"]:
    """Return the logits in the compute dtype. The weight has the dtype of hidden."""
    dtype = compute_dtype(layer.hidden)
    logits = jnp.matmul(layer.hidden, layer.weight, preferred_element_type=dtype)
    return logits if layer.bias is None else logits + layer.bias.astype(dtype)[None, :]


def add_all(
    gradients: Gradients, hidden: Float[Array, "n D"], weight: Float[Array, "D K"], of_logits: Float[Array, "n K"]
) -> Gradients:
    """Return the gradient of hidden and, if `gradients` has the weight's, its sum with that of this chunk."""
    of_logits, dtype = of_logits.astype(hidden.dtype), of_logits.dtype
    products = {"hidden": jnp.matmul(of_logits, weight.T, preferred_element_type=dtype)}
    if "weight" in gradients:
        products["weight"] = _add_product(gradients["weight"], hidden, of_logits)
    return products


def add_large(
    gradients: Gradients,
    hidden: Float[Array, "n D"],
    weight: Float[Array, "D K"],
    of_logits: Float[Array, "n K"],
    kept: Filter,
) -> Gradients:
    """Return the result of `add_all` without the classes whose probability is negligible in every row.

    Away from the label the gradient of a logit is S p_k - off w_k. The second term is a product of a number per row and
    a number per class, and needs no matrix product: sum_k w_k W_k is the same for all rows, and the sum of off h over
    all rows is added up as "off_hidden". Only the first term is left out where it is small.
    """
    off, factor, dtype, num_classes = kept.off, kept.factor, of_logits.dtype, weight.shape[1]
    rest = of_logits + off[:, None] * factor[None, :]
    is_large = ~(jnp.max(jnp.abs(rest), axis=0) <= kept.threshold)  # NaN is large
    num_large = jnp.sum(is_large, dtype=jnp.int32)
    classes = jnp.flatnonzero(is_large, size=-(-num_classes // _TILE) * _TILE, fill_value=0)
    rest = rest.astype(hidden.dtype)

    def step(j: Array, products: Gradients) -> Gradients:
        of_tile = jax.lax.dynamic_slice_in_dim(classes, j * _TILE, _TILE)
        tile = jnp.where((j * _TILE + jnp.arange(_TILE, dtype=j.dtype) < num_large)[None, :], rest[:, of_tile], 0)
        products = dict(products)
        products["hidden"] += jnp.matmul(tile, weight[:, of_tile].T, preferred_element_type=dtype)
        if "weight" in products:
            product = jnp.matmul(hidden.T, tile, preferred_element_type=dtype)
            products["weight"] = products["weight"].at[:, of_tile].add(product)
        return products

    products = {"hidden": jnp.zeros(hidden.shape, dtype)}
    if "weight" in gradients:
        products["weight"] = gradients["weight"]
    products = varying_like(products, (gradients, hidden, weight, of_logits))
    products = dict(jax.lax.fori_loop(0, -(-num_large // _TILE), step, products))
    sum_of_weights = jnp.matmul(weight, factor.astype(weight.dtype), preferred_element_type=dtype)
    products["hidden"] -= off[:, None] * sum_of_weights[None, :]
    if "weight" in gradients:
        products["off_hidden"] = gradients["off_hidden"] + jnp.sum(off[:, None] * hidden.astype(dtype), axis=0)
    return products


def _whole(total: Array, hidden: Array, of_logits: Array) -> Array:
    return total + _product(hidden, of_logits, total.dtype)


def _product(hidden: Array, of_logits: Array, dtype: Any) -> Array:
    product: Array = jnp.matmul(hidden.T, of_logits, preferred_element_type=dtype)
    return product


def _in_tiles(total: Array, hidden: Array, of_logits: Array) -> Array:
    """Add the product in place: XLA for CPUs would write out the whole product first."""
    num_classes = total.shape[1]
    if not isinstance(num_classes, int) or num_classes <= _TILE:  # a symbolic number of classes has no last tile
        return _whole(total, hidden, of_logits)

    def step(j: Array, total: Array) -> Array:
        # A dynamic slice moves back a start that leaves too few classes: those of the tile before count as 0.
        start = jnp.minimum(j * _TILE, num_classes - _TILE)
        tile = jax.lax.dynamic_slice_in_dim(of_logits, start, _TILE, axis=1)
        tile = jnp.where((start + jnp.arange(_TILE, dtype=start.dtype) >= j * _TILE)[None, :], tile, 0)
        old = jax.lax.dynamic_slice_in_dim(total, start, _TILE, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, _whole(old, hidden, tile), start, axis=1)

    tiled: Array = jax.lax.fori_loop(0, -(-num_classes // _TILE), step, total)
    return tiled


# A compiler that divides tiles of classes gathers all of them.
_add_product_p = define("lsce_add_product", _whole, cpu=_in_tiles, undivided=("cpu",))


def _add_product(
    total: Float[Array, "D K"], hidden: Float[Array, "n D"], of_logits: Float[Array, "n K"]
) -> Float[Array, "D K"]:
    """Return total + hidden.T @ of_logits."""
    added: Array = _add_product_p.bind(total, hidden, of_logits)  # type: ignore[no-untyped-call]
    return added


def _add_product_under_vmap(operands: Sequence[Array], dims: Sequence[int | None]) -> tuple[Array, int]:
    return jax.vmap(_whole, in_axes=tuple(dims))(*operands), 0


batching.primitive_batchers[_add_product_p] = _add_product_under_vmap
# Where JAX differentiates a scan twice, it drops the rule of the gradient around this.
ad.defjvp(  # type: ignore[no-untyped-call]
    _add_product_p,
    lambda tangent, *_: tangent,
    lambda tangent, total, _, of_logits: _product(tangent, of_logits, total.dtype),
    lambda tangent, total, hidden, _: _product(hidden, tangent, total.dtype),
)
