"""Which label smoothing is yours: from one convention to another, and from targets or losses to the convention.

A target says less than it seems to. (on, off) is all that the loss depends on, and two conventions may reach the same
pair with different smoothings: 0.1 of "non_target" is 0.1 K/(K-1) of "uniform". So there may be more than one answer,
and the one with the fewest digits, which is what somebody once typed, comes first.

The linear algebra is in `fractions.Fraction`: a handful of unknowns, no rounding, and no library needed.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from lsce_spec.checks import check_class_num, check_smoothing, is_number
from lsce_spec.conventions import MAX_SUP, NON_TARGET, UNIFORM, Convention, ConventionName, Number, find_convention
from lsce_spec.errors import error

# Conventions of the field that have no name here, with what a user would write for them.
LEAKY = Convention("leaky", on=lambda e, k: 1 - e, off=lambda e, k: e / k)
ADDED = Convention("added", on=lambda e, k: 1 + 0 * e, off=lambda e, k: e / k)
_SOURCE = {
    LEAKY: "Convention('leaky', on=lambda e, k: 1 - e, off=lambda e, k: e / k)",
    ADDED: "Convention('added', on=lambda e, k: 1 + 0 * e, off=lambda e, k: e / k)",
}
# Without "clamp", which is "non_target" up to a smoothing of (K-1)/K.
_RECOGNISED = (UNIFORM, NON_TARGET, LEAKY, ADDED)
# Narrower dtypes do not tell conventions apart.
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}


@dataclass(frozen=True)
class Reading:
    """One way to read targets or losses.

    Args:
        convention: to pass as `convention`.
        smoothing: to pass as `smoothing`.
        options: what else to pass, such as `class_mask` or `subtract_entropy`.

    Example:
        >>> print(Reading(NON_TARGET, 0.1, {"subtract_entropy": True}))
        label_smoothed_cross_entropy(logits, labels, smoothing=0.1, convention='non_target', subtract_entropy=True)
    """

    convention: Convention
    smoothing: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the call to make."""
        convention = _SOURCE.get(self.convention, repr(self.convention.name))
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        arguments = f"smoothing={self.smoothing}, convention={convention}{options}"
        return f"label_smoothed_cross_entropy(logits, labels, {arguments})"


def convert_smoothing(
    source: ConventionName | Convention, target: ConventionName | Convention, smoothing: float, num_classes: int
) -> float:
    """Return the smoothing that gives in one convention the target that `smoothing` gives in another.

    Args:
        source: convention of `smoothing`.
        target: convention of the result.
        smoothing: number in [0, 1].
        num_classes: number of classes, at least 1; without the classes that a `class_mask` takes out.

    Returns:
        The smoothing, correctly rounded for the conventions that have a name. A single class leaves nothing to spread
        over, and the smoothing stays as it is.

    Raises:
        ValueError: no smoothing in [0, 1] gives that target, as from "max_sup" to "uniform"; or an argument out of
            its range.
        TypeError: an argument of the wrong type.

    Example: fairseq's 0.1 for 1000 classes in torch's convention.
        >>> convert_smoothing("non_target", "uniform", 0.1, num_classes=1000)
        0.1001001001001001
        >>> convert_smoothing("uniform", "non_target", 0.125, num_classes=5)
        0.1
    """
    given, wanted = find_convention(source), find_convention(target)
    if not is_number(smoothing):
        raise error("convert_number", given=repr(smoothing))
    check_smoothing(smoothing)
    check_class_num(num_classes, name="num_classes")
    if num_classes == 1 or given is wanted:
        return float(smoothing)
    aim = _values(given, Fraction(float(smoothing)), num_classes)
    found = _smoothing_for(wanted, aim[1], num_classes)
    if found is None or not 0 <= found <= 1 or not _same(_values(wanted, found, num_classes), aim):
        on, off, at_max = (float(value) for value in aim)
        largest = f", {at_max:+.6g} at the largest logit" if at_max else ""
        raise error(
            "convert_smoothing",
            source=repr(given.name),
            target=repr(wanted.name),
            smoothing=smoothing,
            num_classes=num_classes,
            values=f"{on:.6g} at the label, {off:.6g} elsewhere{largest}",
        )
    return float(found)


def _values(convention: Convention, smoothing: Number, num_classes: int) -> tuple[Number, Number, Number]:
    """Return what the target holds at the label and elsewhere, and what is added at the largest logit."""
    at_max = 0 if convention.at_max is None else convention.at_max(smoothing, num_classes)
    return convention.on(smoothing, num_classes), convention.off(smoothing, num_classes), at_max


def _same(one: Sequence[Number], other: Sequence[Number]) -> bool:
    # Exact but for conventions of the user's own, whose constants may be floats.
    return all(abs(a - b) <= 2.0**-50 for a, b in zip(one, other, strict=True))


def _smoothing_for(convention: Convention, off: Number, num_classes: int) -> Fraction | None:
    """Return the smoothing, beyond [0, 1] too, that gives `off`, which is linear up to 1/2 at least."""
    half = Fraction(1, 2)
    start, middle = (Fraction(convention.off(e, num_classes)) for e in (Fraction(0), half))
    return None if middle == start else half * (Fraction(off) - start) / (middle - start)


def identify_targets(targets: Any, labels: Any = None) -> list[Reading]:
    """Recognise the convention that a matrix of smoothed targets was made with.

    Args:
        targets: [N, K], what your code makes of the labels, float32 or float64: an array of any framework or lists
            of numbers, which count as float32. A few rows are enough.
        labels: [N] class indices; the largest target of each row, if not given.

    Returns:
        Readings, the likeliest first; none if no known convention made these targets. A class that gets nothing in any
        row may still be in the softmax of your loss, or be taken out of it. The targets cannot tell: the first reading
        leaves it in, with a `prior` that is 0 there, the others take it out, by `class_mask`.

    Raises:
        TypeError: targets of a narrower dtype.
        ValueError: an array is empty, not of that shape or not finite; or a label is no class.

    Example: is it 0.1 of one convention, or 0.125 of the other?
        >>> for reading in identify_targets([[0.9, 0.025, 0.025, 0.025, 0.025]]):
        ...     print(reading.convention.name, reading.smoothing)
        non_target 0.1
        uniform 0.125
    """
    rows, tolerance = _matrix("targets", targets), 16 * _roundoff("targets", targets)
    num_classes = len(rows[0])
    if labels is None:
        indices = [max(range(num_classes), key=row.__getitem__) for row in rows]
    else:
        indices = _indices(labels, len(rows), num_classes)
    others = [[row[k] for row, y in zip(rows, indices, strict=True) if y != k] for k in range(num_classes)]
    mask = [k in indices or any(column) for k, column in enumerate(others)]
    if not any(itertools.chain.from_iterable(others)):
        mask = [True] * num_classes  # no smoothing, rather than no class
    offs = [v for column, allowed in zip(others, mask, strict=True) if allowed for v in column]
    ons = [row[y] for row, y in zip(rows, indices, strict=True)]
    if not offs or not (_is_constant(ons, tolerance) and _is_constant(offs, tolerance)):
        return []
    on, off = math.fsum(ons) / len(ons), math.fsum(offs) / len(offs)

    def error_of(reading: Reading) -> float:
        pairs = zip(_values(reading.convention, reading.smoothing, sum(mask)), (on, off), strict=False)
        return max(0.0 if value == seen else abs(value - seen) / max(abs(value), abs(seen)) for value, seen in pairs)

    if all(mask):
        return _readings(off, num_classes, {}, error_of, tolerance)
    taken_out = _readings(off, sum(mask), {"class_mask": mask}, error_of, tolerance)
    return [
        Reading(UNIFORM, reading.smoothing, {"prior": [float(allowed) / sum(mask) for allowed in mask]})
        for reading in taken_out
        if reading.convention is UNIFORM
    ] + taken_out


def identify_loss(losses: Any, logits: Any, labels: Any) -> list[Reading]:
    """Recognise the convention of a loss from its values: random logits in, one loss per row out.

    The loss of a row is linear in what is asked for: on (lse - z_y) + off sum_{k != y} (lse - z_k), plus z_loss lse^2,
    minus the entropy of the target in the KL form. So a few rows tell all of these, and MaxSup by its own formula.
    Class weights, masks, softcap and ignored rows are not looked for: leave them off for the question.

    Args:
        losses: [N], not reduced, float32 or float64. A loss that knows the mean only is called with one row at a time.
        logits: [N, K], what the loss was given. Ten rows of random normal numbers are plenty.
        labels: [N] class indices.

    Returns:
        Readings, the likeliest first; none if no known convention explains every loss within its rounding.

    Raises:
        TypeError: losses of a narrower dtype.
        ValueError: an array is empty, not of that shape or not finite; a label is no class; or the rows are too few or
            too much alike.

    Example: a loss in the KL form, whose rounding is that of float64.
        >>> import math
        >>> logits, labels = [[1.0, 2.0, -1.0], [0.0, 3.0, 1.0], [2.0, 0.1, 0.3]], [0, 1, 2]
        >>> losses = []
        >>> for z, y in zip(logits, labels):
        ...     lse = math.log(sum(map(math.exp, z)))
        ...     target = [0.9 if k == y else 0.05 for k in range(3)]
        ...     losses.append(sum(q * (math.log(q) - (z_k - lse)) for q, z_k in zip(target, z)))
        >>> print(identify_loss(losses, logits, labels)[0])
        label_smoothed_cross_entropy(logits, labels, smoothing=0.1, convention='non_target', subtract_entropy=True)
    """
    rows = _matrix("logits", logits)
    num_classes = len(rows[0])
    values, indices = _vector("losses", losses, len(rows)), _indices(labels, len(rows), num_classes)
    # The errors of a sum of K terms, each at random up or down, add up to about sqrt(K) of one. Logits are exact, of
    # whatever dtype, but those that are not float64 make losses that are not, either.
    wide = str(getattr(logits, "dtype", "")).endswith("float64")
    roundoff = max(_roundoff("losses", losses), _ROUNDOFF["float64" if wide else "float32"])
    tolerance = (math.sqrt(num_classes) + 8) * 2 * roundoff
    features = [_Features.of(row, y) for row, y in zip(rows, indices, strict=True)]
    for names in ((), ("max_sup",), ("entropy",), ("z_loss",), ("entropy", "z_loss")):
        found = _fits(names, values, features, num_classes, tolerance)
        if found:
            return found
    return []


@dataclass(frozen=True)
class _Features:
    """What the loss of a row is linear in."""

    label: float  # lse - z_y
    others: float  # sum of lse - z_k over the other classes
    squared: float  # lse^2
    surplus: float  # max z - mean z
    largest: float  # max |z|, whose rounding is in every log-probability

    @staticmethod
    def of(row: Sequence[float], label: int) -> "_Features":
        peak = max(row)
        log_sum = math.log(math.fsum(math.exp(z - peak) for z in row))
        losses = [peak - z + log_sum for z in row]
        others = math.fsum(losses) - losses[label]
        surplus = math.fsum(peak - z for z in row) / len(row)
        return _Features(losses[label], others, (peak + log_sum) ** 2, surplus, max(map(abs, row)))


def _fits(
    names: tuple[str, ...], losses: list[float], features: list[_Features], num_classes: int, tolerance: float
) -> list[Reading]:
    """Return the readings with these options that explain every loss."""
    columns, rests = _equations(names, losses, features)
    # A few rows say it; all of them have to agree.
    solution = _least_squares(columns[:32], rests[:32]) or _least_squares(columns, rests)
    if solution is None:
        if names == ():
            raise error("identify_rows", rows=len(losses))
        return []
    options: dict[str, Any] = {"subtract_entropy": True} if "entropy" in names else {}

    def error_of(reading: Reading) -> float:
        on, off, at_max = _values(reading.convention, reading.smoothing, num_classes)
        z_loss = reading.options.get("z_loss", 0.0)
        entropy = _entropy(on) + (num_classes - 1) * _entropy(off) if "entropy" in names else 0.0
        largest = 0.0
        for loss, f in zip(losses, features, strict=True):
            terms = [on * f.label, off * f.others, z_loss * f.squared, -entropy]
            if at_max:
                terms = [f.label, -at_max * f.surplus]
            largest = max(largest, abs(loss - math.fsum(terms)) / (math.fsum(map(abs, terms)) + f.largest))
        return largest

    if names == ("max_sup",):
        candidates = (Reading(MAX_SUP, e) for e in _short_to_long(solution[0]) if 0 < e <= 1)
        return [reading for reading in candidates if error_of(reading) <= tolerance][:1]
    for z_loss in _short_to_long(solution[-1]) if "z_loss" in names else (None,):
        if z_loss is not None:
            options["z_loss"] = z_loss
        found = _readings(solution[1], num_classes, dict(options), error_of, tolerance)
        if found and (z_loss is None or z_loss > 0):
            return found
    return []


def _equations(
    names: tuple[str, ...], losses: list[float], features: list[_Features]
) -> tuple[list[list[float]], list[float]]:
    """Return the rows of the linear system whose solution is the strength of each term, and its right-hand side."""
    if names == ("max_sup",):
        return [[f.surplus] for f in features], [loss - f.label for loss, f in zip(losses, features, strict=True)]
    columns = [[f.label, f.others, *({"entropy": -1.0, "z_loss": f.squared}[n] for n in names)] for f in features]
    return columns, losses


def _readings(
    off: float, num_classes: int, options: Mapping[str, Any], error_of: Callable[[Reading], float], tolerance: float
) -> list[Reading]:
    """Return for each convention the shortest smoothing that is within the tolerance, the shortest of all first."""
    found: list[tuple[int, float, Reading]] = []
    for convention in _RECOGNISED:
        start = _smoothing_for(convention, off, num_classes)
        # Rounding may hide that it is 0, or put it beyond 1.
        for e in [] if start is None else [0.0, *_short_to_long(min(max(float(start), 0.0), 1.0))]:
            reading = Reading(convention, e, options)
            if (size := error_of(reading)) <= tolerance:
                if e == 0:
                    return [reading]  # in which all conventions agree
                found.append((len(repr(e)), size, reading))
                break
    return [reading for _, _, reading in sorted(found, key=lambda entry: entry[:2])]


def _short_to_long(value: float) -> Iterator[float]:
    """Yield a number rounded to one significant digit, to two, and so on."""
    return (float(f"{value:.{digits}g}") for digits in range(1, 18))


def _entropy(value: float) -> float:
    return -value * math.log(value) if value > 0 else 0.0


def _least_squares(columns: list[list[float]], rests: list[float]) -> list[float] | None:
    """Return the solution of the normal equations; None if it is not unique."""
    size = len(columns[0])
    exact = [[Fraction(v) for v in (*row, rest)] for row, rest in zip(columns, rests, strict=True)]
    matrix = [[sum((row[i] * row[j] for row in exact), Fraction(0)) for j in range(size + 1)] for i in range(size)]
    for i in range(size):
        pivot = next((j for j in range(i, size) if matrix[j][i]), i)
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        if matrix[i][i] == 0:
            return None
        for j in range(size):
            if j != i:
                factor = matrix[j][i] / matrix[i][i]
                matrix[j] = [a - factor * b for a, b in zip(matrix[j], matrix[i], strict=True)]
    return [float(row[-1] / row[i]) for i, row in enumerate(matrix)]


def _matrix(name: str, array: Any) -> list[list[float]]:
    """Return an array of any framework, or lists, as rows of finite numbers and equal length."""
    rows = array.tolist() if hasattr(array, "tolist") else array
    try:
        matrix = [[float(value) for value in row] for row in rows]
    except TypeError:
        raise error("identify_shape", name=name, expected="[N, K]") from None
    if not matrix or not matrix[0] or any(len(row) != len(matrix[0]) for row in matrix):
        raise error("identify_shape", name=name, expected="[N, K]")
    if not all(map(math.isfinite, itertools.chain.from_iterable(matrix))):
        raise error("identify_finite", name=name)
    return matrix


def _vector(name: str, array: Any, size: int) -> list[float]:
    """Return an array of any framework, or a list, as finite numbers, one per row."""
    values = array.tolist() if hasattr(array, "tolist") else array
    if isinstance(values, Sequence):
        # Of scalars too, which a loss of one row at a time returns.
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    if not isinstance(values, list) or len(values) != size or not all(map(is_number, values)):
        raise error("identify_shape", name=name, expected=f"[{size}]")
    if not all(map(math.isfinite, values)):
        raise error("identify_finite", name=name)
    return values


def _indices(labels: Any, size: int, num_classes: int) -> list[int]:
    values = _vector("labels", labels, size)
    for index, value in enumerate(values):
        if value != int(value) or not 0 <= value < num_classes:
            raise error("identify_label", value=value, index=index, last=num_classes - 1)
    return [int(value) for value in values]


def _roundoff(name: str, array: Any) -> float:
    first = array[0] if isinstance(array, Sequence) and len(array) else array
    dtype = str(getattr(first, "dtype", "float32")).removeprefix("torch.")
    if "float" in dtype and dtype not in _ROUNDOFF:
        raise error("identify_dtype", name=name, given=dtype)
    return _ROUNDOFF.get(dtype, _ROUNDOFF["float32"])


def _is_constant(values: list[float], tolerance: float) -> bool:
    return max(values) - min(values) <= tolerance * max(map(abs, values))
