r"""The truth about the model's distribution in each row: log-sum-exp and entropy, their gradients, and the bounds.

Neither depends on labels, so a row whose label is no class has them too. As for the loss, the definition of `lsce_spec`
runs at 50 digits on the exact bits of the inputs. First-order bounds, with the symbols of `bounds.py`, E = sum p_k d_k
and e_k the error of d_k:

- E is the quotient of sum exp(-d_k) d_k and s. A term of the first sum has the relative error c_e u + e_k of exp, that
  of its other factor, e_k / d_k, and one rounding, and the sum h of them; s has the relative error
  (h + c_e) u + sum p_k e_k. So the error of E is
  sum p_k (d_k ((c_e + h + 1) u + e_k) + e_k) + E ((h + c_e + c_d) u + sum p_k e_k).
- The entropy is L + E, both >= 0: the errors of both, and one rounding.
- The derivative of log-sum-exp is p_k, that of the entropy p_k (d_k - E). It may be formed from terms of the sizes p_k,
  p_k d_k and p_k E, each with the relative error r_k of p_k; and d_k and E have their own.
"""

from dataclasses import dataclass, replace

import mpmath
import numpy as np
from numpy.typing import NDArray

from lsce_spec import model_row
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import last_rounding, softcap_slope, terms_and_errors
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import DIGITS, Exact, exact, solve
from parity_tests.truth.precision import FloatArray


@dataclass(frozen=True)
class ModelTruth:
    """Log-sum-exp and entropy [N], and their gradients with respect to the logits [N, K]; 0 where no row counts."""

    lse: Exact
    entropy: Exact
    lse_gradient: Exact
    entropy_gradient: Exact


@dataclass(frozen=True)
class ModelBound:
    """Largest errors of a correct implementation of the same."""

    lse: FloatArray
    entropy: FloatArray
    lse_gradient: FloatArray
    entropy_gradient: FloatArray


def solve_model(case: Case) -> ModelTruth:
    """Return the truth about the rows of a case that count, and whose mask has a class."""
    rows, softcap = case.rows(), case.options.get("softcap")
    shape = rows.logits.shape
    with mpmath.workdps(DIGITS):
        number = mpmath.mpf
        solved = [
            model_row(
                [number(float(logit)) for logit in rows.logits[i]],
                class_mask=rows.allowed[i].tolist(),
                softcap=None if softcap is None else number(softcap),
                maths=mpmath.mp,
            )
            if _has_model(case)[i]
            else None
            for i in range(shape[0])
        ]
        zero, zeros = number(0), [number(0)] * shape[1]
        return ModelTruth(
            lse=exact([zero if row is None else row.lse for row in solved], shape[:1]),
            entropy=exact([zero if row is None else row.entropy for row in solved], shape[:1]),
            lse_gradient=exact([g for row in solved for g in (zeros if row is None else row.lse_gradient)], shape),
            entropy_gradient=exact(
                [g for row in solved for g in (zeros if row is None else row.entropy_gradient)], shape
            ),
        )


def _has_model(case: Case) -> NDArray[np.bool_]:
    rows = case.rows()
    return np.asarray(rows.counted & rows.allowed.any(axis=-1))


def model_bound(case: Case, arithmetic: Arithmetic) -> ModelBound:
    """Return the bounds for a correct implementation on a device of that arithmetic."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return _model_bound(_unlabelled(case), arithmetic)


def _unlabelled(case: Case) -> Case:
    """Return plain cross-entropy of the same rows, with labels that are classes."""
    softcap, has_model = case.options.get("softcap"), _has_model(case)
    labels = np.argmax(case.rows().allowed, axis=-1).reshape(case.batch_shape)
    return replace(
        case,
        labels=labels,
        options={} if softcap is None else {"softcap": softcap},
        smoothing=0.0,
        where=has_model.reshape(case.batch_shape),
        class_weight=None,
        prior=None,
        upstream=None,
    )


def _model_bound(case: Case, arithmetic: Arithmetic) -> ModelBound:
    truth = solve(case)
    terms, errors = terms_and_errors(case, truth, arithmetic)
    u, h, p, d = terms.u, terms.h, truth.probabilities, terms.finite_gap
    division = arithmetic.division
    of_sum = np.sum(p * errors.gap, axis=-1)
    mean_gap = np.sum(p * d, axis=-1)
    of_mean_gap = np.sum(p * (d * ((arithmetic.exp + h + 1) * u + errors.gap) + errors.gap), axis=-1)
    of_mean_gap += mean_gap * ((h + arithmetic.exp + division) * u + of_sum) + case.num_classes * terms.tiny
    entropy = errors.log_sum + of_mean_gap + u * (terms.log_sum + mean_gap)

    of_p = errors.gap + of_sum[:, None] + u * (h + 2 * arithmetic.exp + 8 + division)
    if arithmetic.exp_of_log:
        of_p = of_p + errors.log_sum[:, None] + u * (d + terms.log_sum[:, None])
    size = 1 + d + mean_gap[:, None]
    of_entropy = p * (size * of_p + errors.gap + of_mean_gap[:, None] + 4 * u * size)
    slope, slope_error = softcap_slope(case, terms, arithmetic)
    second_order = 1 + 2 * u * max(arithmetic.exp, arithmetic.log1p, arithmetic.division, arithmetic.tanh)

    def of_gradient(error: FloatArray, unscaled: FloatArray) -> FloatArray:
        error = second_order * (error * (slope + slope_error) + unscaled * (slope_error + 3 * u * slope))
        error = np.where(terms.allowed & terms.live[:, None], error + 4 * terms.tiny, 0.0)
        return error + last_rounding(unscaled * slope, case.dtype, error)

    return ModelBound(
        lse=np.where(terms.live, second_order * errors.lse, 0.0),
        entropy=np.where(terms.live, second_order * entropy, 0.0),
        lse_gradient=of_gradient(p * of_p, p),
        entropy_gradient=of_gradient(of_entropy, p * np.abs(d - mean_gap[:, None])),
    )
