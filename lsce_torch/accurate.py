r"""log1p and quotients of one number per row, accurate on every device, and the entropy that every device has.

A TPU's own log1p is off by up to 4034 units in the last place, and its quotient by 198 (JAX's docs/accuracy.md). Small
losses would keep only three digits. More accurate forms would be slow on every logit, but cost nothing on one number
per row. So on TPUs both are made of operations that IEEE 754 defines; elsewhere they are torch's own.

- A quotient is a product with the reciprocal r of the denominator b, after one step of Newton's method,
  r (2 - b r): 4 roundings.
- For x >= 0, with 1 + x = 2^k (1 + f) and 0 <= f <= 1, s = f / (2 + f) and z = s^2,

      log1p(x) = k log 2 + f - (f^2 / 2 - s (f^2 / 2 + R)),    R = 2 z / 3 + 2 z^2 / 5 + 2 z^3 / 7 + ...

  f is x itself up to 1, so that nothing is lost in 1 + x. From FreeBSD's msun, e_log.c, with the series itself in place
  of a fitted polynomial.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lsce_torch.device import takes_plain_operations

# log 2 as a number whose product with k is exact, and the rest.
_LOG_2_HIGH, _LOG_2_LOW = 0.693145751953125, 1.42860682030941723e-6
# 2 / 3, 2 / 5 and so on; the next term is below a tenth of a rounding.
_SERIES = tuple(2 / (2 * power + 1) for power in range(1, 8))


def log1p(x: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return log(1 + x), on TPUs for x >= 0 only."""
    own = torch.log1p(x)
    if not takes_plain_operations(x) or x.dtype != torch.float32:
        return own
    # The derivatives are those of the device's own, 1 / (1 + x) and so on. inf and NaN stay as they are.
    correction = _log1p_of_basic_operations(x.detach()) - own.detach()
    return own + torch.where(torch.isfinite(correction), correction, 0)


def divide(numerator: Float[Tensor, "*rows"], denominator: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return the quotient of two tensors."""
    if not takes_plain_operations(numerator):
        return numerator / denominator
    rough = 1 / denominator
    reciprocal = rough * (2 - denominator * rough)
    return torch.where(torch.isfinite(reciprocal), numerator * reciprocal, numerator / denominator)


def entr(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return -x log x: 0 at 0, -inf below. TorchTPU does not have torch.special.entr.

    Its slope at 0 is infinite, on TPUs that of the smallest number: subnormal numbers are 0 there.
    """
    if not takes_plain_operations(x):
        own: Tensor = torch.special.entr(x)
        return own
    terms = -x * torch.log(torch.clamp(x, min=torch.finfo(x.dtype).tiny))
    return torch.where(x < 0, -torch.inf, terms)


def _log1p_of_basic_operations(x: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    bits = (1 + x).view(torch.int32)
    exponent = torch.where(x <= 1, 0, (bits >> 23) - 127)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    f = torch.where(x <= 1, x, fraction - 1)
    s = divide(f, 2 + f)
    z = s * s
    series = torch.zeros_like(z)
    for coefficient in reversed(_SERIES):
        series = z * (coefficient + series)
    half_square, k = 0.5 * f * f, exponent.to(x.dtype)
    return k * _LOG_2_HIGH + (f - (half_square - (s * (half_square + series) + k * _LOG_2_LOW)))
