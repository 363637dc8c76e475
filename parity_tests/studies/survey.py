"""Runs all adapters in all cases and dtypes, and compares each with the truth and with its twin."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from parity_tests.evidence.ledger import Evidence, Kind
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.simulated import simulated_device
from parity_tests.studies.concurrent_calls import Call, call_each
from parity_tests.studies.verdicts import Difference, Outcome, compare_outcomes, examine
from parity_tests.truth.cases import Case
from parity_tests.truth.linear_cases import make_any_case
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import DTYPES


@dataclass(frozen=True)
class Member:
    """An adapter of a survey.

    Args:
        adapter: the adapter.
        ours: whether it must be within its bounds; a peer is shown for comparison.
        twin: name of the adapter that it is also compared with.
        dtypes: the dtypes in which it is called.
    """

    adapter: Adapter
    ours: bool
    twin: str | None = None
    dtypes: tuple[str, ...] = DTYPES

    def examine(self, case: Case, truth: Truth, call: Call | None) -> Outcome:
        """Compare the result of `call` with the truth."""
        if case.dtype not in self.dtypes:
            reason = f"is called in {', '.join(self.dtypes)} alone"
            return Outcome(self.adapter.name, case.name, case.dtype, "unsupported", reason)
        return examine(self.adapter, case, truth, call)


class Closeness(NamedTuple):
    """In how many cases an adapter is closer to the truth than a peer, or as close, of those with both results."""

    closer: int
    equal: int
    cases: int


@dataclass(frozen=True)
class Survey:
    """The results of a survey.

    Args:
        members: the adapters by name.
        outcomes: one for each adapter, case and dtype.
        differences: one for each pair of twins, case and dtype in which both gave a result.
    """

    members: dict[str, Member]
    outcomes: list[Outcome]
    differences: list[Difference]

    @property
    def agrees(self) -> bool:
        """Whether every adapter of ours agrees with the truth, and with its twin, wherever it was called."""
        ours = [outcome for outcome in self.outcomes if self.members[outcome.adapter].ours]
        sound = all(outcome.status in ("agree", "unsupported") for outcome in ours)
        return self.called and sound and all(difference.agrees for difference in self.differences)

    @property
    def called(self) -> bool:
        """Whether any adapter was called at all."""
        return any(outcome.status != "unsupported" for outcome in self.outcomes)

    def of(self, name: str) -> list[Outcome]:
        """Return the outcomes of an adapter, without the cases that it does not support."""
        return [outcome for outcome in self.outcomes if outcome.adapter == name and outcome.status != "unsupported"]

    def peers_of(self, name: str) -> list[str]:
        """Return the peers of the adapter's framework."""
        framework = self.members[name].adapter.framework
        return [peer for peer, other in self.members.items() if not other.ours and other.adapter.framework == framework]

    def closeness(self, name: str, peers: Sequence[str]) -> Closeness:
        """Return how often an adapter's largest share is below that of the best of some peers."""
        best: dict[tuple[str, str], float] = {}
        for outcome in (each for peer in peers for each in self.of(peer)):
            if outcome.comparison:
                key = (outcome.case, outcome.dtype)
                best[key] = min(best.get(key, math.inf), outcome.comparison.share)
        pairs = [
            (outcome.comparison.share, best[outcome.case, outcome.dtype])
            for outcome in self.of(name)
            if outcome.comparison and (outcome.case, outcome.dtype) in best
        ]
        return Closeness(sum(own < peer for own, peer in pairs), sum(own == peer for own, peer in pairs), len(pairs))

    def evidence(self) -> list[Evidence]:
        """Return the evidence: each adapter and dtype whose outcomes all agree was executed, or simulated."""
        found = []
        for name, member in self.members.items():
            for dtype in dict.fromkeys(outcome.dtype for outcome in self.outcomes):
                outcomes = [outcome for outcome in self.of(name) if outcome.dtype == dtype]
                if outcomes and all(outcome.status == "agree" for outcome in outcomes):
                    model = simulated_device(member.adapter)
                    kind: Kind = "executed" if model is None else "simulated"
                    where = str(model or getattr(member.adapter, "where", ""))
                    found.append(Evidence(name, member.adapter.device, dtype, kind, where))
        return found


def make_cases(names: Iterable[str], dtypes: Sequence[str]) -> list[Case]:
    """Return the cases of these names at each dtype.

    The dtypes of a case follow each other: outside of `jit` JAX compiles most operations once for three of them.
    """
    return [make_any_case(name, dtype) for name in names for dtype in dtypes]


def examine_each(members: dict[str, Member], cases: Iterable[Case]) -> Iterator[tuple[list[Outcome], list[Difference]]]:
    """Run every adapter on each case in turn. The outcomes are without results, which would fill the memory."""
    dtypes = {member.adapter.name: member.dtypes for member in members.values()}

    def takes(adapter: Adapter, case: Case) -> bool:
        return case.dtype in dtypes[adapter.name]

    for case, calls in call_each([member.adapter for member in members.values()], cases, takes):
        truth = solve(case)
        outcomes = {
            name: member.examine(case, truth, calls.get(member.adapter.name)) for name, member in members.items()
        }
        differences = []
        for name, member in members.items():
            # Each pair once.
            if member.twin in members and name < member.twin:
                pair = (outcomes[name], outcomes[member.twin])
                adapters = (member.adapter, members[member.twin].adapter)
                differences.append(compare_outcomes(case, truth, pair, adapters))
        found = [replace(outcome, result=None) for outcome in outcomes.values()]
        yield found, [difference for difference in differences if difference]


def survey(members: dict[str, Member], cases: Iterable[Case]) -> Survey:
    """Run every adapter on every case."""
    outcomes: list[Outcome] = []
    differences: list[Difference] = []
    for found, compared in examine_each(members, cases):
        outcomes += found
        differences += compared
    return Survey(members, outcomes, differences)
