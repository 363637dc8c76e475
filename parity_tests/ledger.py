"""What is known of each adapter, device and dtype, and how it is known."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["executed", "replayed", "interpreted", "compiled", "not run"]
# From the strongest to the weakest.
KINDS: tuple[Kind, ...] = ("executed", "replayed", "interpreted", "compiled", "not run")


@dataclass(frozen=True, order=True)
class Evidence:
    """How something is known.

    Args:
        adapter: name of the adapter.
        device: "cpu", "cuda" or "tpu".
        dtype: of the logits.
        kind: ran on that device ("executed"), values recorded on another machine were held against it ("replayed"), a
            kernel ran in its framework's interpreter ("interpreted"), the device's compiler accepted it ("compiled"),
            or none of these ("not run").
        detail: what the table adds, such as the card's name.
    """

    adapter: str
    device: str
    dtype: str
    kind: Kind
    detail: str = ""
