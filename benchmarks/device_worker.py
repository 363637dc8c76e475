"""The process that checks and times losses of one framework on a device, for `benchmarks device`.

A loss may end the process, or leave the device unusable. So this is a process of its own, which says on its output, one
JSON object a line, what it is about to do and what it has found; its parent starts another one that leaves that loss
out. It gets one JSON object as its argument; see `Task`.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, NamedTuple

from benchmarks import checks
from benchmarks.device_losses import Loss, one_line
from benchmarks.timing import Case, LinearShape, Schedule, Shape, host_clock, make_rows, time_in_turns
from parity_tests.evidence.cards import AbsentError, find_device
from parity_tests.losses.adapters import UnavailableError

# The exit code of a process that leaves a device that takes no more work.
UNUSABLE = 3


class Task(NamedTuple):
    """What a process is to do.

    Args:
        framework: "jax" or "torch".
        device: "cpu", "cuda" or "tpu".
        parts: what to check and to time: "stage" ("check" or "time"), "kind" ("dense" or "linear"), "dtype", "shape".
        patterns: of the names of losses, with * and ?.
        failed: for each part, by its number, the losses to leave out, and why.
        rounds, calls: see `Schedule`.
        few_calls: the calls where there are few logits.
        quick: whether few cases are enough.
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


class _UnusableError(Exception):
    """The device takes no more work."""


class _Worker:
    def __init__(self, task: Task, say: Callable[[dict[str, Any]], None]) -> None:
        self.task, self.say, self.device = task, say, task.device
        self.framework: Any = importlib.import_module(f"benchmarks.device_{task.framework}")

    def run(self) -> None:
        with self.framework.settings():
            for part in self.task.parts:
                self.say({"part": part["number"], "now": None})
                self.say(self._found(part))

    def _found(self, part: dict[str, Any]) -> dict[str, Any]:
        try:
            self.framework.begin(self.device)
            rows, missing = (self._checked if part["stage"] == "check" else self._timed)(part)
        except _UnusableError:
            raise
        except Exception as error:  # as where there is no memory for the logits
            return {"rows": [], "missing": {}, "problem": self._alive_after(error)}
        return {"rows": rows, "missing": missing}

    def _losses(self, part: dict[str, Any]) -> list[Loss]:
        found = self.framework.losses(part["kind"] == "linear", part["dtype"], self.device)
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

    def _checked(self, part: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        linear = part["kind"] == "linear"

        def compute(loss: Loss, function: Callable[..., Any]) -> dict[str, Any]:
            cases = list(checks.make_cases(linear, part["dtype"], loss.smoothing, self.task.quick))
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
            cases = {name: _as_json(verdict) for name, verdict in verdicts.items()}
            return {"status": worst.status, "share": _as_json(worst)["share"], "cases": cases, "no_result": no_result}

        return self._each(part, compute)

    def _timed(self, part: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        linear, dtype = part["kind"] == "linear", part["dtype"]
        timed: dict[str, Case] = {}
        rows_of = {
            smoothing: None if linear else checks.timed_rows(dtype, smoothing, part["shape"][1])
            for smoothing in {loss.smoothing for loss in self._losses(part)}
        }
        if linear:
            arguments = self.framework.linear_arguments(LinearShape(*part["shape"]), dtype, self.device)
        else:
            some = next(iter(rows_of.values()))
            arguments = self.framework.dense_arguments(some, part["shape"][0], self.device)

        def compute(loss: Loss, function: Callable[..., Any]) -> dict[str, Any]:
            case, memory = self.framework.timed_case(loss, function, arguments, self.device, linear)
            result = case.run(*case.arguments())
            self.framework.check_alive(self.device)
            if linear:
                right = self.framework.is_finite(result)
                verdict = None if right else checks.Verdict(checks.WRONG, float("inf"), "not finite")
            else:
                arithmetic = self.framework.adapter(loss, function, self.device, linear).arithmetic
                least = self.framework.spread(result, checks.REPEATED)
                verdict = checks.check_timed(rows_of[loss.smoothing], part["shape"][0], *least, arithmetic)
            del result
            timed[loss.name] = case
            return {"memory": memory(), **({} if verdict is None else {"timed": _as_json(verdict)})}

        rows, missing = self._each(part, compute)
        self._time(part, rows, timed)
        return rows, missing

    def _time(self, part: dict[str, Any], rows: list[dict[str, Any]], timed: dict[str, Case]) -> None:
        """Time in turns; a loss that fails there has no more turns."""
        turns = _Turns(lambda name: self.say({"part": part["number"], "now": name}), self._alive_after)
        small = part["kind"] == "dense" and Shape(*part["shape"]).logits_bytes <= 2**20
        schedule = Schedule(self.task.rounds, self.task.few_calls if small else self.task.calls)
        cases = [turns.guarded(case) for case in timed.values()]
        measured = {row.name: row for row in make_rows(cases, time_in_turns(cases, schedule), [0] * len(cases))}
        for row in rows:
            if row["name"] in turns.failed:
                row["failed"] = turns.failed[row["name"]]
            elif row["name"] in measured:
                of = measured[row["name"]]
                row |= {"seconds": of.seconds, "least_seconds": of.least_seconds, "median_ms": of.milliseconds}


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


def _rank(status: str) -> int:
    return (checks.AGREES, checks.ROUNDED, checks.WRONG).index(status)


def _as_json(verdict: checks.Verdict) -> dict[str, Any]:
    share = verdict.share if verdict.share < float("inf") else "inf"
    return {"status": verdict.status, "share": share, "reason": verdict.reason}


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
