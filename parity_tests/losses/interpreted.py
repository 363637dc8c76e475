"""Programs that JAX makes for a TPU or a GPU, run by StableHLO's reference interpreter.

`jax.export` lowers a function for a platform that is not there. jaxlib brings the interpreter that defines what a
StableHLO program means: it computes one operation after another, and shares no code with XLA. So the branch of a
program that only accelerators take is executed, and nothing of what XLA makes of it is trusted. It says nothing about
the arithmetic of the device, nor about its compiler.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.losses.adapters import JaxAdapter
from parity_tests.truth.arithmetic import any_order
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult

# What crosses the boundary of the interpreter: the others are views or casts of these.
_CARRIERS = {1: np.int32, 2: np.int32, 4: np.int32, 8: np.int64}


class InterpretedAdapter(JaxAdapter):
    """A `JaxAdapter` whose program is made for another platform, and interpreted here.

    Args:
        platform: "tpu", "cuda" or "cpu".
        options: as in `JaxAdapter`.

    Raises:
        UnavailableError: JAX is not there.
    """

    def __init__(self, platform: str, **options: Any) -> None:
        """Choose the platform."""
        super().__init__(**options)
        self.platform = platform
        # The interpreter rounds the host's exp, log1p and tanh, and adds one term after another.
        self.arithmetic = replace(self.arithmetic, depth=any_order)

    def unsupported(self, case: Case) -> str | None:
        """Return why the loss cannot handle a case, or None."""
        if isinstance(case, LinearCase) and not case.hidden.size:
            return "has no rows, and StableHLO's interpreter ends the process at a slice of none"
        return super().unsupported(case)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        import jax

        text, carried, shapes = self.module(case)
        names, results = sorted(shapes), self.evaluate(text, carried)
        parts = {name: part.astype(shapes[name]) for name, part in zip(names, results, strict=True)}
        with jax.enable_x64(case.dtype == "float64"):
            return self.result(case, parts)

    def evaluate(self, module: str, operands: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the results of a StableHLO module, its text with one public function "main", for `_CARRIERS`."""
        return evaluate(module, operands)

    def module(self, case: Case) -> tuple[str, list[NDArray[Any]], dict[str, Any]]:
        """Return the program of a case for the platform, its operands, and the dtype of each part of its result."""
        import jax

        with self.settings(case.dtype):
            step, operands = self.step(case)
            flat, structure = jax.tree.flatten(operands)
            given = [np.asarray(value) for value in flat]

            def program(*carried: Any) -> list[Any]:
                values = [_restored(value, array.dtype) for value, array in zip(carried, given, strict=True)]
                parts = step(*jax.tree.unflatten(structure, values))
                return [_widened(parts[name]) for name in sorted(parts)]

            carried = [_carried(value) for value in given]
            exported = jax.export.export(jax.jit(program, keep_unused=True), platforms=[self.platform])(*carried)
            dtypes = {name: part.dtype for name, part in jax.eval_shape(step, *operands).items()}
            return exported.mlir_module(), carried, dtypes


def _carried(value: NDArray[Any]) -> NDArray[Any]:
    """Return an array as the interpreter takes it: floating point in float32 or float64, others in int32 or int64."""
    if value.dtype.kind in "biu":
        carrier = _CARRIERS[value.dtype.itemsize]
        return value.view(carrier) if value.dtype.itemsize == np.dtype(carrier).itemsize else value.astype(carrier)
    return value if value.dtype.itemsize >= 4 else value.astype(np.float32)


def _restored(value: Any, dtype: np.dtype[Any]) -> Any:
    """Return a carried value in its own dtype, within the program."""
    import jax

    if dtype.kind == "u" and value.dtype.itemsize == dtype.itemsize:
        return jax.lax.bitcast_convert_type(value, dtype)
    return value.astype(dtype)


def _widened(part: Any) -> Any:
    return part if part.dtype.itemsize >= 4 else part.astype(np.float32)


def evaluate(module: str, operands: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the results of a StableHLO module.

    Args:
        module: its text, with one public function, "main".
        operands: float32, float64, int32 or int64.
    """
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    with mlir.make_ir_context() as context:
        stablehlo.register_interpreter_dialect(context)
        parsed = ir.Module.parse(module)
        results = stablehlo.eval_module(parsed, [_to_attribute(ir, operand) for operand in operands])
        return [_from_attribute(ir, result) for result in results]


def _to_attribute(ir: Any, array: NDArray[Any]) -> Any:
    element = {"f": {4: ir.F32Type, 8: ir.F64Type}, "i": {}}[array.dtype.kind].get(array.dtype.itemsize)
    kind = ir.IntegerType.get_signless(8 * array.dtype.itemsize) if element is None else element.get()
    return ir.DenseElementsAttr.get(np.ascontiguousarray(array).reshape(array.shape), type=kind, shape=array.shape)


def _from_attribute(ir: Any, attribute: Any) -> NDArray[Any]:
    kind = ir.RankedTensorType(attribute.type)
    dtype = {"f64": np.float64, "f32": np.float32}[str(kind.element_type)]
    return np.array(list(ir.DenseFPElementsAttr(attribute)), dtype).reshape(tuple(kind.shape))
