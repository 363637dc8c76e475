"""How far estimates are from times that others have published: `python -m lsce_cost.published`.

Each time is that of a program like ours, of the same size on the same device. The first are XLA's programs, which
compute all logits with one product, as the way that is compiled here does. The others are kernels of other projects,
which compute the same products in ways of their own.
"""

import sys
from typing import NamedTuple

from rich.console import Console

from lsce_cost.cost import CompilerMissingError, Request, measure
from lsce_cost.show import make_table, versions

WAY = "lsce fused"
# What the table shows for XLA's programs, least and most: measured time by estimate. A test holds the first.
LEAST, MOST = 1.5, 1.7


class Published(NamedTuple):
    """A published time."""

    program: str
    of_xla: bool
    source: str
    target: str
    rows: int
    features: int
    classes: int
    gradient: bool
    milliseconds: float

    def __str__(self) -> str:
        """Return the program and its size, as the name of a test has them."""
        of = "gradients" if self.gradient else "loss"
        return f"{self.program}-{self.target}-{self.rows}x{self.features}x{self.classes}-{of}"

    @property
    def request(self) -> Request:
        """The loss of that size."""
        return Request(self.target, self.rows, self.classes, self.features, gradient=self.gradient)


_MARIN, _TOKAMAX = "marin-community/marin#6596", "openxla/tokamax, linear_softmax_cross_entropy_loss"
_LIGER, _CCE = "linkedin/Liger-Kernel#1339", "arXiv:2411.09009, table 1"
PUBLISHED = (
    Published("marin, XLA", True, _MARIN, "gpu-h100", 32768, 2560, 128256, False, 32.58),
    Published("marin, XLA", True, _MARIN, "gpu-h100", 32768, 2560, 128256, True, 100.10),
    Published("Tokamax, XLA", True, _TOKAMAX, "gpu-h100", 32768, 4096, 128256, False, 55.5),
    Published("Tokamax, XLA", True, _TOKAMAX, "tpu-v7x", 32768, 4096, 128256, False, 59.5),
    Published("Tokamax, Mosaic", False, _TOKAMAX, "tpu-v7x", 32768, 4096, 128256, False, 47.5),
    Published("cut-cross-entropy", False, _CCE, "gpu-a100", 8192, 2304, 256000, False, 46.0),
    Published("Liger, CuTe", False, _LIGER, "gpu-b200", 8192, 4096, 32000, True, 4.52),
    Published("Liger, CuTe", False, _LIGER, "gpu-b200", 8192, 4096, 128256, True, 17.51),
    Published("Liger, CuTe", False, _LIGER, "gpu-b200", 8192, 4096, 262144, True, 36.30),
    Published("Liger, Triton", False, _LIGER, "gpu-b200", 8192, 4096, 128256, True, 121.78),
)


HEADINGS = ("program", "target", ">size", "of", ">measured", ">estimate", ">measured / estimate", "source")


def compare() -> list[list[str]]:
    """Compile each program, and return a row for each, with its source at the end.

    Raises:
        CompilerMissingError: a compiler is not installed.
        ValueError: a program has no estimate.
    """
    rows = []
    for each in PUBLISHED:
        cost = measure(each.request, WAY)
        if cost.roofline_seconds is None:
            raise ValueError(f"{WAY} has no estimate for {each.target}: {cost.reason}")
        estimate = 1e3 * cost.roofline_seconds
        rows.append([
            each.program,
            each.target,
            f"{each.rows} x {each.features} x {each.classes}",
            "loss, gradients" if each.gradient else "loss",
            f"{each.milliseconds:.2f} ms",
            f"{estimate:.2f} ms",
            f"{each.milliseconds / estimate:.2f}",
            each.source,
        ])  # fmt: skip
    return rows


def main() -> None:
    """Print the table."""
    console = Console()
    try:
        rows = compare()
    except (CompilerMissingError, ValueError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    table = make_table(*HEADINGS[:-1])
    for row in rows:
        table.add_row(*row[:-1])
    console.print(table)
    console.print(
        f"Estimates: {WAY}, all logits, bfloat16. {versions(each.target for each in PUBLISHED)}", highlight=False
    )
    for program, source in dict.fromkeys((row[0], row[-1]) for row in rows):
        console.print(f"{program}: {source}", highlight=False)


if __name__ == "__main__":
    main()
