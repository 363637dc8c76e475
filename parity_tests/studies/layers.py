"""Finds the first layer where two supposedly equal models diverge, forward and backward.

Both models get the same weights and the same batch. The first runs once, and every call of a layer is recorded, with
the gradients that flow through it. Then each layer of both models runs *alone*: it gets the recorded inputs of the
first model, and the layers within it are replaced by their recorded outputs, in the backward pass by their recorded
gradients. So an error shows in the layer whose code makes it and in no other, however many errors there are.

Two questions are asked of each result, with the yardstick of `layer_arithmetic.py`:

- *Is it the same function?* Both run in float64 on the same bits. There two right layers differ by rounding of 1e-16,
  and wrong ones by many orders of magnitude more.
- *Is it as accurate?* Both run in the dtype of the model. If a side is farther from its own float64 run than rounding
  explains, matrix products of fewer bits are simulated, to see whether they explain it.

A layer that computes in a narrower dtype whatever it is given has no float64 run. Then only the second question is
asked.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.losses.models import LOSS, MODEL, Arrays, Call, Given, Gradients, Model, ModelError, Result
from parity_tests.studies.derivatives import Cause, cause_of_layer
from parity_tests.studies.layer_arithmetic import (
    Direction,
    Key,
    Named,
    Part,
    Run,
    as_float64,
    explain_by_passes,
    is_floating,
    named,
    part_of,
    room_for_rounding,
)
from parity_tests.studies.layer_pairs import (
    Layout,
    activation_layout,
    differing_settings,
    equal_layout,
    is_statistic,
    match,
    unmatched_weights,
    weight_layout,
)
from parity_tests.texts import count_of
from parity_tests.truth.arithmetic import FULL
from parity_tests.truth.precision import FORMATS

Track = Callable[[list[str]], Iterable[str]]
# Modules that hold others and are never called.
_HOLDERS = ("List", "Dict", "ModuleList", "ModuleDict", "Rngs", "RngStream")


@dataclass
class LayerVerdict:
    """The comparison of one call of a layer.

    Args:
        name: of the call in the first model.
        other: in the second.
        kinds: names of the classes.
        depth: number of calls that it is within.
        order: number of calls that ended before.
        dtype: the wider of `narrow`, whose rounding is the yardstick.
        narrow: on both sides, the narrowest dtype in which anything is computed.
        parts: its results in the order of forward and backward pass.
        random: the sides that draw random numbers.
        weights: what is different about the weights.
        causes: for each side that is less accurate than rounding explains, what explains it and how that is known;
            None if no matrix products of fewer bits do.
        settings: attributes that differ, such as epsilon.
        cures: for each of these what to change in B.
        no_exact: for each side without a float64 run, why.
        not_derivatives: for each side whose gradient is not the derivative of what it computes, why. It is asked if
            only the backward pass parts.
        error: why it cannot be compared; None if it can.
    """

    name: str
    other: str
    kinds: tuple[str, str]
    depth: int = 0
    order: int = 0
    dtype: str = ""
    narrow: tuple[str, str] = ("", "")
    parts: list[Part] = field(default_factory=list)
    random: str = ""
    weights: list[str] = field(default_factory=list)
    causes: dict[str, tuple[str, str] | None] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    cures: list[str] = field(default_factory=list)
    no_exact: dict[str, str] = field(default_factory=dict)
    not_derivatives: dict[str, Cause] = field(default_factory=dict)
    error: str | None = None

    def share(self, direction: Direction) -> float:
        """Return the largest share of a direction."""
        return max((part.share for part in self.parts if part.direction == direction), default=0.0)

    def beyond(self, direction: Direction) -> Part | None:
        """Return the first result of a direction that parts."""
        return next((part for part in self.parts if part.direction == direction and part.share > 1), None)

    @property
    def is_open(self) -> bool:
        """Whether nothing can be said: it cannot be compared, or both sides draw random numbers."""
        return self.error is not None or self.random == "A and B"

    @property
    def agrees(self) -> bool:
        """Whether the layer is the same in both."""
        return not self.weights and not self.random and all(part.share <= 1 for part in self.parts)


@dataclass
class ModelsVerdict:
    """The comparison of two models.

    Args:
        layers: verdicts in the order in which the first model calls the layers; last the loss.
        notes: what was done to the weights.
        left_out: layers that are compared as a part of those around them, and why.
    """

    layers: list[LayerVerdict]
    notes: list[str]
    left_out: dict[str, str]

    @property
    def first(self) -> LayerVerdict | None:
        """The first layer that parts in the forward pass, or else in the backward pass; None if there is none."""
        wrong = sorted(
            (each for each in self.layers if not each.agrees and not each.is_open), key=lambda each: each.order
        )
        forward = [each for each in wrong if each.random or each.weights or each.beyond("forward")]
        return next(iter(forward or wrong[::-1]), None)

    @property
    def common_cause(self) -> str | None:
        """What explains all that parts, if it is one thing."""
        wrong = [each for each in self.layers if not each.agrees and not each.is_open]
        found = {(side, cause and cause[0]) for each in wrong for side, cause in each.causes.items()}
        if len(found) != 1 or not all(each.causes for each in wrong):
            return None
        ((side, cause),) = found
        return cause and f"{cause} in {side}"

    @property
    def agrees(self) -> bool | None:
        """Whether all layers are the same; None if some cannot be compared and no other parts."""
        if self.first is not None:
            return False
        return None if any(each.is_open for each in self.layers) else True


def compare_layers(
    first: Model,
    second: Model,
    *,
    mapping: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    copy_weights: bool = True,
    bits: tuple[int | None, int | None] = (None, None),
    replicas: int = 4,
    seed: int = 0,
    track: Track = lambda names: names,
) -> ModelsVerdict:
    """Compare two models layer by layer.

    Args:
        first: a model; its run is what the layers of both are given.
        second: the other. Their weights may change: see `copy_weights`.
        mapping: names in the second for names in the first that differ; see `layer_pairs.match`.
        layouts: "same" or "moved" for patterns of the first's names, where shapes do not tell.
        copy_weights: whether to copy A's weights to B; constant weights are first filled with random numbers. If False,
            the weights of both are compared.
        bits: for each model, the significant bits of float32 that its matrix products keep in a simulation.
        replicas: number of runs with everything moved by one unit in the last place.
        seed: of the replicas, and of gradients and weights that are made up.
        track: shows progress; it is given the names of the calls, and yields them.

    Raises:
        ModelError: the models cannot be compared.
    """
    return _Comparison(first, second, mapping or {}, layouts or {}, bits, replicas, seed).run(copy_weights, track)


class _Comparison:
    def __init__(
        self,
        first: Model,
        second: Model,
        mapping: Mapping[str, str],
        layouts: Mapping[str, str],
        bits: tuple[int | None, int | None],
        replicas: int,
        seed: int,
    ) -> None:
        if first.has_loss != second.has_loss:
            raise ModelError("only one of the models has a loss; return one on both sides or on neither")
        self.first, self.second, self.declared, self.bits = first, second, layouts, bits
        self.frameworks = first.framework, second.framework
        self.replicas, self.random = replicas, np.random.default_rng(seed)
        self.matches = match(first, second, mapping)
        self.weight_layouts: dict[str, Layout] = {}
        self.notes: list[str] = []
        self.left_out: dict[str, str] = {}
        self.wrong_weights: dict[str, list[str]] = {}

    def run(self, copy_weights: bool, track: Track) -> ModelsVerdict:
        self._check_inputs()
        problem = unmatched_weights(self.first, self.second, self.matches)
        if problem:
            raise ModelError(problem)
        self._list_unmatched()
        (self._copy_weights if copy_weights else self._compare_weights)()
        calls, others = self._record()
        for key, call in calls.items():
            # A layer that is given a gradient of 0 would agree with any.
            if call.output_gradients and not any(_is_nonzero(each) for each in call.output_gradients):
                self.notes.append(f"no gradient reaches the outputs of {key}, so its backward pass is not seen")
        names = [*calls, *([LOSS] if self.first.has_loss else [])]
        verdicts = [self._compare(name, calls, others) for name in track(names)]
        return ModelsVerdict(verdicts, self.notes, self.left_out)

    # --- The same weights and inputs ----------------------------------------------------------------------------------

    def _check_inputs(self) -> None:
        ours, theirs = self.first.inputs, self.second.inputs
        if len(ours) != len(theirs):
            raise ModelError(f"the example batches must be the same, but have {len(ours)} and {len(theirs)} arrays")
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if equal_layout(one.astype(np.float64), other.astype(np.float64)) is None:
                raise ModelError(
                    f"the example batches must be the same, but array {number} is not: shapes {list(one.shape)} and "
                    f"{list(other.shape)}. Make it from the same numbers in both, with axes in any order"
                )

    def _list_unmatched(self) -> None:
        for side, model, only in zip(("A", "B"), (self.first, self.second), self.matches.only, strict=True):
            for path in only:
                kind = model.layers[path].kind
                if kind not in _HOLDERS:
                    self.left_out[path] = f"only in {side} ({kind})"
        for side, model, only in zip(("A", "B"), (self.first, self.second), self.matches.only_tensors, strict=True):
            for name in only:
                if name in model.trainable:
                    path = next(path for path, layer in model.layers.items() if name in layer.tensors)
                    self._wrong(path if side == "A" else self._path_in_first(path), f"only {side} has {name}")
                else:
                    self.left_out[name] = f"a tensor that only {side} has; no weight"

    def _path_in_first(self, path: str) -> str:
        return next((ours for ours, theirs in self.matches.layers.items() if theirs == path), MODEL)

    def _wrong(self, path: str, what: str) -> None:
        self.wrong_weights.setdefault(path if path in self.matches.layers else MODEL, []).append(what)

    def _copy_weights(self) -> None:
        filled = sum(self._fill(self.first, name) for name in self.first.tensors)
        filled += sum(self._fill(self.second, name) for name in self.matches.only_tensors[1])
        for name, other in self.matches.tensors.items():
            ours, theirs = self.first.tensors[name], self.second.tensors[other]
            if ours.dtype != theirs.dtype:
                raise ModelError(f"{name} is of dtype {ours.dtype} and {other} of {theirs.dtype}; make both the same")
            layout = weight_layout(self.first, self.second, name, other, self.declared)
            self.second.tensors[other] = layout.to_second(ours)
            self.weight_layouts[name] = layout
        self.notes.append(f"{count_of(len(self.matches.tensors), 'tensor')} copied from A to B")
        if filled:
            self.notes[-1] += f"; to {filled} constant ones, such as biases of 0, random numbers were added before"

    def _fill(self, model: Model, name: str) -> bool:
        """Add random numbers to a weight if it is constant, since what is done wrong with it would not show."""
        values = model.tensors[name]
        known = is_floating(values) and (name in model.trainable or is_statistic(name))
        if not known or values.size < 2 or not np.all(values == values.flat[0]):
            return False
        moved = values.astype(np.float64) + 0.1 * np.abs(self.random.normal(size=values.shape))
        model.tensors[name] = moved.astype(values.dtype)
        return True

    def _compare_weights(self) -> None:
        for name, other in self.matches.tensors.items():
            ours, theirs = self.first.tensors[name], self.second.tensors[other]
            path = next(path for path, layer in self.first.layers.items() if name in layer.tensors)
            found = equal_layout(ours, theirs)
            try:
                expected = weight_layout(self.first, self.second, name, other, self.declared)
            except ModelError:
                expected = None
            if expected is not None and np.array_equal(expected.to_second(ours), theirs):
                found = expected
            elif found is None:
                self._wrong(path, f"{name} and {other} do not hold the same numbers")
            elif expected is not None:
                self._wrong(path, f"{other} holds the numbers of {name}, but not in its layout: it must be transposed")
            layout = expected or found
            if layout is not None:
                self.weight_layouts[name] = layout
        self.notes.append(f"{count_of(len(self.matches.tensors), 'tensor')} compared, as both models have them")

    # --- The recorded run ---------------------------------------------------------------------------------------------

    def _record(self) -> tuple[dict[str, Call], dict[str, Call]]:
        """Return the calls of both models by their names in the first; only layers that both call alike are taken."""
        tapped = dict(self.matches.layers)
        while True:
            calls = self.first.record(tapped, None)
            others = {self._key_in_first(each): each for each in self.second.record(tapped.values(), None).values()}
            self.calls_in_second = others
            self.in_second = {name: call.key for name, call in others.items()}
            unlike = self._unlike(calls, others, tapped)
            if not unlike:
                break
            for path, reason in unlike.items():
                self.left_out[path] = reason
                del tapped[path]
        called = {call.path for call in calls.values()}
        for path, what in list(self.wrong_weights.items()):
            if path not in called:  # they are of the layer around it
                around = path.rpartition(".")[0]
                while around and around not in called:
                    around = around.rpartition(".")[0]
                self.wrong_weights.setdefault(around or MODEL, []).extend(what)
        for path in tapped:
            if path not in called and self.first.layers[path].kind not in _HOLDERS:
                self.left_out[path] = "never called"
        return self.first.record(tapped, self._make_gradients), others

    def _key_in_first(self, call: Call) -> str:
        return self._path_in_first(call.path) + call.key[len(call.path) :]

    def _unlike(self, calls: dict[str, Call], others: dict[str, Call], tapped: Mapping[str, str]) -> dict[str, str]:
        """Return the layers that the models do not call alike, and why."""
        self.layouts: dict[tuple[str, str], list[Layout]] = {}
        found: dict[str, str] = {}
        for name in [*calls, *(name for name in others if name not in calls)]:
            call, other = calls.get(name), others.get(name)
            path = name.partition("#")[0]
            if call is None or other is None:
                found.setdefault(path, f"{'B' if call is None else 'A'} calls it more often")
                continue
            if (call.parent is None) != (other.parent is None) or (
                other.parent is not None and self._key_in_first_of(other.parent, others) != call.parent
            ):
                found.setdefault(path, "called by another layer")
                continue
            for which in ("inputs", "outputs"):
                ours, theirs = getattr(call, which), getattr(other, which)
                if len(ours) != len(theirs):
                    found.setdefault(path, f"{len(ours)} arrays are its {which} in A, {len(theirs)} in B")
                    break
                laid_out = [self._layout(path, tapped[path], which, *pair) for pair in zip(ours, theirs, strict=True)]
                self.layouts[name, which] = [each for each in laid_out if each is not None]
                if None in laid_out:
                    index = laid_out.index(None)
                    shapes = list(ours[index].shape), list(theirs[index].shape)
                    found.setdefault(path, f"its {which} have shape {shapes[0]} in A, {shapes[1]} in B")
        if MODEL in found:
            raise ModelError(f"the models cannot be compared: {found[MODEL]}")
        return found

    def _key_in_first_of(self, key: str, others: Mapping[str, Call]) -> str | None:
        return next((name for name, call in others.items() if call.key == key), None)

    def _layout(self, path: str, other: str, which: str, ours: NDArray[Any], theirs: NDArray[Any]) -> Layout | None:
        if path == MODEL and which == "inputs":
            found = equal_layout(ours.astype(np.float64), theirs.astype(np.float64))
            assert found is not None  # checked
            return found
        kinds = self.first.layers[path].kind, self.second.layers[other].kind
        return activation_layout(path, kinds, self.frameworks, (ours, theirs), self.declared)

    def _make_gradients(self, outputs: Arrays) -> Gradients:
        """Return the gradients of the outputs: those of the loss, or without one random numbers."""
        if not self.first.has_loss:
            return [
                self.random.normal(size=each.shape).astype(each.dtype) if is_floating(each) else None
                for each in outputs
            ]
        given = Given(outputs, {}, [np.ones((), np.float32)], {})
        return self.first.run(LOSS, given).input_gradients

    # --- One layer ----------------------------------------------------------------------------------------------------

    def _compare(self, name: str, calls: dict[str, Call], others: dict[str, Call]) -> LayerVerdict:
        if name == LOSS:
            verdict = LayerVerdict(LOSS, LOSS, ("", ""), order=len(calls))
            given = Given(calls[MODEL].outputs, {}, [np.ones((), np.float32)], {})
        else:
            call, path = calls[name], calls[name].path
            pair = self.first.layers[path], self.second.layers[self.matches.layers[path]]
            verdict = LayerVerdict(
                name, others[name].key, (pair[0].kind, pair[1].kind), _depth(call, calls), call.finished
            )
            verdict.weights = self.wrong_weights.get(path, [])
            of_settings = differing_settings(*pair)
            verdict.settings, verdict.cures = list(of_settings), list(of_settings.values())
            given = Given(
                call.inputs,
                {child: calls[child].outputs for child in call.children},
                call.output_gradients,
                {child: calls[child].input_gradients for child in call.children},
                self._own_weights(path),
            )
        try:
            self._measure(verdict, given)
        except Exception as error:  # a layer of the user's may raise anything
            verdict.error = _said(error)
        return verdict

    def _measure(self, verdict: LayerVerdict, given: Given) -> None:
        name = verdict.name
        other_name, other = self.in_second.get(name, name), self._to_second(name, given)
        children = {child: child.removeprefix(f"{name}.") for child in given.child_outputs}

        def run_first(given: Given = given, dtype: str | None = None, **options: Any) -> Named:
            result = self.first.run(name, given, dtype, **options)
            # Weights that only one side has are told apart by their names.
            kept = {each: values for each, values in result.weight_gradients.items() if each in self.weight_layouts}
            return named(replace(result, weight_gradients=kept), children)

        def run_second(dtype: str | None = None, **options: Any) -> Named:
            result = self.second.run(other_name, other, dtype, **options)
            return named(self._to_first(name, given, result), children)

        first, second = run_first(bits=self.bits[0]), run_second(bits=self.bits[1])
        again = run_first(bits=self.bits[0], stream=1), run_second(bits=self.bits[1], stream=1)
        verdict.random = " and ".join(
            side for side, *runs in zip("AB", (first, second), again, strict=True) if not _are_equal(*runs)
        )
        if verdict.random:
            return
        verdict.narrow = self.first.narrowest(name, given), self.second.narrowest(other_name, other)
        verdict.dtype = min(verdict.narrow, key=lambda dtype: FORMATS[dtype].roundoff)
        # On the CPU, since a device with matrix products of fewer bits makes steps of what should be one ulp.
        run_full = partial(run_first, bits=FULL)
        room = room_for_rounding(run_full, given, verdict.dtype, self.replicas, self.random)
        exact = self._exact(verdict, given, other, run_first, run_second)
        exact_room = dict.fromkeys(room, 0.0)
        if exact[0] is not None and exact[1] is not None:
            run_exact, wide = partial(run_first, dtype="float64"), as_float64(given)
            exact_room = room_for_rounding(run_exact, wide, "float64", self.replicas, self.random)
        for key, values in first.items():
            true = [None if each is None else each[key] for each in exact]
            verdict.parts.append(part_of(key, (values, second[key]), room[key], true, exact_room[key]))
        self._explain(verdict, (first, second), exact, room, (run_first, run_second))
        if verdict.beyond("backward") and not verdict.beyond("forward") and not any(verdict.causes.values()):
            self._differentiate(verdict, given, other)

    def _exact(
        self, verdict: LayerVerdict, given: Given, other: Given, run_first: Run, run_second: Run
    ) -> list[Named | None]:
        """Return the results of both sides in float64; None for a side that does not compute in it."""
        exact: list[Named | None] = []
        for side, model, name, what, run in (
            ("A", self.first, verdict.name, given, run_first),
            ("B", self.second, self.in_second.get(verdict.name, verdict.name), other, run_second),
        ):
            try:
                narrowest = model.narrowest(name, what, "float64")
                exact.append(run(dtype="float64") if narrowest == "float64" else None)
                reason = f"computes in {narrowest}, whatever it is given"
            except Exception as error:  # a layer of the user's may raise anything
                exact.append(None)
                reason = _said(error)
            if exact[-1] is None:
                verdict.no_exact[side] = reason
        return exact

    def _explain(
        self,
        verdict: LayerVerdict,
        results: tuple[Named, Named],
        exact: list[Named | None],
        room: Mapping[Key, float],
        runs: tuple[Run, Run],
    ) -> None:
        """Find out which matrix products of fewer bits explain that a side is less accurate than the other."""
        beyond = [part for part in verdict.parts if part.share > 1]
        if any(part.is_function for part in beyond):
            return
        for index, side in enumerate("AB"):
            true = exact[index] or exact[1 - index]
            if true is not None and any(side in part.off for part in beyond):
                if verdict.narrow[index] != verdict.dtype:
                    verdict.causes[side] = f"it computes in {verdict.narrow[index]}", ""
                    continue
                verdict.causes[side] = explain_by_passes(results[index], true, room, runs[index])

    def _differentiate(self, verdict: LayerVerdict, given: Given, other: Given) -> None:
        """Find out which side's gradient is not the derivative of what it computes."""
        sides = {
            "A": (self.first, verdict.name, given),
            "B": (self.second, self.in_second.get(verdict.name, verdict.name), other),
        }
        for side, each in sides.items():
            cause = None if side in verdict.no_exact else cause_of_layer(*each, self.replicas, self.random)
            if cause is not None:
                verdict.not_derivatives[side] = cause
                verdict.causes.pop(side, None)

    def _own_weights(self, path: str) -> dict[str, NDArray[Any]]:
        """Return the weights of the first model that a layer may use."""
        own = [name for name in self.first.trainable if path == MODEL or name.startswith(f"{path}.")]
        return {name: self.first.tensors[name] for name in sorted(own)}

    def _to_second(self, name: str, given: Given) -> Given:
        """Return what the first model's layer is given in the layouts of the second."""
        if name == LOSS:
            layouts = self.layouts[MODEL, "outputs"]
            return replace(given, inputs=[each.to_second(x) for each, x in zip(layouts, given.inputs, strict=True)])
        call = self.calls_in_second[name]
        return Given(
            _moved(given.inputs, self.layouts[name, "inputs"], call.inputs),
            {
                self.in_second[child]: _moved(
                    arrays, self.layouts[child, "outputs"], self.calls_in_second[child].outputs
                )
                for child, arrays in given.child_outputs.items()
            },
            _moved(given.output_gradients, self.layouts[name, "outputs"], call.outputs),
            {
                self.in_second[child]: _moved(arrays, self.layouts[child, "inputs"], self.calls_in_second[child].inputs)
                for child, arrays in given.child_input_gradients.items()
            },
        )

    def _to_first(self, name: str, given: Given, result: Result) -> Result:
        """Return what the second model's layer made in the layouts and names of the first."""
        if name == LOSS:
            return replace(result, input_gradients=_back(result.input_gradients, self.layouts[MODEL, "outputs"]))
        return Result(
            _back(result.outputs, self.layouts[name, "outputs"]),
            {
                child: _back(result.child_inputs[self.in_second[child]], self.layouts[child, "inputs"])
                for child in given.child_outputs
            },
            _back(result.input_gradients, self.layouts[name, "inputs"]),
            {
                child: _back(result.child_output_gradients[self.in_second[child]], self.layouts[child, "outputs"])
                for child in given.child_outputs
            },
            {
                ours: self.weight_layouts[ours].to_first(result.weight_gradients[theirs])
                for ours, theirs in self.matches.tensors.items()
                if theirs in result.weight_gradients and ours in self.weight_layouts
            },
        )


def _said(error: Exception) -> str:
    """Return the first line of what an error says, as far as it can be printed."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return "".join(character for character in text if character.isprintable())


def _are_equal(one: Named, other: Named) -> bool:
    return all(
        np.array_equal(values.astype(np.float64), other[key].astype(np.float64), equal_nan=True)
        for key, values in one.items()
    )


def _is_nonzero(values: NDArray[Any] | None) -> bool:
    return values is not None and bool(np.any(values != 0))


def _depth(call: Call, calls: Mapping[str, Call]) -> int:
    return 0 if call.parent is None else 1 + _depth(calls[call.parent], calls)


def _moved(arrays: Any, layouts: list[Layout], like: Arrays) -> Any:
    """Return arrays in the layout and dtype of the second model."""
    return [
        None if array is None else layout.to_second(array).astype(model.dtype)
        for array, layout, model in zip(arrays, layouts, like, strict=True)
    ]


def _back(arrays: Any, layouts: list[Layout]) -> Any:
    return [None if array is None else layout.to_first(array) for array, layout in zip(arrays, layouts, strict=True)]
