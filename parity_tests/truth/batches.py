"""Batches of a real run: written by a hook in a training loop, read as cases for the comparison of two losses.

A batch is one file, .safetensors or .npz, of arrays by name: `logits` [..., K], or `hidden` [..., D] and `weight`
(of torch [K, D], of JAX [D, K]); `labels`, integers [...] or numbers [..., K]; and any others that the losses take by
name, such as a mask `where` [...]. Safetensors keep the bits of bfloat16, which .npz cannot hold.
"""

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.files import write_whole
from parity_tests.truth.linear_cases import with_logits
from parity_tests.truth.precision import DTYPES

Arrays = dict[str, NDArray[Any]]
SUFFIXES = (".safetensors", ".npz")
EXPECTED = "logits (or hidden and weight) and labels; others, such as where, go to both losses by name"
# True values are computed for at most so many logits: with 50 digits, that takes seconds for each loss that is tried.
MOST_LOGITS = 20_000
# By the names that safetensors gives them.
_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class BatchError(ValueError):
    """A batch cannot be written, read or used; the message says why, and what to do."""


# --- Writing ----------------------------------------------------------------------------------------------------------


def save_batch(path: str | Path, **arrays: Any) -> None:
    """Write a batch of a training loop to a file, with the bits that it has there.

    It works inside functions that JAX compiles too: the file is then written when the compiled function runs. Arrays of
    torch may need gradients and be on any device. Call it outside of what torch.compile compiles. A file that is there
    is replaced, and never left half written.

    Args:
        path: the file; its name ends in .safetensors, or .npz, which has no bfloat16.
        arrays: arrays of torch, JAX or NumPy by name: `logits` [..., K] or `hidden` [..., D] and `weight`, `labels`
            [...], and what else the losses take by name.

    Raises:
        BatchError: the name has another ending, an array has a dtype that the file cannot hold, or the file cannot be
            written.

    Example:
        >>> import numpy as np, tempfile
        >>> from lsce_parity import save_batch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_batch(f"{folder}/batch.safetensors", logits=np.zeros((2, 3), np.float32), labels=np.array([0, 2]))
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise BatchError(f"{path}: name a file that ends in {' or '.join(SUFFIXES)}")
    if any(map(_is_traced, arrays.values())):
        # The values are there only when the compiled function runs.
        sys.modules["jax"].debug.callback(lambda given: _write(path, given), arrays)
        return
    _write(path, arrays)


def _is_traced(array: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.core.Tracer)


def _write(path: Path, given: Mapping[str, Any]) -> None:
    arrays = {name: to_numpy(array) for name, array in given.items()}
    unknown = [name for name, array in arrays.items() if array.dtype not in _NAMES]
    if unknown:
        kinds = ", ".join(f"{name} is {arrays[name].dtype}" for name in unknown)
        raise BatchError(f"a batch holds numbers and booleans only: {kinds}")
    if path.suffix == ".npz" and (narrow := [name for name, array in arrays.items() if array.dtype == _DTYPES["BF16"]]):
        raise BatchError(f".npz has no bfloat16 ({', '.join(narrow)}): write a .safetensors file")
    try:
        write_whole(path, _to_npz(arrays) if path.suffix == ".npz" else to_safetensors(arrays))
    except OSError as error:
        raise BatchError(f"{path} cannot be written: {error.strerror}") from error


def _to_npz(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its options are not arrays
    return file.getvalue()


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array of torch, JAX or NumPy as one of NumPy with the same bits."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            bits: NDArray[Any] = array.contiguous().view(torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array = array.numpy()
    return np.asarray(array)


# --- Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch as a case.

    Args:
        case: the inputs, with their rows flattened, and without any option.
        shape: the leading shape of the logits.
        per_row: names of the arrays besides inputs and labels that have a value for each row.
    """

    case: Case
    shape: tuple[int, ...]
    per_row: frozenset[str]


def read_batch(path: str | Path, ignore_index: int | None = None) -> Batch:
    """Return the batch in a file.

    Args:
        path: the file.
        ignore_index: the label of rows that do not count, if there is one.

    Raises:
        BatchError: the file cannot be read, or is no batch.
    """
    path = Path(path)
    try:
        return make_batch(_read(path), str(path), ignore_index)
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror or error}") from error
    except BatchError as error:
        raise BatchError(f"{path}: {error}") from error


def _read(path: Path) -> Arrays:
    if path.suffix not in SUFFIXES:
        raise BatchError(f"a batch is a file that ends in {' or '.join(SUFFIXES)}")
    data = path.read_bytes()
    try:
        if path.suffix == ".npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        return from_safetensors(data)
    except KeyError as error:
        raise BatchError(f"an array has the dtype {error}; expected is one of {', '.join(_DTYPES)}") from error
    except Exception as error:  # a damaged file may raise anything
        what = "file of plain arrays" if path.suffix == ".npz" else "safetensors file"
        raise BatchError(f"damaged or cut off, or no {what}: {type(error).__name__}: {error}") from error


def from_safetensors(data: bytes) -> Arrays:
    """Return the arrays of a file of safetensors, those of bfloat16 too, which `safetensors.numpy` cannot read.

    Raises:
        Exception: of any kind, if these are no safetensors.
    """
    deserialize: Any = safetensors.deserialize  # has no types
    return {
        name: np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
        for name, view in deserialize(data)
    }


def to_safetensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the file of safetensors with these arrays."""
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def make_batch(given: Mapping[str, Any], name: str, ignore_index: int | None = None) -> Batch:
    """Return the batch that arrays are.

    Raises:
        BatchError: an array is missing, or has a shape, dtype or value that cannot be.
    """
    arrays = {key: to_numpy(array) for key, array in given.items()}
    linear = "hidden" in arrays or "weight" in arrays
    needed = ("hidden", "weight", "labels") if linear else ("logits", "labels")
    if missing := [key for key in needed if key not in arrays]:
        found = ", ".join(f"{key} {list(array.shape)} {array.dtype}" for key, array in arrays.items())
        raise BatchError(f"no {' and '.join(missing)}; it has {found or 'no arrays'}; expected are {EXPECTED}")
    if linear and "logits" in arrays:
        raise BatchError("it has both logits and hidden: leave out one of them")
    operands = {key: _numbers(key, arrays.pop(key)) for key in needed[:-1]}
    first, labels = operands[needed[0]], arrays.pop("labels")
    shape, dtype = first.shape[:-1], first.dtype.name
    rows = int(np.prod(shape))
    if first.ndim < 2 or rows == 0 or first.shape[-1] == 0:
        what = "classes" if needed[0] == "logits" else "features"
        raise BatchError(
            f"{needed[0]} is {list(first.shape)}; expected are rows, with the {what} last, and at least one"
        )
    num_classes = _num_classes(operands)
    labels = _labels(labels, shape, num_classes).reshape((rows, -1) if labels.ndim > len(shape) else rows)
    per_row = frozenset(key for key, array in arrays.items() if array.shape[: len(shape)] == shape)
    flat = {key: a.reshape((rows, *a.shape[len(shape) :])) if key in per_row else a for key, a in arrays.items()}
    for key, array in flat.items():
        if array.dtype not in _NAMES:
            raise BatchError(f"{key} is {array.dtype}; expected are numbers or booleans")
    where = flat.pop("where") if _is_mask(flat.get("where"), rows) else None
    if labels.dtype.kind != "f":
        _check_classes(labels, num_classes, where, ignore_index)
    plain: dict[str, Any] = {"name": name, "dtype": dtype, "labels": labels, "where": where, "keywords": flat}
    if not linear:
        return Batch(Case(logits=_rows(first), **plain), shape, per_row)
    weight = operands["weight"]
    if weight.shape[0] != first.shape[-1]:  # of torch
        weight = weight.T
    layer: dict[str, Any] = {"weight": weight.astype(np.float64), "weight_dtype": weight.dtype.name}
    hidden = _rows(first)
    case = LinearCase(logits=hidden @ layer["weight"], hidden=hidden, **layer, **plain)
    return Batch(with_logits(case) if case.logits.size <= MOST_LOGITS else case, shape, per_row)


def _rows(array: NDArray[Any]) -> NDArray[np.float64]:
    return array.astype(np.float64).reshape(-1, array.shape[-1])


def _numbers(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.name not in DTYPES:
        hint = "; .npz has no bfloat16, .safetensors has" if array.dtype.kind == "V" else ""
        raise BatchError(f"{name} is {array.dtype}; expected is one of {', '.join(DTYPES)}{hint}")
    if nans := int(np.isnan(array).sum()):
        raise BatchError(f"{name} has {nans} NaN of {array.size}: take a batch from before they appear")
    return array


def _num_classes(operands: Arrays) -> int:
    if "logits" in operands:
        return int(operands["logits"].shape[-1])
    features, weight = operands["hidden"].shape[-1], operands["weight"].shape
    if weight == (features, features):
        raise BatchError(f"weight is {list(weight)}, so it cannot be told whether it is torch's [K, D] or JAX's [D, K]")
    if len(weight) != 2 or features not in weight:
        raise BatchError(f"weight is {list(weight)}; expected is [K, {features}] (torch) or [{features}, K] (JAX)")
    return int(weight[1] if weight[0] == features else weight[0])


def _labels(labels: NDArray[Any], shape: tuple[int, ...], num_classes: int) -> NDArray[Any]:
    expected = f"integers {list(shape)}, or numbers {[*shape, num_classes]}"
    if labels.shape not in (shape, (*shape, num_classes)) or labels.dtype not in _NAMES:
        raise BatchError(f"labels are {labels.dtype} {list(labels.shape)}; expected are {expected}")
    if labels.shape != shape:  # one number for each class
        numbers = labels.astype(np.float64)
        if nans := int(np.isnan(numbers).sum()):
            raise BatchError(f"labels have {nans} NaN of {numbers.size}")
        return numbers
    if labels.dtype.kind not in "iu":
        nans = int(np.isnan(labels).sum()) if labels.dtype.kind != "b" else 0
        raise BatchError(f"labels are {labels.dtype}{f', {nans} of them NaN' if nans else ''}; expected are {expected}")
    return labels.astype(np.int64)


def _is_mask(where: NDArray[Any] | None, rows: int) -> bool:
    return where is not None and where.dtype == np.bool_ and where.shape == (rows,)


def _check_classes(labels: NDArray[Any], num_classes: int, where: NDArray[Any] | None, ignored: int | None) -> None:
    counted = np.ones(labels.shape, bool) if where is None else where
    bad = counted & ((labels < 0) | (labels >= num_classes)) & (labels != ignored)
    if not bad.any():
        return
    values = [int(value) for value in np.unique(labels[bad])]
    shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
    hint = f"if both losses ignore it, say so: ignore_index {values[0]}" if len(values) == 1 else ""
    message = f"labels have {shown} in {int(bad.sum())} rows; the classes are 0 to {num_classes - 1}"
    raise BatchError(f"{message}; {hint}" if hint else message)
