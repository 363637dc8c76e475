"""A batch of a real run: written in training loops, read with its bits, and compared in place of drawn cases."""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from parity_tests.meta.running import invoke, run_code
from parity_tests.truth.batches import BatchError, make_batch, read_batch, save_batch
from parity_tests.truth.cases import LinearCase

LOSSES = """
import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

def masked(logits, labels, where):
    return (F.cross_entropy(logits, labels, reduction="none") * where).sum() / where.sum()

def masked_rows(logits, labels, where):
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return jnp.where(where, -own, 0)

def sometimes_masked(logits, labels, where=None, e=0.2):
    where = torch.ones(len(labels)) if where is None else where
    rows = F.cross_entropy(logits, labels, reduction="none", label_smoothing=e)
    return (rows * where).sum() / where.sum()

def sometimes_masked_rows(logits, labels, where=None):
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return -own if where is None else jnp.where(where, -own, 0)

def weighted(logits, labels, weights):
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()

def weighted_sequences(logits, labels, weights):
    batch, length, _ = logits.shape
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    assert weights.shape == (batch, length)
    return -(own * weights).sum()

def unweighted(logits, labels, weights):
    return F.cross_entropy(logits, labels, reduction="sum")

def linear(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels)

def jax_linear(hidden, weight, labels):
    own = jnp.take_along_axis(jax.nn.log_softmax(hidden @ weight), labels[:, None], axis=-1)
    return -own.mean()
"""
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(2, 3, 4)).astype(np.float32)
LABELS = GENERATOR.integers(4, size=(2, 3))


@pytest.fixture(autouse=True)
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the user's module."""
    (tmp_path / "brought_losses_of_batches.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def compare(first: str, second: str, *options: str) -> Any:
    return invoke(
        "compare", f"torch:brought_losses_of_batches:{first}", f"jax:brought_losses_of_batches:{second}", *options
    )


# --- Hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch.safetensors", "batch.npz"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_the_bits_are_kept(name: str, dtype: str) -> None:
    logits = torch.tensor(LOGITS).to(getattr(torch, dtype)).requires_grad_()
    if (name, dtype) == ("batch.npz", "bfloat16"):
        with pytest.raises(BatchError, match=r"\.npz has no bfloat16 \(logits\): write a \.safetensors file"):
            save_batch(name, logits=logits, labels=LABELS)
        assert not [path for path in Path().iterdir() if "batch." in path.name]
        return
    save_batch(name, logits=logits, labels=torch.tensor(LABELS))
    batch = read_batch(name)
    assert (batch.case.dtype, batch.shape) == (dtype, (2, 3))
    np.testing.assert_array_equal(batch.case.logits.reshape(2, 3, 4), logits.detach().double().numpy())
    np.testing.assert_array_equal(batch.case.labels, LABELS.ravel())


def test_others_read_what_the_hook_wrote_and_the_other_way_round() -> None:
    logits = torch.tensor(LOGITS).bfloat16()
    save_batch("ours.safetensors", logits=logits, labels=LABELS)
    assert torch.equal(safetensors.torch.load_file("ours.safetensors")["logits"], logits)
    safetensors.torch.save_file({"logits": logits, "labels": torch.tensor(LABELS)}, "theirs.safetensors")
    assert read_batch("theirs.safetensors").case.dtype == "bfloat16"


def test_under_jit_and_grad_it_is_written_when_the_function_runs() -> None:
    @jax.jit
    def gradient(logits: jax.Array, labels: jax.Array) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            save_batch("batch.safetensors", logits=logits, labels=labels)
            return logits.sum()

        return jax.grad(loss)(logits)

    logits = jnp.asarray(LOGITS, "bfloat16")
    lowered = gradient.lower(logits, jnp.asarray(LABELS)).compile()
    assert not Path("batch.safetensors").exists()
    lowered(logits, jnp.asarray(LABELS))
    jax.effects_barrier()
    found = read_batch("batch.safetensors").case
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.logits.reshape(2, 3, 4), np.asarray(logits).astype(np.float64))


def test_no_framework_is_loaded_for_it() -> None:
    code = "import numpy, sys; from lsce_parity import save_batch; save_batch('b.npz', logits=numpy.zeros((1, 2)))"
    outcome = run_code(f"{code}; assert not {{'jax', 'torch'}} & {{*sys.modules}}")
    assert outcome.returncode == 0, outcome.stderr


def test_what_cannot_be_written() -> None:
    with pytest.raises(BatchError, match=r"ends in \.safetensors or \.npz"):
        save_batch("batch.pt", logits=LOGITS)
    with pytest.raises(BatchError, match="labels is <U1"):
        save_batch("batch.npz", labels=np.array(["a"]))
    with pytest.raises(BatchError, match="cannot be written: "):
        save_batch("brought_losses_of_batches.py/batch.npz", logits=LOGITS)
    assert not [path for path in Path().iterdir() if "batch." in path.name]


# --- Files that are no batch ------------------------------------------------------------------------------------------

MASK = np.array([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(("arrays", "message"), [
    ({"logits": LOGITS}, "no labels; it has logits [2, 3, 4] float32; expected are logits (or hidden and weight)"),
    ({}, "no logits and labels; it has no arrays"),
    ({"hidden": LOGITS, "labels": LABELS}, "no weight; it has hidden"),
    ({"logits": LOGITS, "labels": LABELS[:, :2]}, "labels are int64 [2, 2]; expected are integers [2, 3], or"),
    ({"logits": LOGITS.argmax(-1), "labels": LABELS}, "logits is int64; expected is one of float64, float32, bfloat16"),
    ({"logits": LOGITS, "labels": np.where(MASK, 0.0, np.nan)}, "labels are float64, 1 of them NaN; expected"),
    ({"logits": LOGITS, "labels": LOGITS * np.nan}, "labels have 24 NaN of 24"),
    ({"logits": LOGITS * [1, 1, 1, np.nan], "labels": LABELS}, "logits has 6 NaN of 24"),
    ({"logits": LOGITS, "labels": np.where(MASK, LABELS, -100)}, "labels have -100 in 1 rows; the classes are 0 to"),
    ({"logits": LOGITS[:0], "labels": LABELS[:0]}, "logits is [0, 3, 4]; expected are rows"),
    ({"logits": LOGITS[0, 0], "labels": LABELS[0, 0]}, "logits is [4]; expected are rows"),
    ({"hidden": LOGITS, "weight": np.eye(4), "labels": LABELS}, "weight is [4, 4], so it cannot be told whether it is"),
    ({"hidden": LOGITS, "weight": np.ones((5, 6)), "labels": LABELS}, "weight is [5, 6]; expected is [K, 4] (torch)"),
    ({"hidden": LOGITS, "logits": LOGITS, "weight": np.ones((5, 4)), "labels": LABELS}, "it has both logits and"),
])  # fmt: skip
def test_what_is_wrong_with_a_batch_is_said(arrays: dict[str, Any], message: str) -> None:
    np.savez("batch.npz", **arrays)
    outcome = compare("linear", "jax_linear", "--inputs", "batch.npz")
    assert outcome.exit_code == 2, outcome.output
    assert f"cannot run: batch.npz: {message}" in " ".join(outcome.output.split())


def damage(kind: str, path: Path) -> None:
    save_batch(path, logits=LOGITS, labels=LABELS)
    data = path.read_bytes()
    match kind:
        case "cut off":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("logits 1 2 3\n")
        case "pickle":
            np.savez(path.with_suffix(".npz"), logits=np.array([{}], dtype=object))
        case "other dtype":
            path.write_bytes(data.replace(b'"F32"', b'"F99"'))


@pytest.mark.parametrize(("kind", "suffix"), [
    ("cut off", ".npz"), ("cut off", ".safetensors"), ("empty", ".npz"), ("empty", ".safetensors"), ("text", ".npz"),
    ("text", ".safetensors"), ("pickle", ".npz"), ("other dtype", ".safetensors"),
])  # fmt: skip
def test_a_damaged_file_is_one_clear_error(kind: str, suffix: str) -> None:
    path = Path(f"batch{suffix}")
    damage(kind, path)
    outcome = compare("linear", "jax_linear", "--inputs", str(path))
    assert outcome.exit_code == 2, outcome.output
    assert f"cannot run: {path}: damaged or cut off, or no " in outcome.output
    assert "Traceback" not in outcome.output


def test_a_file_that_was_changed_anywhere_is_read_or_refused() -> None:
    """No byte of a file, changed, ends in another exception than BatchError."""
    refused = 0
    for suffix in (".npz", ".safetensors"):
        path = Path(f"batch{suffix}")
        save_batch(path, logits=LOGITS, labels=LABELS)
        data = bytearray(path.read_bytes())
        for i in range(0, len(data), 3):
            path.write_bytes(data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :])
            try:
                read_batch(path)
            except BatchError:
                refused += 1
    assert refused > 100


def test_a_missing_file_and_another_kind() -> None:
    assert (
        "nothing.npz cannot be read: No such file" in compare("linear", "jax_linear", "--inputs", "nothing.npz").output
    )
    assert "a batch is a file that ends in" in compare("linear", "jax_linear", "--inputs", "nothing.pt").output
    with zipfile.ZipFile("empty.npz", "w"):
        pass
    assert "it has no arrays" in compare("linear", "jax_linear", "--inputs", "empty.npz").output


# --- Comparisons ------------------------------------------------------------------------------------------------------


def test_a_mask_goes_to_both_losses_and_to_the_truth() -> None:
    labels = np.where(MASK, LABELS % 3, 3)
    save_batch("batch.safetensors", logits=LOGITS, labels=labels, where=MASK)
    outcome = compare("masked", "masked_rows", "--inputs", "batch.safetensors", "--json", "found.json")
    assert outcome.exit_code == 0, outcome.output
    assert "AGREE in 1 case" in outcome.output
    assert "batch.safetensors: float32 [6, 4], labels [6], also where" in outcome.output
    assert json.loads(Path("found.json").read_text())["agrees"] is True
    truth = invoke(
        *("compare", "torch:brought_losses_of_batches:masked", "oracle", "--inputs", "batch.safetensors"),
        *("--smoothing", "0"),
    )
    assert truth.exit_code == 0, truth.output


def test_a_formula_is_that_of_the_batches_without_a_mask() -> None:
    """Rows that a mask takes out have no gradient, as those of an ignored label have none."""
    save_batch("plain.npz", logits=LOGITS, labels=LABELS % 3)
    # The label of the rows that are masked is that of no other row.
    save_batch("masked.npz", logits=LOGITS[:1], labels=np.array([[0, 3, 1]]), where=np.array([[True, False, True]]))
    outcome = compare("sometimes_masked", "sometimes_masked_rows", "--inputs", "plain.npz", "--inputs", "masked.npz")
    assert outcome.exit_code == 1, outcome.output
    assert "smoothing 0.2, mean\n" in outcome.output
    assert "fits its gradients in" in outcome.output
    assert "ignored label" not in outcome.output


def test_other_arrays_go_to_both_by_name_in_the_shape_that_each_takes() -> None:
    weights = GENERATOR.uniform(1, 2, size=(2, 3)).astype(np.float32)
    save_batch("batch.safetensors", logits=LOGITS, labels=LABELS, weights=weights)
    right = compare("weighted", "weighted_sequences", "--inputs", "batch.safetensors")
    assert right.exit_code == 0, right.output
    assert "weighted_sequences does not take rows: it gets the leading shape [2, 3] of your batch" in right.output
    assert "no true values are known for losses that take weights" in right.output
    wrong = compare("unweighted", "weighted_sequences", "--inputs", "batch.safetensors")
    assert wrong.exit_code == 1, wrong.output
    lacking = compare("linear", "weighted_sequences", "--inputs", "batch.safetensors")
    assert lacking.exit_code == 2, lacking.output
    assert "nor weights of your batch by keyword" in lacking.output


def test_a_linear_layer_of_either_framework() -> None:
    hidden, weight = (GENERATOR.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in ((2, 3, 5), (4, 5)))
    batches = [make_batch({"hidden": hidden, "weight": w, "labels": LABELS}, "b").case for w in (weight, weight.T)]
    assert all(isinstance(case, LinearCase) for case in batches)
    np.testing.assert_array_equal(batches[0].logits, batches[1].logits)
    save_batch("batch.safetensors", hidden=hidden, weight=weight, labels=LABELS)
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        outcome = compare("linear", "jax_linear", "--inputs", "batch.safetensors")
    assert outcome.exit_code == 0, outcome.output


def test_many_logits_are_compared_without_true_values() -> None:
    logits = GENERATOR.normal(size=(300, 100)).astype(np.float32)
    save_batch("batch.safetensors", logits=logits, labels=GENERATOR.integers(100, size=300), where=np.ones(300, bool))
    outcome = compare("masked", "masked_rows", "--inputs", "batch.safetensors")
    assert outcome.exit_code == 0, outcome.output
    assert "true values are computed for at most 20000 logits, and there are 30000" in outcome.output
    told = compare("masked", "masked_rows", "--inputs", "batch.safetensors", "--smoothing", "0.1")
    assert told.exit_code == 2
    assert "leave out --smoothing" in told.output
    assert (
        "both losses must be your own"
        in invoke("compare", "torch:brought_losses_of_batches:masked", "oracle", "--inputs", "batch.safetensors").output
    )


def test_several_batches_are_several_cases() -> None:
    save_batch("one.npz", logits=LOGITS, labels=LABELS, where=MASK)
    save_batch("two.npz", logits=LOGITS[:1], labels=LABELS[:1], where=MASK[:1])
    outcome = compare("masked", "masked_rows", "--inputs", "one.npz", "--inputs", "two.npz")
    assert "AGREE in 2 cases" in outcome.output
    save_batch("three.npz", logits=LOGITS.reshape(3, 2, 4), labels=LABELS.reshape(3, 2), where=MASK.reshape(3, 2))
    clash = compare("masked", "masked_rows", "--inputs", "one.npz", "--inputs", "three.npz")
    assert "different shapes of the same number of rows" in clash.output
    assert "--inputs says it all" in compare("masked", "masked_rows", "--inputs", "one.npz", "--classes", "3").output
