"""`lsce-parity self-check LOSS`."""

from functools import partial
from typing import Annotated

import typer

from parity_tests.commands.common import (
    CANNOT_RUN,
    DeviceOption,
    DtypeOption,
    FirstOption,
    JsonOption,
    ReportOption,
    announce,
    cannot_run,
    check_device,
    check_dtypes,
    exit_with,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.user_losses import SpecificationError, find, parse_options
from parity_tests.report.verdict import Banner
from parity_tests.report.words import PageTable
from parity_tests.self_checks import (
    SMOOTHING,
    CheckOutcome,
    UnsupportedError,
    agreement,
    make_subject,
    options_of,
    run_checks,
)
from parity_tests.studies.survey import Survey
from parity_tests.texts import count_of

HEADINGS = ("check", "dtype", ">error/bound", "verdict", "~detail")
NOTE = "Largest error of each check as a share of what rounding explains; at most 1 is right."


def self_check(
    loss: Annotated[
        str,
        typer.Argument(
            help="torch:package.module:name or jax:package.module:name, called as loss(logits, labels, smoothing=...).",
            show_default=False,
        ),
    ],
    *,
    option: FirstOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    compile_it: Annotated[
        bool, typer.Option("--compile", help="Of torch: also compare torch.compile with eager.")
    ] = False,
    json_file: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Check a label-smoothed cross-entropy without an oracle and a second framework.

    The loss has the keyword `smoothing`, and may have `convention`, `where` and `reduction`; without `reduction` it
    returns one loss per row. A check of an option that it lacks is "not applicable". Each check compares two runs of
    the loss that must give the same result, or a run and a known sum. On a machine without this library, copy the one
    file parity_tests/self_checks.py. Exit code 0: every check that applies agrees, 1: one does not, 2: no verdict.

    Examples:
        lsce-parity self-check torch:my.losses:smoothed --dtype float32
        lsce-parity self-check jax:lsce_jax:label_smoothed_cross_entropy --device cpu --dtype bfloat16
    """
    check_device(device)
    dtypes = check_dtypes(dtype, ("float32", "bfloat16"))
    try:
        found = partial(find(loss), **parse_options(option or []))
        options_of(found, smoothing=SMOOTHING)
        subject = make_subject(loss.partition(":")[0], found, device, compile_it)
    except SpecificationError as error:
        cannot_run(str(error))
    except UnsupportedError as error:
        cannot_run(f"{loss}: {error}, which the checks vary")
    # A signature that cannot be read; a framework or device that is not there.
    except (TypeError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        cannot_run(f"{loss}: {type(error).__name__}: {error}")
    announce(f"checking {loss} in {', '.join(dtypes)}")
    outcomes = [outcome for each in dtypes for outcome in run_checks(subject, each)]
    rows = [_row(each) for each in outcomes]
    console = PlainConsole()
    console.print(FittingTable.of(HEADINGS, rows))
    agrees = agreement(outcomes)
    content = {"command": "self-check", "loss": loss, "agrees": agrees, "outcomes": outcomes}
    write_json(json_file, {**content, "environment": describe_environment()}, console)
    word = {True: "AGREE", False: "DISAGREE", None: "NO VERDICT"}[agrees]
    applied = sum(each.verdict != "not applicable" for each in outcomes)
    wrong = [each.verdict not in ("agree", "not applicable") for each in outcomes]
    beginning = "" if agrees else f"{sum(wrong)} of "
    sentence = "no check got a result" if agrees is None else f"{beginning}{count_of(applied, 'check')} that apply"
    write_page(
        report,
        Survey({}, [], []),
        console,
        title=f"Self-check of {loss}",
        banner=Banner(word, "nothing" if agrees is None else word.lower(), [sentence]),
        tables=[PageTable("Checks", HEADINGS, rows, note=NOTE, wrong=wrong)],
    )
    console.print(f"\n{word}: {sentence}", highlight=False)
    if agrees is None:
        raise typer.Exit(code=CANNOT_RUN)
    exit_with(agrees)


def _row(outcome: CheckOutcome) -> list[str]:
    share = "" if outcome.verdict == "not applicable" else f"{outcome.share:.3f}"
    return [outcome.check, outcome.dtype, share, outcome.verdict, outcome.detail]
