"""The process that checks and times losses of one framework on a device, for `benchmarks device` and `benchmarks all`.

A loss may end the process, or leave the device unusable. So this is a process of its own, which says on its output, one
JSON object a line, what it is about to do and what it has found; its parent starts another one that leaves that loss
out. It gets one JSON object as its argument; see `Task`.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engines import checks, machine
from benchmarks.engines.in_turns import engine
from benchmarks.engines.losses import ON_DEVICE, Loss, losses, one_line
from benchmarks.engines.timing import BYTES, Case, LinearShape, Schedule, Shape, host_clock, make_rows, time_in_turns
from parity_tests.evidence.cards import AbsentError, find_device
from parity_tests.losses.adapters import UnavailableError

# The exit code of a process that leaves a device that takes no more work.
UNUSABLE = 3


class Task(NamedTuple):
    """What a process is to do.

    Args:
        framework: "jax" or "torch".
        device: "cpu", "cuda" or "tpu".
        parts: what to do: "stage" ("check", "time" or "memory"), "kind" ("dense" or "linear"), "dtype", "shape". Where
            losses are timed: "alone", whether also without the gradient; "with_floors", whether the memory of the
            machine too; "schedule", if not as below; and "needs", how much memory losses take, by name, as multiples of
            the logits.
        patterns: of the names of losses, with * and ?.
        failed: for each part, by its number, the losses to leave out, and why.
        rounds, calls: see `Schedule`.
        few_calls: the calls where there are few logits.
        quick: whether few cases are enough.
        session: of `benchmarks all`; empty for the losses of `benchmarks device`.
    """

    framework: str
    device: str
    parts: list[dict[str, Any]]
    patterns: list[str]
    failed: dict[str, dict[str, str]]
    rounds: int
    calls: int
    few_calls: int
    quick: bool
    session: str = ""


class _UnusableError(Exception):
    """The device takes no more work."""


class _Worker:
    def __init__(self, task: Task, say: Callable[[dict[str, Any]], None]) -> None:
        self.task, self.say, self.device = task, say, task.device
        self.framework: Any = engine(task.framework)

    def run(self) -> None:
        with self.framework.settings():
            for part in self.task.parts:
                self.say({"part": part["number"], "now": None})
                self.say(self._found(part))

    def _found(self, part: dict[str, Any]) -> dict[str, Any]:
        stages = {"check": self._checked, "time": self._timed, "memory": self._measured}
        try:
            self.framework.begin(self.device)
            return stages[part["stage"]](part)
        except _UnusableError:
            raise
        except Exception as error:  # as where there is no memory for the logits
            return {"rows": [], "missing": {}, "problem": self._alive_after(error)}

    def _losses(self, part: dict[str, Any]) -> list[Loss]:
        shown = self.task.session or ON_DEVICE
        found = losses(self.task.framework, part["kind"], shown, self.device, part["dtype"])
        if self.task.session and self.task.quick:
            found = [loss for loss in found if not loss.compiled]
        return [loss for loss in found if any(fnmatch(loss.name, pattern) for pattern in self.task.patterns)]

    def _each(
        self, part: dict[str, Any], compute: Callable[[Loss, Callable[..., Any]], dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Return a row for each loss, with why it failed if it did, and why others are not here."""
        rows, missing = [], {}
        failed = self.task.failed.get(str(part["number"]), {})
        for loss in self._losses(part):
            row: dict[str, Any] = {"name": loss.name, "ours": loss.ours, "smoothing": loss.smoothing}
            if loss.name in failed:
                rows.append({**row, "failed": failed[loss.name]})
                continue
            self.say({"part": part["number"], "now": loss.name})
            try:
                rows.append(row | compute(loss, loss.make()))
            except _UnusableError:
                raise
            except UnavailableError as error:
                missing[loss.name] = str(error)
            except machine.DoesNotFitError as error:
                rows.append(row | {"failed": str(error)})
            except Exception as error:
                rows.append(row | {"failed": self._alive_after(error)})
            self.framework.release(self.device)
        return rows, missing

    def _alive_after(self, error: Exception) -> str:
        """Return what went wrong in words, if the device takes more work."""
        # Frames of the traceback hold arrays.
        traceback.clear_frames(error.__traceback__)
        reason = "out of memory" if self.framework.is_out_of_memory(error) else one_line(error)
        self._check_alive(reason)
        return reason

    def _check_alive(self, reason: str) -> None:
        try:
            self.framework.check_alive(self.device)
        except Exception as error:
            self.say({"unusable": reason})
            raise _UnusableError from error

    def _checked(self, part: dict[str, Any]) -> dict[str, Any]:
        linear = part["kind"] == "linear"

        def compute(loss: Loss, function: Callable[..., Any]) -> dict[str, Any]:
            cases = list(checks.make_cases(linear, part["dtype"], loss.smoothing, self.task.quick, loss.options))
            adapter = self.framework.adapter(loss, function, self.device, linear)
            # Each shape is compiled anew.
            found = checks.check(adapter, cases[:1] if loss.compiled else cases)
            verdicts = {name: verdict for name, verdict in found.items() if isinstance(verdict, checks.Verdict)}
            no_result = {name: reason for name, reason in found.items() if isinstance(reason, str)}
            usual = [verdict for name, verdict in verdicts.items() if name not in checks.HARD_CASES]
            for reason in no_result.values():
                self._check_alive(reason)
            if not usual:
                return {"failed": next(iter(no_result.values())), "no_result": no_result}
            worst = max(usual, key=lambda verdict: (_rank(verdict.status), verdict.share))
            shown = {name: _as_json(verdict) for name, verdict in verdicts.items()}
            accuracy = _accuracy([verdicts[name] for name in verdicts if name not in checks.HARD_CASES])
            share = _as_json(worst)["share"]
            return {"status": worst.status, "share": share, "cases": shown, "no_result": no_result, **accuracy}

        rows, missing = self._each(part, compute)
        return {"rows": rows, "missing": missing}

    def _arguments(self, part: dict[str, Any]) -> tuple[Any, ...]:
        """Return what the losses of a part are given."""
        if part["kind"] == "linear":
            return tuple(self.framework.linear_arguments(LinearShape(*part["shape"]), part["dtype"], self.device))
        some = checks.timed_rows(part["dtype"], 0.0, part["shape"][1])
        return tuple(self.framework.dense_arguments(some, part["shape"][0], self.device))

    def _timed(self, part: dict[str, Any]) -> dict[str, Any]:
        linear = part["kind"] == "linear"
        timed: _TimedCases = {}
        arguments = self._arguments(part)

        def compute(loss: Loss, function: Callable[..., Any]) -> dict[str, Any]:
            machine.check_fits(part.get("needs", {}).get(loss.name), part)
            program = self.framework.program(loss, function, arguments, self.device, linear)
            result, seconds = host_clock(lambda: program.case.run(*program.case.arguments()))
            self.framework.check_alive(self.device)
            verdict = self._verdict_on_timed(part, loss, function, result)
            del result
            found: dict[str, Any] = {"compile_s": seconds} if loss.compiled else {}
            found |= {} if verdict is None else {"timed": _as_json(verdict)}
            if part.get("alone"):
                alone = self.framework.program(loss, function, arguments, self.device, linear, alone=True).case
                alone.run(*alone.arguments())
                timed[loss.name, "alone"] = alone
            timed[loss.name, ""] = program.case
            # With "needs", memory was measured in a process of its own.
            return found | ({} if "needs" in part and self.task.framework == "torch" else program.facts())

        rows, missing = self._each(part, compute)
        if part.get("with_floors"):
            floors = machine.floors(math.prod(part["shape"]) * BYTES[part["dtype"]])
            timed |= {("floor", name): case for name, case in floors.items()}
        return {"rows": rows, "missing": missing, **self._time(part, rows, timed)}

    def _verdict_on_timed(
        self, part: dict[str, Any], loss: Loss, function: Callable[..., Any], result: Any
    ) -> checks.Verdict | None:
        if part["kind"] == "linear":
            right = self.framework.is_finite(result)
            return None if right else checks.Verdict(checks.WRONG, float("inf"), "not finite")
        arithmetic = self.framework.adapter(loss, function, self.device, False).arithmetic
        rows = checks.timed_rows(part["dtype"], loss.smoothing, part["shape"][1], loss.options)
        value, least_and_largest = self.framework.spread(result, checks.REPEATED)
        return checks.check_timed(rows, part["shape"][0], value, least_and_largest, arithmetic)

    def _time(self, part: dict[str, Any], rows: list[dict[str, Any]], timed: "_TimedCases") -> dict[str, Any]:
        """Time in turns; a loss that fails there has no more turns. Return the floors, if there are any."""
        turns = _Turns(lambda name: self.say({"part": part["number"], "now": name}), self._alive_after)
        small = part["kind"] == "dense" and Shape(*part["shape"]).logits_bytes <= 2**20
        schedule = Schedule(self.task.rounds, self.task.few_calls if small else self.task.calls)
        if "schedule" in part:
            schedule = Schedule(*part["schedule"])
        cases = [turns.guarded(case) for case in timed.values()]
        measured = make_rows(cases, time_in_turns(cases, schedule), [0] * len(cases))
        times = {
            key: {"seconds": of.seconds, "least_seconds": of.least_seconds, "median_ms": of.milliseconds}
            for key, of in zip(timed, measured, strict=True)
        }
        for row in rows:
            name = row["name"]
            if name in turns.failed:
                row["failed"] = turns.failed[name]
            elif (name, "") in times:
                alone = {"alone": times[name, "alone"]} if (name, "alone") in times else {}
                row.update(times[name, ""], **alone)
        floors = {name: times[kind, name] for kind, name in times if kind == "floor"}
        return {"floors": floors} if floors else {}

    def _measured(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the memory of this process that losses take. There should be one loss: see `machine.peak_of`."""
        arguments = self._arguments(part)

        def compute(loss: Loss, function: Callable[..., Any]) -> dict[str, Any]:
            linear = part["kind"] == "linear"
            case = self.framework.program(loss, function, arguments, self.device, linear).case
            return {"memory": machine.peak_of(lambda: case.run(*case.arguments()))}

        rows, missing = self._each(part, compute)
        return {"rows": rows, "missing": missing}


# What to time, by the name of the loss and "" or "alone"; or by "floor" and its name.
_TimedCases = dict[tuple[str, str], Case]


class _Turns:
    """What losses do in their turns: an exception of one is kept, and the others go on."""

    def __init__(self, say: Callable[[str], None], describe: Callable[[Exception], str]) -> None:
        self.say, self.describe, self.said = say, describe, ""
        self.failed: dict[str, str] = {}

    def guarded(self, case: Case) -> Case:
        def arguments() -> tuple[Any, ...]:
            if self.said != case.name:  # outside of the time that is taken
                self.say(case.name)
                self.said = case.name
            made: tuple[Any, ...] = self._attempt(case.name, case.arguments, ())
            return made

        def clock(call: Callable[[], Any]) -> tuple[Any, float]:
            taken: tuple[Any, float] = self._attempt(case.name, lambda: (case.clock or host_clock)(call), (None, 0.0))
            return taken

        return case._replace(arguments=arguments, clock=clock)

    def _attempt(self, name: str, call: Callable[[], Any], otherwise: Any) -> Any:
        if name in self.failed:
            return otherwise
        try:
            return call()
        except Exception as error:  # another library may raise anything
            self.failed[name] = self.describe(error)
            return otherwise


def _accuracy(verdicts: Sequence[checks.Verdict]) -> dict[str, Any]:
    """Return the worst and the median error of the gradient in scaled ULPs, and the largest error of the loss."""
    ulps = np.concatenate([verdict.ulps.ravel() for verdict in verdicts])
    errors = [verdict.loss_error for verdict in verdicts if verdict.loss_error is not None]
    of_gradient = {"worst_ulps": float(ulps.max()), "median_ulps": float(np.median(ulps))} if ulps.size else {}
    return {**of_gradient, "loss_error": max(errors)}


def _rank(status: str) -> int:
    return checks.STATUSES.index(status)


def _as_json(verdict: checks.Verdict) -> dict[str, Any]:
    share = verdict.share if verdict.share < float("inf") else "inf"
    ulps = {"worst_ulps": float(verdict.ulps.max())} if verdict.ulps.size else {}
    return {"status": verdict.status, "share": share, "reason": verdict.reason, **ulps}


def main() -> int:
    """Do the task of the first argument; return the exit code."""
    # What libraries print goes elsewhere.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        output.write(json.dumps(content) + "\n")
        output.flush()

    task = Task(**json.loads(sys.argv[1]))
    try:
        say({"card": find_device(task.framework, task.device)})
    except AbsentError as error:
        say({"absent": str(error)})
        return 0
    try:
        _Worker(task, say).run()
    except _UnusableError:
        return UNUSABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
