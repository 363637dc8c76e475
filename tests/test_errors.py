"""Bad input: one clear message each, the same words from both frameworks, and every message has a way to show up."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_jax.errors
import lsce_torch
import lsce_torch.errors
import lsce_torch.trainers
from lsce_spec import MESSAGES, smoothing_weights
from tests.both import both_raise, raised, to_torch, without_kernels

LOGITS, LABELS = np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0])
F32 = np.float32


def call(**changes: Any) -> dict[str, Any]:
    return {"logits": LOGITS, "labels": LABELS, **changes}


def prior(*values: float) -> dict[str, Any]:
    return call(prior=np.array(values, F32))


# Message -> calls that show it. Arrays are NumPy's here and converted to the framework's.
CALLS: dict[str, list[dict[str, Any]]] = {
    "logits_dtype": [call(logits=LABELS.reshape(2, 2), labels=LABELS[:2]), call(logits=LOGITS > 0)],
    "logits_scalar": [call(logits=np.zeros((), F32), labels=np.zeros((), int))],
    "no_classes": [call(logits=np.zeros((4, 0), F32))],
    "axis": [call(axis=2), call(axis=-3)],
    "labels_dtype": [call(labels=LABELS > 0), call(labels=LABELS.astype(np.complex64))],
    "labels_shape": [
        call(labels=LABELS[:3]),
        call(labels=LABELS[:, None]),
        call(labels=np.zeros((4, 3), int)),
        call(labels=np.zeros((), int)),
        call(axis=0),
    ],
    "soft_labels_shape": [call(labels=np.zeros(4, F32)), call(labels=np.zeros((4, 2), F32))],
    "smoothing_type": [
        call(smoothing=None),
        call(smoothing="0.1"),
        call(smoothing=True),
        call(smoothing=1j),
        call(smoothing={}),
    ],
    "smoothing_range": [
        *(call(smoothing=value) for value in (1.5, -0.1, float("nan"), 2)),
        *(call(smoothing=np.array([0, value, 1, 0.5], F32)) for value in (1.5, -0.1, float("nan"))),
        call(smoothing=np.array(-0.1, F32)),
    ],
    "convention_type": [call(convention=None), call(convention=3)],
    "convention_name": [call(convention="fairseq")],
    "reduction": [call(reduction="avg")],
    "implementation": [call(implementation="cuda")],
    "bad_labels": [call(bad_labels="ignore")],
    "flag": [call(subtract_entropy=1)],
    "entropy_at_max": [call(subtract_entropy=True, convention="max_sup")],
    "non_negative_number": [call(z_loss=-1e-4), call(z_loss=float("inf"))],
    "softcap": [call(softcap=0), call(softcap=-30.0), call(softcap=float("nan"))],
    "ignore_index": [call(ignore_index=2**31)],
    "ignore_index_soft": [call(labels=LOGITS, ignore_index=-100)],
    "denominator": [call(denominator=2.0, reduction="sum"), call(denominator=2.0, reduction="none")],
    "denominator_shape": [call(denominator=np.ones(2, F32), reduction="mean")],
    "denominator_value": [
        call(denominator=kind(value), reduction="mean")
        for value in (-2.0, float("nan"), float("inf"))
        for kind in (float, lambda value: np.array(value, F32))
    ],
    "batch_operand_shape": [
        call(where=np.ones(3, bool)),
        call(where=np.ones((4, 1), bool)),
        call(smoothing=np.zeros(2, F32)),
    ],
    "boolean": [call(where=np.ones(4, F32)), call(class_mask=np.ones(3, int))],
    "class_vector_shape": [
        call(class_weight=np.ones(4, F32)),
        call(prior=np.full(2, 0.5, F32)),
    ],
    "class_mask_shape": [
        call(class_mask=np.ones(shape, bool)) for shape in ((4,), (2, 3), (4, 1), (1, 4, 3), (4, 3, 1), ())
    ],
    "prior_row_mask": [{**prior(0.2, 0.3, 0.5), "class_mask": np.ones((4, 3), bool)}],
    "class_vector_dtype": [call(class_weight=np.ones(3, int)), call(prior=np.array([1, 0, 0]))],
    "prior_convention": [{**prior(0.2, 0.3, 0.5), "convention": "clamp"}],
    "prior_negative": [prior(-0.5, 1.0, 0.5), prior(float("nan"), 1.0, 0.0)],
    "prior_sum": [prior(0.5, 0.5, 0.5), prior(0.3, 0.3, 0.3)],
    "prior_outside_mask": [{**prior(0.2, 0.3, 0.5), "class_mask": np.array([True, True, False])}],
    "bad_label": [
        call(labels=np.array([0, 3, 1, -1]), bad_labels="raise"),
        call(bad_labels="raise", class_mask=np.array([True, False, True])),
        call(labels=np.array([0, -100, 1, 7]), bad_labels="raise", ignore_index=-100),
    ],
}
# The same for the linear loss.
HIDDEN, WEIGHT = np.zeros((4, 2), F32), np.zeros((2, 3), F32)


def linear_call(**changes: Any) -> dict[str, Any]:
    return {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "reduction": "mean", **changes}


LINEAR_CALLS: dict[str, list[dict[str, Any]]] = {
    "hidden_dtype": [
        linear_call(hidden=LABELS.reshape(2, 2)),
        linear_call(weight=WEIGHT.astype(np.int64)),
        linear_call(bias=np.zeros(3, bool)),
    ],
    "hidden_scalar": [linear_call(hidden=np.zeros((), F32))],
    "weight_shape": [
        linear_call(weight=np.zeros((4, 5), F32)),
        linear_call(weight=np.zeros(2, F32)),
    ],
    "bias_shape": [linear_call(bias=np.zeros(2, F32)), linear_call(bias=np.zeros((3, 1), F32))],
    "linear_soft_labels": [linear_call(labels=np.zeros((4, 3), F32))],
    "labels_shape": [linear_call(labels=LABELS[:3])],
    "array_type": [linear_call(hidden="x"), linear_call(bias={})],
    "implementation": [linear_call(implementation="fused")],
    "chunk_size": [linear_call(chunk_size=0)],
    "flag": [linear_call(recompute=1)],
    "recompute_none": [linear_call(recompute=False, reduction="none")],
    "gradient_filter": [
        linear_call(gradient_filter=-1e-3),
        linear_call(gradient_filter=1.0),
        linear_call(gradient_filter=float("nan")),
    ],
    "filter_recompute": [
        linear_call(gradient_filter=0.1, recompute=True),
        linear_call(gradient_filter=0.1, reduction="none"),
    ],
    "filter_row_mask": [linear_call(gradient_filter=0.1, class_mask=np.ones((4, 3), bool))],
    "chunked_only": [
        linear_call(implementation="reference", chunk_size=3),
        linear_call(implementation="reference", recompute=True),
        linear_call(implementation="reference", gradient_filter=0.1),
    ],
}

# Options of a wrong type, which raise TypeError with the words for a value out of range.
WRONG_TYPES: dict[str, list[dict[str, Any]]] = {
    "axis": [call(axis=1.0), call(axis=True), call(axis="1"), call(axis=None), call(axis=[1])],
    "reduction": [call(reduction=None), call(reduction=1), call(reduction=["mean"])],
    "implementation": [call(implementation=1), call(implementation=["fused"])],
    "bad_labels": [call(bad_labels=None), call(bad_labels=True)],
    "non_negative_number": [call(z_loss=value) for value in (None, True, "0.1", [0.1])],
    "softcap": [call(softcap=value) for value in (True, "30", [30.0])],
    "ignore_index": [call(ignore_index=value) for value in (1.0, True, "pad", [1])],
    "denominator_value": [
        call(denominator=value, reduction="mean") for value in (True, "3", {}, [3.0], np.array(True))
    ],
}
LINEAR_WRONG_TYPES: dict[str, list[dict[str, Any]]] = {
    "implementation": [linear_call(implementation=1)],
    "chunk_size": [linear_call(chunk_size=value) for value in (2.0, True, "2", [2])],
    "gradient_filter": [linear_call(gradient_filter=value) for value in (None, True, "0.1", [0.1])],
}

# Messages with tests in other files, by file: those of both packages, and those of one alone.
ELSEWHERE = {
    "tests/test_manners.py": "unexpected_keyword array_option labels_no_class positional missing",
    "tests/test_isolation.py": "not_installed",
    "tests/test_errors.py": "array_type convention_functions label_smooth count class_num_shape class_num",
    "parity_tests/suite/test_denominators.py": "denominator_labels",
    "tests/test_metrics.py": "stats_type stats_shape top_k",
    "tests/test_migration.py": "convert_smoothing convert_number identify_label identify_dtype identify_shape "
                               "identify_finite identify_rows",
    "tests/test_torch_kernels.py": "kernel",
    "tests/test_torch_stats.py": "differentiable_recompute",
    "tests/test_smoothing.py": "smoothing_operands smoothing_refused smoothing_at_max smoothing_row_mask "
                               "smoothing_num_classes smoothing_weights smoothing_soft_labels row_numbers_dtype "
                               "row_numbers_shape",
}  # fmt: skip
TORCH_ELSEWHERE = {
    "tests/test_errors.py": "not_traceable module_operands labels_device layer_device layout weight_type "
                            "bad_labels_unknown",
    "tests/test_torch_fused.py": "inplace_reference inplace_logits inplace_needs_reference inplace_transformed "
                                 "overwritten",
    "parity_tests/suite/test_denominators.py": "denominator_dtensor",
    "parity_tests/suite/test_vocab_parallel_torch.py":
        "no_group group_type group_member ranks_differ ranks_rows ranks_tensor rank_failed no_classes_anywhere "
        "shard_gradient shard_transform dtensor_partial dtensor_placement",
    "parity_tests/suite/test_dtensor_layers.py": "dtensor_mesh dtensor_option",
    "tests/test_trainers.py": "trainer_outputs trainer_labels",
}  # fmt: skip
JAX_ELSEWHERE = {
    "tests/test_metrics.py": "merge_state",
    "tests/test_errors.py": "bad_labels_staged",
    "parity_tests/suite/test_denominators.py": "denominator_axis",
    "tests/test_vocab_parallel_axes.py": "axis_name",
    "parity_tests/suite/on_eight_devices.py": "explicit_axes",
}


def keys_of(files: dict[str, str]) -> set[str]:
    return {key for keys in files.values() for key in keys.split()}


def each_call(calls: dict[str, list[dict[str, Any]]], wrong_types: dict[str, list[dict[str, Any]]]) -> Any:
    """Parametrize over all calls: the key, the kind of the exception, the arguments."""
    cases = [(key, MESSAGES[key][0], one) for key, many in calls.items() for one in many]
    cases += [(key, TypeError, one) for key, many in wrong_types.items() for one in many]
    return pytest.mark.parametrize(
        ("key", "kind", "arguments"), [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(cases)]
    )


def dense(package: Any, logits: Any = None, labels: Any = None, **options: Any) -> Any:
    return package.label_smoothed_cross_entropy(logits, labels, **options)


def linear(package: Any, hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    if package is lsce_torch:
        weight = weight.permute(*reversed(range(weight.ndim)))
    return package.linear_label_smoothed_cross_entropy(hidden, weight, labels, **options)


@each_call(CALLS, WRONG_TYPES)
def test_message(key: str, kind: type[Exception], arguments: dict[str, Any]) -> None:
    from_jax, from_torch = both_raise(dense, **arguments)
    assert type(from_jax) is kind
    assert without_kernels(from_jax) == without_kernels(from_torch)
    assert MESSAGES[key][1].split("{")[0] in str(from_torch)


@each_call(LINEAR_CALLS, LINEAR_WRONG_TYPES)
def test_message_of_the_linear_loss(key: str, kind: type[Exception], arguments: dict[str, Any]) -> None:
    from_jax, from_torch = both_raise(linear, **arguments)
    assert type(from_jax) is kind
    assert MESSAGES[key][1].split("{")[0] in str(from_torch)
    if key == "weight_shape":
        assert ("[D, K]" in str(from_jax), "[K, D]" in str(from_torch)) == (True, True)
    elif key != "array_type":
        assert without_kernels(from_jax) == without_kernels(from_torch)


@pytest.mark.parametrize(("linear_loss", "options", "kind", "text"), [
    (False, {"differentiable": 1}, TypeError, "differentiable must be True or False, got 1."),
    (True, {"differentiable": 1}, TypeError, "differentiable must be True or False, got 1."),
    (True, {"differentiable": True, "recompute": False}, ValueError, MESSAGES["differentiable_recompute"][1]),
    (True, {"differentiable": True, "gradient_filter": 0.1}, ValueError, MESSAGES["filter_recompute"][1]),
])  # fmt: skip
def test_messages_of_differentiable_statistics(
    linear_loss: bool, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    name = f"{'linear_' * linear_loss}label_smoothed_cross_entropy_with_stats"
    operands = (HIDDEN[:, :1] * np.ones(3, F32), np.eye(3, dtype=F32), LABELS) if linear_loss else (LOGITS, LABELS)
    problems = both_raise(lambda package, *of, **given: getattr(package, name)(*of, **given), *operands,
                          reduction="mean", **options)  # fmt: skip
    assert [type(problem) for problem in problems] == [kind, kind]
    assert [str(problem) for problem in problems] == [text, text]
    of_other = both_raise(dense, LOGITS, LABELS, differentiable=True)
    assert all("'differentiable'" in str(problem) for problem in of_other)


def test_a_transposed_weight_is_recognised() -> None:
    problems = [
        raised(lambda: lsce_jax.linear_label_smoothed_cross_entropy(HIDDEN, WEIGHT.T, LABELS)),
        raised(lambda: lsce_torch.linear_label_smoothed_cross_entropy(*map(to_torch, (HIDDEN, WEIGHT, LABELS)))),
    ]
    assert all(str(problem).endswith("Transpose it.") for problem in problems)
    on_no_device = torch.zeros(3, 2, device="meta")
    problem = raised(lambda: lsce_torch.linear_label_smoothed_cross_entropy(to_torch(HIDDEN), on_no_device, LABELS))
    assert "on the same device" in str(problem)


def test_every_message_has_a_call() -> None:
    of_one_package = keys_of(TORCH_ELSEWHERE), keys_of(JAX_ELSEWHERE)
    assert set(CALLS) | set(LINEAR_CALLS) | keys_of(ELSEWHERE) == set(MESSAGES)
    assert (set(lsce_torch.errors.MESSAGES), set(lsce_jax.errors.MESSAGES)) == of_one_package
    assert not set.union(*of_one_package) & set(MESSAGES)


def test_values_that_are_not_at_hand() -> None:
    """Rows that do not count may have any smoothing, and traced or vmapped values are not read."""
    per_row, where = np.array([0.1, float("nan"), 0.1, 0.1], F32), np.array([True, False, True, True])
    jax_loss, torch_loss = lsce_jax.label_smoothed_cross_entropy, lsce_torch.label_smoothed_cross_entropy
    assert np.isfinite(jax_loss(LOGITS, LABELS, smoothing=per_row, where=where)).all()
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    smoothings, counted = torch.from_numpy(per_row), torch.from_numpy(where)
    assert torch_loss(logits, labels, smoothing=smoothings, where=counted).isfinite()
    assert np.isnan(jax.jit(lambda e: jax_loss(LOGITS, LABELS, smoothing=e, reduction="mean"))(per_row))
    by_row = torch.func.vmap(lambda z, y, e: torch_loss(z, y, smoothing=e))
    assert torch.equal(by_row(logits, labels, smoothings).isnan(), smoothings.isnan())


@pytest.mark.parametrize("name", ["logits", "labels"])
def test_sparse_tensors(name: str) -> None:
    arguments = {"logits": torch.from_numpy(LOGITS), "labels": torch.from_numpy(LABELS)}
    arguments[name] = arguments[name].to_sparse()
    message = f"{name} must be a dense tensor, got layout torch.sparse_coo. Pass {name}.to_dense()"
    with pytest.raises(TypeError, match=re.escape(message)):
        lsce_torch.label_smoothed_cross_entropy(**arguments)


def test_message_says_which_label() -> None:
    problem = raised(lambda: lsce_jax.label_smoothed_cross_entropy(**CALLS["bad_label"][0]))
    assert "label 3 at index [1]" in str(problem)
    assert "expected 0 to 2" in str(problem)


@pytest.mark.parametrize(("arguments", "words"), [
    ((LOGITS, LABELS.tolist()), "labels must be a tensor"),
    (("logits", LABELS), "must be a"),
    ((LOGITS, {"a": 1}), "must be a"),
])  # fmt: skip
def test_wrong_types(arguments: tuple[Any, ...], words: str) -> None:
    packages = [lsce_torch] if "tensor" in words else [lsce_jax, lsce_torch]
    for package in packages:
        operands = map(to_torch, arguments) if package is lsce_torch else arguments
        problem = raised(lambda package=package, operands=operands: dense(package, *operands))
        assert isinstance(problem, TypeError)
        assert words in str(problem)


@pytest.mark.parametrize("name", ["where", "prior", "class_weight", "class_mask"])
def test_operands_that_are_no_arrays(name: str) -> None:
    from_jax, from_torch = both_raise(dense, LOGITS, LABELS, **{name: "x"})
    assert str(from_jax).replace("an array", "") == str(from_torch).replace("a tensor", "")
    assert str(from_jax).startswith(f"{name} must be ")


def test_errors_of_jax_itself_are_shown() -> None:
    """Of an array on another device than the mesh, JAX says where both are."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    elsewhere = jax.device_put(LOGITS, jax.devices()[1])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="incompatible devices"):
        jax.grad(lambda logits: lsce_jax.label_smoothed_cross_entropy(logits, LABELS, reduction="sum"))(elsewhere)


def test_boolean_smoothing() -> None:
    for problem in both_raise(dense, LOGITS, LABELS, smoothing=np.ones(4, bool)):
        assert str(problem).startswith("smoothing must be a number or an array")


def test_other_messages() -> None:
    on_no_device = torch.zeros(4, dtype=torch.long, device="meta")
    problem = raised(lambda: lsce_torch.label_smoothed_cross_entropy(to_torch(LOGITS), on_no_device))
    assert "on the same device, got cpu and meta" in str(problem)
    assert "the on of a Convention must be a function" in str(raised(lambda: lsce_jax.Convention("flat", 0.9, 0.1)))
    assert "A number goes to label_smoothing" in str(raised(lambda: lsce_torch.LabelSmoothedCrossEntropyLoss(0.1)))


@pytest.mark.parametrize(("key", "kind", "arguments", "shape"), [
    ("label_smooth", ValueError, (1.5, 3), (4, 3)),
    ("label_smooth", ValueError, (-0.1, 3), (4, 3)),
    ("label_smooth", TypeError, ("0.1", 3), (4, 3)),
    ("count", ValueError, (0.1, 0), (4, 3)),
    ("count", TypeError, (0.1, 3.0), (4, 3)),
    ("class_num", ValueError, (0.1, 4), (4, 3)),
    ("class_num_shape", ValueError, (0.1, 4), (4,)),
    ("convention_name", ValueError, (0.1, 3, "paddle"), (4, 3)),
])  # fmt: skip
def test_class_num_module(key: str, kind: type[Exception], arguments: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    options = {"convention": arguments[2]} if len(arguments) > 2 else {}
    problems = both_raise(
        lambda package, *operands: package.CELossWithLabelSmoothing(*arguments[:2], **options)(*operands),
        *(np.zeros(shape, F32), LABELS),
    )
    assert type(problems[0]) is kind
    assert str(problems[0]) == str(problems[1])
    assert MESSAGES[key][1].split("{")[0] in str(problems[0])


def test_modules_check_options_when_made() -> None:
    prior, mask = np.array([0.5, 0.4], F32), np.array([True, False])
    for given, words in (({"prior": prior}, "sum to 1"), ({"prior": prior, "class_mask": mask}, "outside class_mask")):
        problems = both_raise(lambda package, **given: package.LabelSmoothedCrossEntropyLoss(**given), **given)
        assert str(problems[0]) == str(problems[1])
        assert words in str(problems[0])
    for make in (lambda: lsce_jax.LabelSmoothedCrossEntropyLoss(1.5), lambda: smoothing_weights("uniform", 1.5, 3)):
        assert str(raised(make)) == MESSAGES["smoothing_range"][1].format(given=1.5)


def test_raise_under_compilation() -> None:
    """Under jit the message says how to call checkify, which names the label. A compiled torch loss names it."""

    def loss(logits: Any, labels: Any) -> Any:
        return lsce_jax.label_smoothed_cross_entropy(logits, labels, bad_labels="raise")

    for staged in (jax.jit(loss), jax.jit(jax.grad(lambda *operands: loss(*operands).sum()))):
        problem = raised(lambda staged=staged: staged(LOGITS, LABELS))
        assert str(problem) == lsce_jax.errors.MESSAGES["bad_labels_staged"][1]
    checked = jax.jit(jax.experimental.checkify.checkify(loss))
    outcome, losses = checked(LOGITS, LABELS)
    outcome.throw()
    assert losses.shape == (4,)
    outcome, _ = checked(LOGITS, jnp.array([0, 1, 9, 0]))
    assert "label 9 at index 2" in outcome.get()

    def torch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return lsce_torch.label_smoothed_cross_entropy(logits, labels, bad_labels="raise")

    arguments = to_torch(LOGITS), to_torch(LABELS)
    compiled = torch.compile(torch_loss, fullgraph=True)
    assert compiled(*arguments) == torch_loss(*arguments)
    assert str(raised(lambda: compiled(arguments[0], torch.tensor([0, 1, 9, 0])))).startswith("label 9 at index [2]")
    message = lsce_torch.errors.MESSAGES["bad_labels_unknown"][1]
    assert str(raised(lambda: torch.func.vmap(torch_loss)(*arguments))) == message


@pytest.mark.parametrize("smoothing", [-0.1, [0.1, 1.5, 0.2, 0.0]])
def test_smoothing_out_of_range_that_is_not_at_hand_makes_nan(smoothing: float | list[float]) -> None:
    outside = np.broadcast_to([not 0 <= number <= 1 for number in np.atleast_1d(smoothing)], 4)

    def loss(logits: Any, smoothing: Any) -> Any:
        return lsce_jax.label_smoothed_cross_entropy(logits, LABELS, smoothing=smoothing)

    operands = jnp.array(LOGITS), jnp.array(smoothing, F32)
    gradients = jax.jit(jax.grad(lambda *of: loss(*of).sum(), (0, 1)))(*operands)
    found = [jax.jit(loss)(*operands), gradients[0][:, 0], jnp.broadcast_to(gradients[1], 4)]
    assert all(np.array_equal(np.isnan(values), outside) for values in found)
    with jax.debug_nans(True):
        assert str(raised(lambda: jax.jit(loss)(*operands))).startswith("smoothing must be in [0, 1], got an array")
    problem, _ = jax.jit(jax.experimental.checkify.checkify(loss))(*operands)
    assert problem.get().startswith(f"smoothing must be in [0, 1], got {operands[1].ravel()[outside.argmax() - 4]}.")
    allowed, _ = jax.jit(jax.experimental.checkify.checkify(loss))(operands[0], jnp.array(0.1))
    assert allowed.get() is None

    def torch_loss(logits: torch.Tensor, smoothing: torch.Tensor) -> torch.Tensor:
        labels = to_torch(LABELS)
        return lsce_torch.label_smoothed_cross_entropy(logits, labels, smoothing=smoothing, reduction="none")

    tensors = tuple(torch.tensor(np.array(operand), requires_grad=True) for operand in operands)
    losses = torch.compile(torch_loss, fullgraph=True)(*tensors)
    losses.sum().backward()
    found = [losses, tensors[0].grad[:, 0], tensors[1].grad.expand(4)]
    assert all(np.array_equal(values.detach().isnan(), outside) for values in found)
    assert np.array_equal(torch.func.vmap(torch_loss, (None, 0))(tensors[0], tensors[1][None])[0].isnan(), outside)


# --- Shapes that tell where the classes are -------------------------------------------------------------------------

IMAGES, PIXELS = np.zeros((2, 3, 4, 5), F32), np.zeros((2, 4, 5), int)  # [N, K, H, W] and [N, H, W]
STEPS, TOKENS = np.zeros((2, 7, 3), F32), np.zeros((2, 7), int)  # [B, T, K] and [B, T]
WITH_AXIS = ("label_smoothed_cross_entropy", "label_smoothed_cross_entropy_with_stats")


@pytest.mark.parametrize(("logits", "labels", "options", "end"), [
    (IMAGES, PIXELS, {}, "The shapes fit with the classes at axis 1: pass axis=1."),
    (STEPS.swapaxes(1, 2), TOKENS, {}, "The shapes fit with the classes at axis 1: pass axis=1."),
    (STEPS, TOKENS, {"axis": 1}, "The shapes fit with the classes at axis 2: pass axis=2."),
    (STEPS, TOKENS.T, {}, "Move dimension 1 of the labels to 0."),
    (IMAGES, np.moveaxis(IMAGES, 1, -1), {"axis": 1}, "Move dimension 3 of the labels to 1."),
    # H = W, so that more than one order fits, but only one that moves one dimension
    (IMAGES[..., :4], np.moveaxis(IMAGES[..., :4], 1, -1), {"axis": 1}, "Move dimension 3 of the labels to 1."),
    # several answers, or none
    (np.zeros((5, 5, 7), F32), np.zeros((5, 7), int), {}, "which dimension holds the classes."),
    (np.zeros((2, 3, 2), F32), np.zeros((3, 2), int), {}, "which dimension holds the classes."),
    (STEPS, np.zeros((2, 3, 7), F32)[:, :, :6], {}, "For class indices pass an integer dtype."),
    (LOGITS, np.zeros((2, 2), int), {}, "which dimension holds the classes."),
    (LOGITS, np.zeros((4, 1), int), {}, "Squeeze the dimension of size 1."),
])  # fmt: skip
def test_shapes_tell_the_axis(logits: np.ndarray, labels: np.ndarray, options: dict[str, int], end: str) -> None:
    from_jax = [raised(lambda f=f: getattr(lsce_jax, f)(logits, labels, **options)) for f in WITH_AXIS]
    arguments = torch.tensor(logits), torch.tensor(labels)
    from_torch = [raised(lambda f=f: getattr(lsce_torch, f)(*arguments, **options)) for f in WITH_AXIS]
    from_jax.append(raised(lambda: lsce_jax.LabelSmoothedCrossEntropyLoss(**options)(logits, labels)))
    assert {str(problem) for problem in from_jax} == {str(problem) for problem in from_torch}
    assert str(from_jax[0]).endswith(end)


def test_a_loss_without_axis_says_how_to_move_the_classes() -> None:
    logits, labels = to_torch(STEPS), to_torch(TOKENS)
    for loss in (lsce_torch.cross_entropy, lsce_torch.LabelSmoothedCrossEntropyLoss()):
        assert str(raised(lambda loss=loss: loss(logits, labels))).endswith("at axis 2: pass input.movedim(2, 1).")
        assert loss(logits.movedim(2, 1), labels).isfinite()
        problem = raised(lambda loss=loss: loss(logits.movedim(2, 1), torch.softmax(logits, -1)))
        assert str(problem).endswith("Move dimension 2 of the target to 1.")
    for package, array, move in ((lsce_jax, np.asarray, "jnp.moveaxis(logits, 2, 1)"),
                                 (lsce_torch, torch.tensor, "logits.movedim(2, 1)")):  # fmt: skip
        loss = package.CELossWithLabelSmoothing(0.1, 3)
        problem = raised(lambda loss=loss, array=array: loss(array(STEPS), array(TOKENS)))
        assert str(problem).endswith("have 7 classes at axis 1. Move dimension 2 of the logits to 1.")
        loss, square = package.CELossWithLabelSmoothing(0.1, 7), np.zeros((2, 7, 5), F32)
        problem = raised(lambda loss=loss, array=array, z=square: loss(array(z), array(TOKENS)))
        assert str(problem).endswith(f"pass {move}.")
    # The linear loss has no axis to pass.
    hidden, weight = torch.zeros(4, 3, 2), torch.zeros(5, 2)
    problem = raised(lambda: lsce_torch.linear_label_smoothed_cross_entropy(hidden, weight, torch.zeros(4, 5).long()))
    assert "axis=" not in str(problem)
    problem = raised(lambda: lsce_jax.linear_label_smoothed_cross_entropy(
        np.zeros((4, 3, 2), F32), np.zeros((2, 5), F32), np.zeros((4, 5), int)
    ))  # fmt: skip
    assert "axis=" not in str(problem)


# --- The names of torch's arguments ---------------------------------------------------------------------------------

NAMES_OF_TORCH = {"logits": "input", "labels": "target", "smoothing": "label_smoothing", "class_weight": "weight"}
OF_DROP_IN: dict[str, list[dict[str, Any]]] = {
    **CALLS,
    "ignore_index_soft": [call(labels=LOGITS, ignore_index=2)],
    "labels_shape": [*CALLS["labels_shape"][:-1], call(logits=STEPS, labels=TOKENS)],
    "soft_labels_shape": [*CALLS["soft_labels_shape"], call(logits=IMAGES, labels=np.moveaxis(IMAGES, 1, -1))],
    "array_type": [call(logits="x"), call(labels=[0, 1]), call(prior="x"), call(class_mask="x"), call(where="x")],
    "array_option": [call(z_loss=np.ones(2)), call(ignore_index=np.ones(2)), call(reduction=np.ones(2))],
    "layout": [call(labels=torch.zeros(4).to_sparse()), call(logits=torch.zeros(4, 3).to_sparse())],
    "labels_device": [call(labels=torch.zeros(4, device="meta"))],
    "weight_type": [call(class_weight=0.1)],
    "inplace_reference": [call(inplace_backward=True, implementation="reference")],
    "inplace_logits": [call(inplace_backward=True, logits=torch.zeros(4, 1, requires_grad=True).expand(4, 3))],
    "inplace_needs_reference": [call(inplace_backward=True, class_weight=torch.ones(3, requires_grad=True))],
    "kernel": [call(implementation="triton")],
}  # fmt: skip
NOT_OF_DROP_IN = {"axis"}  # its place is fixed


def calls_of_drop_in() -> list[Any]:
    cases = [(key, one) for calls in (OF_DROP_IN, WRONG_TYPES) for key in calls for one in calls[key]]
    return [pytest.param(one, id=f"{key}-{i}") for i, (key, one) in enumerate(cases) if key not in NOT_OF_DROP_IN]


def foreign(text: str, *own: Callable[..., Any]) -> set[str]:
    """Return which arguments a message names, outside of quoted values, that the functions do not have."""
    names = set(inspect.signature(lsce_torch.label_smoothed_cross_entropy).parameters)
    names -= {name for function in own for name in inspect.signature(function).parameters}
    said = re.sub(r"'[^']*'", "", text)
    return {name for name in names if re.search(rf"\b{name}\b" + "=" * (name == "axis"), said)}


@pytest.mark.parametrize("arguments", calls_of_drop_in())
def test_arguments_have_the_names_of_torch(arguments: dict[str, Any]) -> None:
    given = {NAMES_OF_TORCH.get(name, name): to_torch(value) for name, value in arguments.items()}
    problem = raised(lambda: lsce_torch.cross_entropy(**given))
    assert not foreign(str(problem), lsce_torch.cross_entropy), problem
    of_call = {name: given.pop(name) for name in ("input", "target", "where", "denominator") if name in given}
    of_module = raised(lambda: lsce_torch.LabelSmoothedCrossEntropyLoss(**given)(**of_call))
    module = lsce_torch.LabelSmoothedCrossEntropyLoss
    assert type(of_module) is type(problem)
    assert foreign(str(of_module), module.__init__, module.forward) == set(), of_module
    if "smoothing" not in str(problem).split():  # it is the name of an argument of calls too
        assert "smoothing" not in re.findall(r"\w+", re.sub(r"'[^']*'", "", str(of_module))), of_module


def test_names_where_they_differ_between_calls_and_modules() -> None:
    logits, labels = to_torch(LOGITS), to_torch(LABELS)
    module = lsce_torch.LabelSmoothedCrossEntropyLoss
    assert str(raised(lambda: module(label_smoothing=1.5))).startswith("label_smoothing must be in [0, 1], got 1.5.")
    assert str(raised(lambda: module()(logits, labels, smoothing=1.5))).startswith("smoothing must be in [0, 1]")
    assert str(raised(lambda: module(weight=torch.ones(4))(logits, labels))).startswith("weight must hold one value")
    for package, array in ((lsce_jax, np.asarray), (lsce_torch, torch.tensor)):
        loss = package.CELossWithLabelSmoothing(array(np.array(1.5, F32)), 3)
        problem = raised(lambda loss=loss, array=array: loss(array(LOGITS), array(LABELS)))
        assert str(problem).startswith("label_smooth must be in [0, 1]")
    compute_loss = lsce_torch.trainers.unshifted_loss()
    problem = raised(lambda: compute_loss({"logits": logits}, labels, num_items_in_batch=-1))
    assert str(problem).startswith("num_items_in_batch must be a finite number")


def test_names_of_torch_under_compilation() -> None:
    logits, labels = to_torch(LOGITS), to_torch(LABELS)
    module = lsce_torch.LabelSmoothedCrossEntropyLoss(label_smoothing=0.1)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits, labels), module(logits, labels))
    torch._dynamo.reset()
    assert "integer target must have the shape of the input" in str(raised(lambda: compiled(logits, labels[:3])))


def test_a_loss_is_made_before_it_is_called() -> None:
    logits, labels = to_torch(LOGITS), to_torch(LABELS)
    problem = raised(lambda: lsce_torch.LabelSmoothedCrossEntropyLoss(logits, labels))
    assert str(problem).endswith("and then loss(input, target).")
    problem = raised(lambda: lsce_jax.LabelSmoothedCrossEntropyLoss(LOGITS, LABELS))
    assert str(problem).endswith("as in loss = LabelSmoothedCrossEntropyLoss(...) and then loss(...).")


@pytest.mark.parametrize(("arguments", "hint"), [
    ((LOGITS, to_torch(LABELS)), "logits must be a tensor, got ndarray. Pass torch.as_tensor(logits)."),
    ((to_torch(LOGITS), LABELS.tolist()), "labels must be a tensor, got list. Pass torch.as_tensor(labels)."),
    ((to_torch(LOGITS), 1), "labels must be a tensor, got int. Pass torch.as_tensor(labels)."),
    ((to_torch(LOGITS), None), "labels must be a tensor, got NoneType. labels cannot be left out."),
    (({"logits": LOGITS}, to_torch(LABELS)), "logits must be a tensor, got dict. Pass the one that it holds."),
    (("x", to_torch(LABELS)), "logits must be a tensor, got str. Convert it first."),
])  # fmt: skip
def test_how_to_make_a_tensor(arguments: tuple[Any, ...], hint: str) -> None:
    assert str(raised(lambda: lsce_torch.label_smoothed_cross_entropy(*arguments))) == hint
    for loss in (lsce_torch.cross_entropy, lsce_torch.LabelSmoothedCrossEntropyLoss()):
        words = hint
        for ours, name_of_torch in (("logits must", "input must"), ("(logits)", "(input)"), ("labels", "target")):
            words = words.replace(ours, name_of_torch)
        assert str(raised(lambda loss=loss: loss(*arguments))) == words


def test_a_layer_in_the_place_of_its_weight() -> None:
    hidden, labels = to_torch(HIDDEN), to_torch(LABELS)
    problem = raised(lambda: lsce_torch.linear_label_smoothed_cross_entropy(hidden, torch.nn.Linear(2, 3), labels))
    assert str(problem) == "weight must be a tensor, got Linear. Pass its weight."


# --- Tracers that torch has no longer -------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """A layer and a loss."""

    def __init__(self, loss: Any) -> None:
        """Keep the loss, a module or a function."""
        super().__init__()
        self.layer, self.loss = torch.nn.Linear(3, 3), loss

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return self.loss(self.layer(features), labels)


def function_of_user(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return lsce_torch.label_smoothed_cross_entropy(logits, labels)


def linear_of_user(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return lsce_torch.linear_label_smoothed_cross_entropy(hidden, torch.eye(3), labels)


ROOTS = {
    "function": function_of_user,
    "linear": linear_of_user,
    "model": Model(lsce_torch.LabelSmoothedCrossEntropyLoss()),
    "model with class_num": Model(lsce_torch.CELossWithLabelSmoothing(0.1, 3)),
    "model with cross_entropy": Model(lsce_torch.cross_entropy),
    "CELossWithLabelSmoothing": lsce_torch.CELossWithLabelSmoothing(0.1, 3),
}
# torch.fx fails at functions and modules with keyword arguments before it calls them.
BEYOND_FX = {
    "the function": lsce_torch.label_smoothed_cross_entropy,
    "cross_entropy": lsce_torch.cross_entropy,
    "mean_denominator": lsce_torch.mean_denominator,
    "module": lsce_torch.LabelSmoothedCrossEntropyLoss(),
    "linear module": lsce_torch.LinearLabelSmoothedCrossEntropyLoss(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [*ROOTS, *BEYOND_FX])
def test_old_tracers_name_the_new_ones(name: str) -> None:
    root = (ROOTS | BEYOND_FX)[name]
    example = (to_torch(LOGITS), to_torch(LABELS))
    if "linear module" in name:
        example = (to_torch(LOGITS), torch.eye(3), to_torch(LABELS))
    tracers: dict[str, Callable[[], Any]] = {
        "torch.jit.trace": lambda: torch.jit.trace(root, example[1:] if "denominator" in name else example),
        "torch.jit.script": lambda: torch.jit.script(root),
        "torch.fx.symbolic_trace": lambda: torch.fx.symbolic_trace(root),
    }
    for tracer, trace in tracers.items():
        if not (tracer == "torch.fx.symbolic_trace" and name in BEYOND_FX):
            problem = raised(trace)
            assert type(problem) is RuntimeError
            # torch.jit.script puts it into its own words where a function is an attribute of a module.
            assert lsce_torch.errors.MESSAGES["not_traceable"][1].format(tool=tracer) in str(problem)


def test_what_the_message_names_works() -> None:
    model, example = Model(lsce_torch.LabelSmoothedCrossEntropyLoss()), (torch.zeros(4, 3), to_torch(LABELS))
    assert torch.export.export(model, example).module()(*example).isfinite()
    assert torch.compile(model, backend="eager", fullgraph=True)(*example).isfinite()
