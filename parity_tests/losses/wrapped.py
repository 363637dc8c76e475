"""Losses without smoothing, of this project and of other libraries, with smoothing added by `linear_add_smoothing`.

A user adds smoothing to the loss of each row and reduces the result. So do these functions, which take the arguments of
`linear_label_smoothed_cross_entropy`. An unsmoothed loss is called as its library documents it: Tokamax 0.0.12,
cut-cross-entropy 25.1.1, liger-kernel 0.8.5, torch 2.13.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter, UnavailableError
from parity_tests.losses.peers import PeerAdapter, WorkerAdapter
from parity_tests.truth.arithmetic import NARROW
from parity_tests.truth.cases import Case
from parity_tests.truth.precision import compute_dtype

Loss = Callable[..., Any]
IGNORED = -100
# Options that the loss without smoothing has too. The others are those of the smoothing.
OF_NLL = ("bias", "where", "ignore_index", "class_mask", "chunk_size")
OF_CALLER = ("chunk_size", "reduction", "denominator")
INTERPRETED = {"TRITON_INTERPRET": "1"}  # which Triton reads when it is loaded


def added(nll: Loss, add: Loss, maths: str) -> Loss:
    """Return the loss that is made of the unsmoothed loss of each row.

    Args:
        nll: the unsmoothed loss: (hidden, weight, labels), and the options that it needs.
        add: `linear_add_smoothing` of a framework.
        maths: "jax.numpy" or "torch".
    """

    def loss(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        np = importlib.import_module(maths)
        rows = nll(hidden, weight, labels, **{name: options[name] for name in OF_NLL if name in options})
        of_smoothing = {name: value for name, value in options.items() if name not in OF_CALLER}
        losses = add(rows, hidden, weight, labels, **of_smoothing)
        if options["reduction"] != "mean":
            return losses if options["reduction"] == "none" else losses.sum()
        weights = np.ones(labels.shape, dtype=losses.dtype)
        if "class_weight" in options:
            weights = options["class_weight"][labels.clip(0, options["class_weight"].shape[0] - 1)]
        total = np.where(counted(labels, options), weights, np.zeros_like(weights)).sum()
        return losses.sum() / np.where(total == 0, np.ones_like(total), total)

    return loss


def counted(labels: Any, options: dict[str, Any]) -> Any:
    """Return which rows count, in the shape of the labels."""
    rows = (labels == labels) & options.get("where", True)  # noqa: PLR0124 - True for all, in either framework
    return rows & (labels != options["ignore_index"]) if options.get("ignore_index") is not None else rows


def jax_added(nll: Loss, add: Loss | None = None) -> Loss:
    """Return the loss that is made of an unsmoothed one of JAX."""
    return added(nll, add or importlib.import_module("lsce_jax").linear_add_smoothing, "jax.numpy")


def torch_added(nll: Loss, add: Loss | None = None) -> Loss:
    """Return the loss that is made of an unsmoothed one of torch."""
    return added(nll, add or importlib.import_module("lsce_torch").linear_add_smoothing, "torch")


# --- Unsmoothed losses ----------------------------------------------------------------------------------------------


def ours_of_jax(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    """Return our linear loss of each row."""
    loss = importlib.import_module("lsce_jax").linear_label_smoothed_cross_entropy
    return loss(hidden, weight, labels, smoothing=0.0, **options)


def ours_of_torch(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    """Return our linear loss of each row."""
    loss = importlib.import_module("lsce_torch").linear_label_smoothed_cross_entropy
    return loss(hidden, weight, labels, smoothing=0.0, reduction="none", **options)


def optax_of_logits(
    hidden: Any, weight: Any, labels: Any, bias: Any = None, class_mask: Any = None, **others: Any
) -> Any:
    """Return Optax's loss of each row, from all logits in the compute dtype."""
    del others  # the loss of a row that does not count may be anything
    np, dtype = importlib.import_module("jax.numpy"), compute_dtype(hidden.dtype.name)
    logits = np.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=dtype)
    ones = (1,) * (logits.ndim - 1)
    if bias is not None:
        logits = logits + bias.astype(dtype).reshape(*ones, -1)
    if class_mask is not None:
        logits = np.where(class_mask.reshape(*ones, -1), logits, -np.inf)
    return importlib.import_module("optax").softmax_cross_entropy_with_integer_labels(logits, labels)


def cross_entropy_of_logits(
    hidden: Any, weight: Any, labels: Any, bias: Any = None, class_mask: Any = None, **others: Any
) -> Any:
    """Return torch's loss of each row, from all logits, which the layer stores in the dtype of hidden."""
    torch = importlib.import_module("torch")
    functional = torch.nn.functional
    logits = functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    if class_mask is not None:
        logits = torch.where(class_mask, logits, -torch.inf)
    if logits.ndim > 2:
        logits = logits.movedim(-1, 1)
    wide, labels = torch.promote_types(hidden.dtype, torch.float32), _ignoring(labels, others)
    return functional.cross_entropy(logits.to(wide), labels, reduction="none", ignore_index=IGNORED)


def _ignoring(labels: Any, options: dict[str, Any]) -> Any:
    """Return torch's labels with the number that most libraries ignore where a row does not count."""
    return importlib.import_module("torch").where(counted(labels, options), labels.long(), IGNORED)


def _of_rows(nll: Loss, hidden: Any, weight: Any, labels: Any, bias: Any, others: dict[str, Any]) -> Any:
    """Call a loss that takes [N, D] and [N], with the weight in the dtype of hidden."""
    flat = hidden.reshape(-1, hidden.shape[-1]), weight.to(hidden.dtype), _ignoring(labels, others).reshape(-1)
    return nll(*flat, None if bias is None else bias.to(hidden.dtype)).reshape(labels.shape)


def linear_cross_entropy(
    hidden: Any, weight: Any, labels: Any, bias: Any = None, *, in_chunks: bool = False, **others: Any
) -> Any:
    """Return `torch.nn.functional.linear_cross_entropy` of each row."""
    nn = importlib.import_module("torch.nn")
    if not hasattr(nn.functional, "linear_cross_entropy"):
        raise UnavailableError("this torch has no F.linear_cross_entropy. Run: pip install 'torch>=2.13'")
    options = nn.LinearCrossEntropyOptions() if in_chunks else None

    def nll(hidden: Any, weight: Any, labels: Any, bias: Any) -> Any:
        return nn.functional.linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction="none", options=options
        )

    return _of_rows(nll, hidden, weight, labels, bias, others)


def liger(hidden: Any, weight: Any, labels: Any, bias: Any = None, **others: Any) -> Any:
    """Return `LigerFusedLinearCrossEntropyLoss` of each row."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")
    return _of_rows(
        lambda hidden, weight, labels, bias: loss(weight, hidden, labels, bias), hidden, weight, labels, bias, others
    )


def cut_cross_entropy(hidden: Any, weight: Any, labels: Any, bias: Any = None, **others: Any) -> Any:
    """Return `cut_cross_entropy.linear_cross_entropy` of each row, in the way of it that CPUs can take."""
    torch = importlib.import_module("torch")
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def nll(hidden: Any, weight: Any, labels: Any, bias: Any) -> Any:
        if bias is not None:  # it has none: one more feature, which is 1
            hidden = torch.cat([hidden, hidden.new_ones(hidden.shape[0], 1)], dim=1)
            weight = torch.cat([weight, bias[:, None]], dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler looks at the gradients of what is no leaf
            return loss(hidden, weight, labels, reduction="none", impl="torch_compile")

    return _of_rows(nll, hidden, weight, labels, bias, others)


def tokamax_added(hidden: Any, weight: Any, labels: Any, bias: Any = None, **options: Any) -> Any:
    """Return Tokamax's loss with smoothing. It returns the sum or mean, so the smoothing is reduced and added to it."""
    np = importlib.import_module("jax.numpy")
    loss = load_tokamax().linear_softmax_cross_entropy_loss
    reduction = options.pop("reduction")
    options.pop("chunk_size", None)
    add = importlib.import_module("lsce_jax").linear_add_smoothing
    of_smoothing = add(np.zeros(labels.shape, hidden.dtype), hidden, weight, labels, bias=bias, **options)
    if bias is not None:
        hidden = np.concatenate([hidden, np.ones((hidden.shape[0], 1), hidden.dtype)], axis=1)
        weight = np.concatenate([weight, bias[None]], axis=0)
    unsmoothed = loss(hidden, labels.astype(np.int32), weight, reduction=reduction, implementation="xla")
    return unsmoothed + (of_smoothing.sum() if reduction == "sum" else of_smoothing.mean())


def load_tokamax() -> Any:
    """Return the library, without the options that it would read from the command line of the program around it."""
    library = importlib.import_module("tokamax")
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    return library


# --- Adapters -------------------------------------------------------------------------------------------------------

# What smoothing is added with, whatever the loss.
_OF_SMOOTHING = frozenset(
    {"prior", "non_target convention", "clamp convention", "smoothing per row", "no batch", "narrow labels"}
)
_OF_ROWS = _OF_SMOOTHING | {"class_weight", "z_loss", "where", "ignore_index"}


def _adapter_of_rows(nll: Loss) -> Adapter:
    options: dict[str, Any] = {"linear": True, "supports": _OF_ROWS, "narrow": NARROW}
    return TorchAdapter(torch_added(nll), name=f"{getattr(nll, '__name__', 'loss')} with smoothing", **options)


def _liger_here() -> Adapter:
    _find("liger_kernel", "liger-kernel triton")
    return _adapter_of_rows(liger)


def liger_adapter() -> Adapter:
    """Return Liger's loss with smoothing, in a process of its own whose Triton interprets its kernels."""
    return WorkerAdapter(_liger_here, INTERPRETED)


def cut_cross_entropy_adapter() -> Adapter:
    """Return the loss of cut-cross-entropy with smoothing."""
    _find("cut_cross_entropy", "cut-cross-entropy")
    return _adapter_of_rows(cut_cross_entropy)


def linear_cross_entropy_adapter(*, in_chunks: bool) -> Adapter:
    """Return torch's linear loss with smoothing."""
    if not hasattr(importlib.import_module("torch.nn.functional"), "linear_cross_entropy"):
        raise UnavailableError("this torch has no F.linear_cross_entropy. Run: pip install 'torch>=2.13'")
    return _adapter_of_rows(partial(linear_cross_entropy, in_chunks=in_chunks))


def tokamax_adapter() -> Adapter:
    """Return Tokamax's loss with smoothing."""
    _find("tokamax", "tokamax")

    def refuse(case: Case) -> str | None:
        if case.options.get("reduction", "none") == "none":
            return "returns the sum or the mean only"
        return None if case.hidden_rows.shape[0] and case.hidden_rows.shape == case.hidden.shape else "takes [N, D]"  # type: ignore[attr-defined]

    adapter = JaxAdapter(tokamax_added, name="Tokamax with smoothing", linear=True, supports=_OF_SMOOTHING)
    return PeerAdapter(adapter, refuse)


def _find(module: str, packages: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UnavailableError(f"{module} is not installed. Run: pip install {packages}")
