"""A JAX program on the simulated arithmetic of a device: one primitive after another, in NumPy.

The program is the one that JAX lowers for the device's platform: `platform_dependent` and primitives with a lowering of
their own take its branch. Arithmetic is done by `Simulation`; what moves, compares or selects numbers, in NumPy or by
the primitive itself on the CPU.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from numpy.typing import NDArray

from lsce_jax.primitives import formula
from parity_tests.losses.adapters import JaxAdapter
from parity_tests.truth.arithmetic import FULL
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult
from parity_tests.truth.simulation import Simulation

Values = list[NDArray[Any]]

# Exact, or rounded once as IEEE 754 says: NumPy does the same as every device.
_ROUNDED: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "ceil": np.ceil,
    "eq": np.equal,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}
# Primitives that call a program, by the name of the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_UNCHANGED = ("optimization_barrier", "stop_gradient", "copy")
_OF_LSCE = "lsce_"  # how the names of the primitives of lsce_jax begin


def traced(adapter: JaxAdapter, case: Case) -> Callable[["SimulatedDevice"], AnyResult]:
    """Trace an adapter's loss and gradient of a case once; return a function that runs them on a device."""
    with adapter.settings(case.dtype):
        step, operands = adapter.step(case)
        program, shapes = jax.make_jaxpr(step, return_shape=True)(*operands)

    def run_on(device: SimulatedDevice) -> AnyResult:
        with adapter.settings(case.dtype):
            values = device.run(program, jax.tree.leaves(operands))
            return adapter.result(case, jax.tree.unflatten(jax.tree.structure(shapes), values))

    return run_on


class SimulatedDevice:
    """Runs programs on the simulated arithmetic of a device.

    Args:
        platform: "tpu", "cuda" or "cpu": the branch that programs take.
        simulation: the arithmetic.
    """

    def __init__(self, platform: str, simulation: Simulation) -> None:
        """Keep both."""
        self.platform, self.simulation = platform, simulation

    def run(self, program: ClosedJaxpr, operands: Sequence[Any]) -> Values:
        """Return the results of a program."""
        with np.errstate(all="ignore"):
            given = [self.simulation.flush(np.asarray(operand)) for operand in operands]
            return self._run(program.jaxpr, program.consts, given)

    def _run(self, program: Jaxpr, constants: Sequence[Any], operands: Sequence[Any]) -> Values:
        values: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return np.asarray(atom.val, getattr(atom.aval, "dtype", None))
            return values[atom]

        values.update(zip(program.constvars, map(_as_numpy, constants), strict=True))
        values.update(zip(program.invars, operands, strict=True))
        for equation in program.eqns:
            results = self._apply(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars]

    def call(self, program: Any, operands: Sequence[Any]) -> Values:
        """Run a program that may be closed or open."""
        if hasattr(program, "consts"):
            return self._run(program.jaxpr, program.consts, operands)
        return self._run(program, (), operands)

    def _apply(self, equation: Any, operands: Values) -> Values:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            return self.call(params[_CALLS[name]], operands)
        if name in _UNCHANGED:
            return operands
        if name.startswith(_OF_LSCE):
            kinds = tuple((operand.shape, operand.dtype) for operand in operands)
            return self.call(_lowered(name, self.platform, tuple(params.items()), kinds), operands)
        if name in _CONTROL:
            return _CONTROL[name](self, equation, operands)
        result = self._computed(name, params, operands)
        if result is None:
            return _by_primitive(equation, operands)
        kind = equation.outvars[0].aval
        return [np.asarray(result, kind.dtype).reshape(kind.shape)]

    def _computed(self, name: str, params: dict[str, Any], operands: Values) -> Any:
        """Return the result of an operation; None for one that NumPy does not do here."""
        if name in _ROUNDED:
            return self.simulation.flush(np.asarray(_ROUNDED[name](*operands)))
        if name in _MOVES:
            return _MOVES[name](*operands, **params)
        if name in _ARITHMETIC and operands and _is_floating(operands):
            return _ARITHMETIC[name](self.simulation, *operands, **params)
        return None


# --- Operations that are not arithmetic -------------------------------------------------------------------------------


def _as_numpy(value: Any) -> Any:
    return (
        value if jax.numpy.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended) else np.asarray(value)
    )


def _is_floating(operands: Values) -> bool:
    return all(jax.numpy.issubdtype(operand.dtype, np.floating) for operand in operands)


def _by_primitive(equation: Any, operands: Values) -> Values:
    """Return what the primitive computes on the CPU."""
    results = equation.primitive.bind(*operands, **equation.params)
    return [_as_numpy(result) for result in (results if equation.primitive.multiple_results else [results])]


def _broadcast_in_dim(values: NDArray[Any], *_: Any, shape: Any, broadcast_dimensions: Any, **__: Any) -> NDArray[Any]:
    ones = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, values.shape, strict=True):
        ones[axis] = size
    return np.broadcast_to(values.reshape(ones), shape)


def _select(which: NDArray[Any], *cases: NDArray[Any]) -> NDArray[Any] | None:
    return np.where(which, cases[1], cases[0]) if which.dtype == bool and len(cases) == 2 else None


def _convert(values: NDArray[Any], *, new_dtype: Any, **_: Any) -> NDArray[Any] | None:
    # XLA saturates what NumPy leaves undefined.
    to_integer = _is_floating([values]) and np.dtype(new_dtype).kind in "iu"
    return None if to_integer else values.astype(new_dtype)


def _iota(*_: Any, dtype: Any, shape: Any, dimension: int, **__: Any) -> NDArray[Any]:
    ones = [size if axis == dimension else 1 for axis, size in enumerate(shape)]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(ones), shape)


def _reduce_max(values: NDArray[Any], *, axes: Sequence[int], **_: Any) -> NDArray[Any] | None:
    empty = any(values.shape[axis] == 0 for axis in axes)
    return None if empty else np.max(values, axis=tuple(axes))


_MOVES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda *values, dimension, **_: np.concatenate(values, axis=dimension),
    "convert_element_type": _convert,
    "iota": _iota,
    "reduce_max": _reduce_max,
    "reshape": lambda values, *_, new_sizes, **__: values.reshape(new_sizes),
    "select_n": _select,
    "squeeze": lambda values, *, dimensions, **_: np.squeeze(values, axis=tuple(dimensions)),
    "transpose": lambda values, *, permutation, **_: values.transpose(permutation),
}


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def _dot_general(
    simulation: Simulation,
    first: NDArray[Any],
    second: NDArray[Any],
    *,
    dimension_numbers: Any,
    precision: Any,
    preferred_element_type: Any,
    **_: Any,
) -> NDArray[Any] | None:
    if first.dtype != second.dtype:
        return None
    (of_first, of_second), (batch_first, batch_second) = dimension_numbers
    left, rows = _as_matrices(first, batch_first, of_first)
    right, columns = _as_matrices(second, batch_second, of_second)
    bits = _kept_bits(simulation.arithmetic.matmul_bits, precision)
    product = simulation.matmul(left, np.swapaxes(right, -1, -2), preferred_element_type, bits)
    batch = [first.shape[axis] for axis in batch_first]
    return product.reshape((*batch, *rows, *columns))


def _as_matrices(
    values: NDArray[Any], batch: Sequence[int], contracted: Sequence[int]
) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return an array as [batch, free, contracted], and the shape of the free dimensions."""
    free = [axis for axis in range(values.ndim) if axis not in (*batch, *contracted)]
    shape = tuple(values.shape[axis] for axis in free)
    sizes = [int(np.prod([values.shape[axis] for axis in axes], dtype=np.int64)) for axes in (batch, free, contracted)]
    return values.transpose(*batch, *free, *contracted).reshape(sizes), shape


def _kept_bits(bits: int, precision: Any) -> int:
    """Return how many bits of its operands a product keeps: more passes keep more of them."""
    passes = precision[0] if isinstance(precision, tuple) else precision
    if passes == jax.lax.Precision.HIGH:
        return min(FULL, 2 * bits)
    return FULL if passes == jax.lax.Precision.HIGHEST else bits


def _elementary(name: str) -> Callable[..., NDArray[Any]]:
    def apply(simulation: Simulation, values: NDArray[Any], *, accuracy: Any = None) -> NDArray[Any]:
        return simulation.apply(name, values, highest=bool(accuracy == jax.lax.AccuracyMode.HIGHEST))

    return apply


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{name: _elementary(name) for name in ("exp", "exp2", "expm1", "log", "log1p", "tanh")},
    "div": lambda simulation, first, second: simulation.divide(first, second),
    "dot_general": _dot_general,
    "logistic": lambda simulation, values, **_: simulation.logistic(values),
    "reduce_sum": lambda simulation, values, *, axes, **_: simulation.sum(values, axes),
}


# --- Programs within programs -----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _lowered(name: str, platform: str, params: tuple[Any, ...], kinds: tuple[Any, ...]) -> Any:
    """Return the program that a primitive of lsce_jax stands for on a platform, for operands of these kinds."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]  # type: ignore[no-untyped-call]
    return jax.make_jaxpr(partial(formula(name, platform), **dict(params)))(*shapes)


def _platform_index(device: SimulatedDevice, equation: Any, _: Values) -> Values:
    for index, names in enumerate(equation.params["platforms"]):
        if names is None or device.platform in names:
            return [np.asarray(index, np.int32)]
    raise NotImplementedError(f"the program has no branch for {device.platform}")


def _cond(device: SimulatedDevice, equation: Any, operands: Values) -> Values:
    branches = equation.params["branches"]
    index = min(max(int(operands[0]), 0), len(branches) - 1)
    return device.call(branches[index], operands[1:])


def _while(device: SimulatedDevice, equation: Any, operands: Values) -> Values:
    params = equation.params
    of_condition, of_body = params["cond_nconsts"], params["body_nconsts"]
    condition, body = operands[:of_condition], operands[of_condition : of_condition + of_body]
    carried = operands[of_condition + of_body :]
    while bool(device.call(params["cond_jaxpr"], [*condition, *carried])[0]):
        carried = device.call(params["body_jaxpr"], [*body, *carried])
    return carried


def _scan(device: SimulatedDevice, equation: Any, operands: Values) -> Values:
    program, length, reverse = (equation.params[name] for name in ("jaxpr", "length", "reverse"))
    body = getattr(program, "jaxpr", program)
    # What is scanned or stacked has one dimension more outside. JAX 0.12 has no numbers of them.
    num_scanned = sum(_is_stacked(*pair) for pair in zip(equation.invars, body.invars, strict=True))
    num_stacked = sum(_is_stacked(*pair) for pair in zip(equation.outvars, body.outvars, strict=True))
    num_carried = len(body.outvars) - num_stacked
    num_constants = len(body.invars) - num_scanned - num_carried
    constants, rest = operands[:num_constants], operands[num_constants:]
    carried, scanned = rest[:num_carried], rest[num_carried:]
    steps = []
    for step in reversed(range(length)) if reverse else range(length):
        results = device.call(program, [*constants, *carried, *(values[step] for values in scanned)])
        carried = results[:num_carried]
        steps.append(results[num_carried:])
    if reverse:
        steps.reverse()
    if not steps:
        kinds = [variable.aval for variable in equation.outvars[num_carried:]]
        return [*carried, *(np.zeros(kind.shape, kind.dtype) for kind in kinds)]
    return [*carried, *(np.stack(parts) for parts in zip(*steps, strict=True))]


def _is_stacked(outside: Any, inside: Any) -> bool:
    return bool(len(outside.aval.shape) == len(inside.aval.shape) + 1)


_CONTROL: dict[str, Callable[[SimulatedDevice, Any, Values], Values]] = {
    "cond": _cond,
    "platform_index": _platform_index,
    "scan": _scan,
    "while": _while,
}
