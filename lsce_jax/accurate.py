r"""log1p and quotients of one number per row, accurate on every device.

A TPU's own log1p is off by up to 4034 units in the last place, and its quotient by 198 (JAX's docs/accuracy.md). Small
losses would lose all but three digits. Where the logits are, that cannot be helped without time; for a number per row
it costs nothing. So on TPUs both are made of operations that IEEE 754 defines. Elsewhere they are those of XLA.

- A quotient is a product with the reciprocal r of the denominator b, after one step of Newton's method,
  r (2 - b r): 4 roundings.
- For x >= 0, with 1 + x = 2^k (1 + f) and 0 <= f <= 1, s = f / (2 + f) and z = s^2,

      log1p(x) = k log 2 + f - (f^2 / 2 - s (f^2 / 2 + R)),    R = 2 z / 3 + 2 z^2 / 5 + 2 z^3 / 7 + ...

  f is x itself up to 1, so that nothing is lost in 1 + x. From FreeBSD's msun, e_log.c, with the series itself in place
  of a fitted polynomial.

They are primitives, so that `jax.grad` of every order, `jax.vmap` and `jax.export` know what they are.
"""

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching
from jaxtyping import Array, Float

from lsce_jax.inputs import varying_like
from lsce_jax.primitives import define

# log 2 as a number whose product with k is exact, and the rest.
_LOG_2_HIGH, _LOG_2_LOW = 0.693145751953125, 1.42860682030941723e-6
# 2 / 3, 2 / 5 and so on; the next term is below a tenth of a rounding.
_SERIES = tuple(2 / (2 * power + 1) for power in range(1, 8))


def log1p(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return log(1 + x), on TPUs for x >= 0 only."""
    result: Array = _log1p(x)
    return result


def divide(numerator: Float[Array, "*rows"], denominator: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return the quotient of two arrays of the same shape and dtype."""
    # See `sum_rules.bind`.
    result: Array = _divide(*varying_like((numerator, denominator), (numerator, denominator)))
    return result


def log1p_of_basic_operations(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return log(1 + x) for x >= 0 of operations that IEEE 754 defines, but for float64."""
    if x.dtype != jnp.float32:
        return jnp.log1p(x)
    above = 1 + x
    bits = jax.lax.bitcast_convert_type(above, jnp.int32)
    exponent = jnp.where(x <= 1, 0, (bits >> 23) - 127)
    fraction = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    f = jnp.where(x <= 1, x, fraction - 1)
    s = quotient_of_products(f, 2 + f)
    z = s * s
    series = jnp.zeros_like(z)
    for coefficient in reversed(_SERIES):
        series = z * (coefficient + series)
    half_square, k = 0.5 * f * f, exponent.astype(jnp.float32)
    result = k * _LOG_2_HIGH + (f - (half_square - (s * (half_square + series) + k * _LOG_2_LOW)))
    # inf and NaN as they are.
    return jnp.where(jnp.isinf(x) | jnp.isnan(x), x, result)


def quotient_of_products(numerator: Float[Array, "*rows"], denominator: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return the quotient by a reciprocal that one step of Newton's method has improved."""
    rough = 1 / denominator
    reciprocal = rough * (2 - denominator * rough)
    quotient = numerator * reciprocal
    return jnp.where(jnp.isfinite(reciprocal), quotient, numerator / denominator)


def _plain_quotient(numerator: Float[Array, "*rows"], denominator: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    return numerator / denominator


_log1p_p = define("lsce_log1p", jnp.log1p, tpu=log1p_of_basic_operations)
_divide_p = define("lsce_divide", _plain_quotient, tpu=quotient_of_products)


# Compiled, so that a call outside `jit` takes the formula of its platform.
@jax.jit
def _log1p(x: Array) -> Array:
    result: Array = _log1p_p.bind(x)  # type: ignore[no-untyped-call]
    return result


@jax.jit
def _divide(numerator: Array, denominator: Array) -> Array:
    result: Array = _divide_p.bind(numerator, denominator)  # type: ignore[no-untyped-call]
    return result


batching.defvectorized(_log1p_p)  # type: ignore[no-untyped-call]
batching.defbroadcasting(_divide_p)  # type: ignore[no-untyped-call]
ad.defjvp(_log1p_p, lambda tangent, x: _divide(tangent, 1 + x))  # type: ignore[no-untyped-call]
ad.defjvp(  # type: ignore[no-untyped-call]
    _divide_p,
    lambda tangent, _, denominator: _divide(tangent, denominator),
    lambda tangent, numerator, denominator: -_divide(_divide(numerator, denominator) * tangent, denominator),
)


def _transpose_of_divide(cotangent: Array, _: object, denominator: Array) -> tuple[Array | None, None]:
    return None if isinstance(cotangent, ad.Zero) else _divide(cotangent, denominator), None


ad.primitive_transposes[_divide_p] = _transpose_of_divide
