"""`add_smoothing` and `linear_add_smoothing` as users call them: scripts, rows left out, transforms, errors.

`parity_tests/suite/test_added_smoothing.py` holds losses and gradients against the oracle.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional as F

import lsce_jax
import lsce_torch
from lsce_spec import LINEAR_REFUSED, MESSAGES, REFUSED

pytestmark = pytest.mark.usefixtures("one_thread", "optax_promotion")

N, D, K = 6, 4, 5
RANDOM = np.random.default_rng(0)
HIDDEN, WEIGHT, BIAS = (RANDOM.normal(size=shape) for shape in ((N, D), (D, K), (K,)))
LABELS = np.array([0, 3, 3, 4, 1, 3])
IGNORED = np.array([0, -100, 3, 4, -100, 3])


def torch_layer(dtype: torch.dtype = torch.float64, *, labels: Any = LABELS) -> tuple[torch.Tensor, ...]:
    """Return hidden, weight and bias, whose gradients are asked for, and labels."""
    leaves = (torch.tensor(values, dtype=dtype).requires_grad_() for values in (HIDDEN, WEIGHT.T, BIAS))
    return *leaves, torch.tensor(labels)


def nll_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")


def test_script_in_torch() -> None:
    """The loss of a library that has no smoothing, in a training step; and of one that returns only its mean."""
    hidden, weight, bias, labels = torch_layer(labels=IGNORED)
    nll = nll_of(hidden, weight, bias, labels)
    options = {"bias": bias, "smoothing": 0.1, "ignore_index": -100}
    losses = lsce_torch.linear_add_smoothing(nll, hidden, weight, labels, **options)
    loss = losses.sum() / (labels != -100).sum()
    loss.backward()
    gradients = [leaf.grad.clone() for leaf in (hidden, weight, bias)]
    for leaf in (hidden, weight, bias):
        leaf.grad = None
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, label_smoothing=0.1)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for gradient, leaf in zip(gradients, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-15)

    mean = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    zeros = torch.zeros(N, dtype=mean.dtype)
    of_smoothing = lsce_torch.linear_add_smoothing(zeros, hidden, weight, labels, **options)
    torch.testing.assert_close(mean + of_smoothing.sum() / (labels != -100).sum(), expected, rtol=1e-13, atol=0)


def test_script_in_jax() -> None:
    with jax.enable_x64(True):
        layer, labels = tuple(map(jnp.asarray, (HIDDEN, WEIGHT, BIAS))), jnp.asarray(LABELS)

        def loss(layer: Any, smoothing: Any) -> Any:
            hidden, weight, bias = layer
            nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ weight + bias[None, :], labels)
            losses = lsce_jax.linear_add_smoothing(nll, hidden, weight, labels, bias=bias, smoothing=smoothing)
            return losses.mean()

        def expected(layer: Any, smoothing: Any) -> Any:
            hidden, weight, bias = layer
            targets = optax.smooth_labels(jax.nn.one_hot(labels, K), smoothing)
            return optax.softmax_cross_entropy(hidden @ weight + bias[None, :], targets).mean()

        for derivative in (jax.value_and_grad, jax.hessian):
            ours, theirs = (jax.jit(derivative(of, argnums=(0, 1)))(layer, 0.1) for of in (loss, expected))
            for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_script_of_logits() -> None:
    """The dense form: flash-attention's loss has smoothing, and many others have none."""
    logits, labels = torch.tensor(HIDDEN @ WEIGHT + BIAS), torch.tensor(LABELS)
    nll, label_logit = F.cross_entropy(logits, labels, reduction="none"), logits.gather(-1, labels[:, None])[:, 0]
    losses = lsce_torch.add_smoothing(nll, label_logit, logits.mean(-1), smoothing=0.1)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1))


@pytest.mark.parametrize("left_out", ["ignore_index", "where"])
def test_rows_left_out_are_zero(left_out: str) -> None:
    """Exactly, loss and gradients, whatever the row, its loss and its label hold."""
    labels, is_left_out = IGNORED.copy(), IGNORED == -100
    hidden = HIDDEN.copy()
    hidden[1], hidden[4, 0] = np.nan, np.inf
    nll = np.where(is_left_out, [0, np.nan, 0, 0, np.inf, 0], 1.0)
    options: dict[str, Any] = {"ignore_index": -100} if left_out == "ignore_index" else {"where": ~is_left_out}
    options |= {"z_loss": 0.01, "class_weight": np.array([1.0, 2, 3, 4, 5]), "convention": "non_target"}
    tensors = [torch.tensor(values).requires_grad_() for values in (nll, hidden, WEIGHT.T)]
    given = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    losses = lsce_torch.linear_add_smoothing(*tensors, torch.tensor(labels), **given)
    losses.sum().backward()
    found = {"torch": (losses.detach(), *(tensor.grad for tensor in tensors))}
    with jax.enable_x64(True):

        def total(*operands: Any) -> Any:
            losses = lsce_jax.linear_add_smoothing(*operands, labels, **options)
            return losses.sum(), losses

        gradients, losses = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(nll, hidden, WEIGHT)
        found["jax"] = (losses, *gradients)
    for losses, of_nll, of_hidden, of_weight in found.values():
        for values in (losses, of_nll, of_hidden):
            assert np.all(np.asarray(values)[is_left_out] == 0)
            assert np.all(np.asarray(values)[~is_left_out] != 0)
        assert np.all(np.isfinite(np.asarray(of_weight)))


def test_masked_classes_may_hold_anything() -> None:
    """A padded vocabulary, whose weight was never written."""
    mask, weight, labels = np.arange(K) < 3, WEIGHT.copy(), np.array([0, 1, 2, 2, 1, 0])
    bias = np.where(mask, BIAS, -np.inf)
    weight[:, 3:] = np.nan
    tensors = [torch.tensor(values).requires_grad_() for values in (np.ones(N), HIDDEN, weight.T, bias)]
    losses = lsce_torch.linear_add_smoothing(
        *tensors[:3], torch.tensor(labels), bias=tensors[3], class_mask=torch.tensor(mask)
    )
    losses.sum().backward()
    with jax.enable_x64(True):

        def total(nll: Any, hidden: Any, weight: Any, bias: Any) -> Any:
            return lsce_jax.linear_add_smoothing(nll, hidden, weight, labels, bias=bias, class_mask=mask).sum()

        gradients = jax.grad(total, argnums=(0, 1, 2, 3))(np.ones(N), HIDDEN, weight, bias)
    cut = [torch.tensor(values).requires_grad_() for values in (np.ones(N), HIDDEN, weight[:, :3].T, bias[:3])]
    expected = lsce_torch.linear_add_smoothing(*cut[:3], torch.tensor(labels), bias=cut[3])
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
    for tensor, gradient, of_cut in zip(tensors, gradients, cut, strict=True):
        ours, theirs = tensor.grad.numpy(), np.asarray(gradient)
        if ours.shape[0] == K:
            theirs = theirs.T
            assert np.all(ours[3:] == 0)
            assert np.all(theirs[3:] == 0)
            ours, theirs = ours[:3], theirs[:3]
        np.testing.assert_allclose(ours, of_cut.grad, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(theirs, of_cut.grad, rtol=1e-12, atol=1e-15)


def test_bad_labels_are_nan() -> None:
    labels = np.array([0, 5, 3, -1, 1, 3])
    bad = (labels < 0) | (labels >= K)
    nll = np.ones(N)
    tensors = [torch.tensor(values).requires_grad_() for values in (nll, HIDDEN, WEIGHT.T)]
    losses = lsce_torch.linear_add_smoothing(*tensors, torch.tensor(labels))
    losses.sum().backward()
    for values in (losses.detach().numpy(), tensors[0].grad.numpy(), tensors[1].grad.numpy()):
        assert np.array_equal(np.isnan(values.reshape(N, -1)).all(axis=1), bad)
    assert tensors[2].grad.isnan().all()
    gradients = jax.grad(lambda *operands: lsce_jax.linear_add_smoothing(*operands, labels).sum(), argnums=(0, 1, 2))(
        *(jnp.asarray(values, jnp.float32) for values in (nll, HIDDEN, WEIGHT))
    )
    for values in gradients[:2]:
        assert np.array_equal(np.isnan(values.reshape(N, -1)).all(axis=1), bad)
    assert np.isnan(gradients[2]).all()


def test_infinite_logits() -> None:
    """0 * inf counts as 0: a mean logit of -inf takes no part without smoothing; with it the loss is infinite."""
    for add in (lsce_jax.add_smoothing, lambda *v, **o: lsce_torch.add_smoothing(*map(torch.tensor, v), **o)):
        numbers = [0.5, 0.5], [1.0, 1.0], [-np.inf, 0.0]
        assert np.asarray(add(*map(np.float32, numbers), smoothing=0.0)).tolist() == [0.5, 0.5]
        assert np.asarray(add(*map(np.float32, numbers), smoothing=0.1))[0] == np.inf


@pytest.mark.slow
def test_narrow_gradients_of_equal_labels_are_added_up_in_float32() -> None:
    """In bfloat16 1 + 2^-9 is 1: of 257 rows of one label all but one would be lost."""
    num_rows = 257
    hidden, labels = np.full((num_rows, 1), 2.0**-9, np.float32), np.zeros(num_rows, np.int64)
    hidden[0] = 1.0
    total = hidden.sum() * 0.5 * (1 - 1 / 2)  # smoothing 0.5, 2 classes
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    operands = torch.tensor(hidden, dtype=torch.bfloat16), weight, torch.tensor(labels)
    zeros = torch.zeros(num_rows)
    for function in (lsce_torch.linear_add_smoothing, torch.compile(lsce_torch.linear_add_smoothing, fullgraph=True)):
        weight.grad = None
        function(zeros, *operands, smoothing=0.5).sum().backward()
        assert weight.grad.flatten().tolist() == pytest.approx([total, -total], rel=2**-8)
    gradient = jax.grad(
        lambda weight: lsce_jax.linear_add_smoothing(
            np.zeros(num_rows, np.float32), jnp.asarray(hidden, jnp.bfloat16), weight, labels, smoothing=0.5
        ).sum()
    )(jnp.zeros((1, 2), jnp.bfloat16))
    assert np.asarray(gradient, np.float32).ravel().tolist() == pytest.approx([total, -total], rel=2**-8)


def test_dtypes() -> None:
    """The loss is computed in float32, or float64 if hidden is; a narrow nll is taken as it is."""
    hidden, weight, _, labels = (of.detach() for of in torch_layer(torch.bfloat16))
    for nll in (torch.ones(N), torch.ones(N, dtype=torch.bfloat16)):
        assert lsce_torch.linear_add_smoothing(nll, hidden, weight, labels).dtype == torch.float32
    assert lsce_torch.linear_add_smoothing(torch.ones(N), hidden.double(), weight, labels).dtype == torch.float64
    assert lsce_torch.add_smoothing(nll, nll, nll).dtype == torch.float32
    assert lsce_torch.add_smoothing(nll, nll, nll.double()).dtype == torch.float64
    nll = jnp.ones(N, jnp.bfloat16)
    assert lsce_jax.linear_add_smoothing(nll, HIDDEN.astype(np.float32), WEIGHT, LABELS).dtype == jnp.float32
    assert lsce_jax.add_smoothing(nll, nll, nll.astype(jnp.float32)).dtype == jnp.float32


# --- Transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {},
    {"smoothing": "per row", "convention": "non_target", "z_loss": 0.1},
    {"class_weight": torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64), "ignore_index": 1},
    {"class_mask": torch.tensor([True, True, False, True, True])},
])  # fmt: skip
def test_derivatives_of_torch(options: dict[str, Any]) -> None:
    """First and second, of the autograd Function and of the plain operations that torch.func takes."""
    hidden, weight, bias, labels = torch_layer()
    nll = torch.rand(N, dtype=torch.float64, requires_grad=True)
    smoothing = torch.rand(N, dtype=torch.float64).requires_grad_()
    options = {**options, "smoothing": smoothing} if options.get("smoothing") else options

    def loss(nll: Any, hidden: Any, weight: Any, bias: Any) -> Any:
        return lsce_torch.linear_add_smoothing(nll, hidden, weight, labels, bias=bias, **options)

    operands = nll, hidden, weight, bias
    assert torch.autograd.gradcheck(loss, operands)
    assert torch.autograd.gradgradcheck(loss, operands)

    def total(*operands: Any) -> Any:
        return loss(*operands).sum()

    eager = torch.autograd.grad(total(*operands), operands)
    for one, other in zip(eager, torch.func.grad(total, argnums=(0, 1, 2, 3))(*operands), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    tangents = tuple(torch.rand_like(operand) for operand in operands)
    _, tangent = torch.func.jvp(total, operands, tangents)
    expected = sum((one * other).sum() for one, other in zip(eager, tangents, strict=True))
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-14)


def test_vmap_of_torch() -> None:
    hidden, weight, _, labels = torch_layer()
    nll = torch.rand(N, dtype=torch.float64)
    losses = lsce_torch.linear_add_smoothing(nll, hidden, weight, labels)
    by_row = torch.func.vmap(lsce_torch.linear_add_smoothing, (0, 0, None, 0))(nll, hidden, weight, labels)
    torch.testing.assert_close(by_row, losses, rtol=1e-14, atol=0)
    rows = torch.eye(N, dtype=torch.float64)
    (batched,) = torch.autograd.grad(losses, weight, rows, is_grads_batched=True, retain_graph=True)
    for row, of_row in zip(rows, batched, strict=True):
        (one,) = torch.autograd.grad(losses, weight, row, retain_graph=True)
        torch.testing.assert_close(of_row, one, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_compile(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = torch_layer(dtype, labels=IGNORED)

    def loss(nll: Any, hidden: Any, weight: Any, labels: Any) -> Any:
        options = {"smoothing": 0.1, "ignore_index": -100, "bias": bias}
        return lsce_torch.linear_add_smoothing(nll, hidden, weight, labels, **options).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        total = function(torch.ones(N), hidden, weight, labels)
        found.append((total.detach(), *torch.autograd.grad(total, (hidden, weight, bias))))
    unit = 4 * torch.finfo(dtype).eps
    for eager, compiled in zip(*found, strict=True):
        assert (eager - compiled).abs().max() <= unit * eager.abs().max()


def test_autocast() -> None:
    """Under autocast hidden is rounded, as for the layer, and everything else is float32."""
    hidden, weight, _, labels = torch_layer(torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = lsce_torch.linear_add_smoothing(torch.ones(N), hidden, weight, labels)
        losses.sum().backward()
    expected = lsce_torch.linear_add_smoothing(torch.ones(N), narrow, weight.detach(), labels)
    expected.sum().backward()
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)
    assert torch.equal(hidden.grad, narrow.grad.float())
    assert weight.grad.dtype == torch.float32


def test_torch_keeps_nothing_of_the_size_of_hidden() -> None:
    """Beyond the arguments: a row of the weight, and a few numbers of each row."""
    hidden, weight, _, labels = torch_layer(torch.bfloat16)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lsce_torch.linear_add_smoothing(torch.ones(N), hidden, weight, labels)
    given = {tensor.untyped_storage().data_ptr() for tensor in (hidden, weight, labels)}
    assert given - {labels.untyped_storage().data_ptr()} <= set(kept)
    assert max(size for place, size in kept.items() if place not in given) <= max(N, D, K)


def test_transforms_of_jax() -> None:
    hidden, weight = (jnp.asarray(values, jnp.float32) for values in (HIDDEN, WEIGHT))
    nll, labels = jnp.ones(N), jnp.asarray(LABELS)

    def losses(nll: Any, hidden: Any, weight: Any, labels: Any) -> Any:
        return lsce_jax.linear_add_smoothing(nll, hidden, weight, labels, smoothing=0.2, convention="clamp")

    expected = losses(nll, hidden, weight, labels)
    by_row = jax.vmap(losses, (0, 0, None, 0))(nll, hidden, weight, labels)
    np.testing.assert_allclose(by_row, expected, rtol=1e-6)
    in_pairs = [of.reshape(2, 3, *of.shape[1:]) for of in (nll, hidden, labels)]
    np.testing.assert_allclose(losses(*in_pairs[:2], weight, in_pairs[2]).ravel(), expected, rtol=1e-6)


def test_derivatives_of_jax(assert_derivatives: Any) -> None:
    with jax.enable_x64(True):
        labels = jnp.asarray(LABELS)
        operands = jnp.full(N, 0.3), *map(jnp.asarray, (HIDDEN, WEIGHT, BIAS)), jnp.linspace(0.1, 0.9, N)

        def losses(nll: Any, hidden: Any, weight: Any, bias: Any, smoothing: Any) -> Any:
            options = {"bias": bias, "smoothing": smoothing, "z_loss": 0.1, "convention": "non_target"}
            return lsce_jax.linear_add_smoothing(nll, hidden, weight, labels, **options)

        assert_derivatives(losses, *operands)


def test_smoothing_that_changes_does_not_compile_again() -> None:
    traces = []

    @jax.jit
    def loss(smoothing: Any) -> Any:
        traces.append(smoothing)
        hidden, weight = HIDDEN.astype(np.float32), WEIGHT.astype(np.float32)
        return lsce_jax.linear_add_smoothing(np.ones(N, np.float32), hidden, weight, LABELS, smoothing=smoothing)

    assert not np.array_equal(loss(0.1), loss(0.2))
    assert len(traces) == 1


# --- What cannot be added -------------------------------------------------------------------------------------------


def both(name: str, *operands: Any, **options: Any) -> list[Exception]:
    """Return what each package raises for the same call."""
    found = []
    for package in (lsce_jax, lsce_torch):
        given = [*operands, *options.values()]
        if package is lsce_torch:
            given = [torch.from_numpy(of) if isinstance(of, np.ndarray) else of for of in given]
            if name.startswith("linear"):
                given[2] = given[2].T
        named = dict(zip(options, given[len(operands) :], strict=True))
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(package, name)(*given[: len(operands)], **named)
        found.append(caught.value)
    return found


ROW = np.ones(N, np.float32)
LINEAR = (ROW, HIDDEN.astype(np.float32), WEIGHT.astype(np.float32), LABELS)
DENSE = (ROW, ROW, ROW)


@pytest.mark.parametrize(("function", "names"), [("add_smoothing", REFUSED), ("linear_add_smoothing", LINEAR_REFUSED)])
def test_what_is_not_taken_is_refused_by_name(function: str, names: dict[str, str]) -> None:
    operands = DENSE if function == "add_smoothing" else LINEAR
    for name, reason in names.items():
        for problem in both(function, *operands, **{name: 2.0}):
            assert isinstance(problem, TypeError)
            assert str(problem) == f"{function} does not take {name}: {reason}."
    assert "softcap" in names


@pytest.mark.parametrize(("key", "function", "operands", "options"), [
    ("smoothing_at_max", "linear_add_smoothing", LINEAR, {"convention": "max_sup"}),
    ("smoothing_at_max", "add_smoothing", DENSE, {"convention": "max_sup", "num_classes": 3}),
    ("smoothing_row_mask", "linear_add_smoothing", LINEAR, {"class_mask": np.ones((N, K), bool)}),
    ("smoothing_num_classes", "add_smoothing", DENSE, {"convention": "non_target"}),
    ("smoothing_weights", "add_smoothing", DENSE, {"label_weight": ROW}),
    ("smoothing_weights", "add_smoothing", DENSE, {"mean_weight": 1.0}),
    ("smoothing_soft_labels", "linear_add_smoothing", (*LINEAR[:3], np.ones((N, K), np.float32)), {}),
    ("row_numbers_dtype", "linear_add_smoothing", (LABELS.astype(np.int32), *LINEAR[1:]), {}),
    ("row_numbers_dtype", "add_smoothing", (ROW, ROW > 0, ROW), {}),
    ("row_numbers_shape", "linear_add_smoothing", (np.float32(1) * ROW[:1], *LINEAR[1:]), {}),
    ("row_numbers_shape", "linear_add_smoothing", (np.ones((), np.float32), *LINEAR[1:]), {}),
    ("row_numbers_shape", "add_smoothing", (ROW, ROW[:2], ROW), {}),
    ("row_numbers_shape", "add_smoothing", DENSE, {"label_weight": ROW[:2], "mean_weight": 1.0}),
    ("smoothing_range", "add_smoothing", DENSE, {"smoothing": 1.5}),
    ("smoothing_range", "linear_add_smoothing", LINEAR, {"smoothing": ROW * 2}),
    ("convention_name", "linear_add_smoothing", LINEAR, {"convention": "fairseq"}),
    ("count", "add_smoothing", DENSE, {"convention": "clamp", "num_classes": 0}),
    ("batch_operand_shape", "add_smoothing", DENSE, {"where": np.ones(2, bool)}),
    ("class_vector_shape", "linear_add_smoothing", LINEAR, {"class_weight": ROW}),
    ("bias_shape", "linear_add_smoothing", LINEAR, {"bias": ROW}),
])  # fmt: skip
def test_messages(key: str, function: str, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    first, second = both(function, *operands, **options)
    assert type(first) is type(second) is MESSAGES[key][0]
    assert str(first) == str(second)
    assert MESSAGES[key][1].split("{")[0] in str(first)


def test_a_mean_is_told_what_to_do() -> None:
    for problem in both("linear_add_smoothing", np.ones((), np.float32), *LINEAR[1:]):
        assert "pass zeros, and add the mean of the result" in str(problem)
