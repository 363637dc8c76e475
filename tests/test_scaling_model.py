"""What is sent between devices, without a compiler of theirs: the page, the estimates, the command line.

parity_tests/suite/test_scaling.py has what compiled programs send.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.pages import scaling
from benchmarks.pages.keep import DOCS
from lsce_cost.devices import LIMITS
from lsce_jax import label_smoothed_cross_entropy, linear_label_smoothed_cross_entropy
from parity_tests.evidence.pages import replace_block
from parity_tests.losses import collectives, collectives_model
from parity_tests.losses.collectives_model import (
    AXIS,
    GATHERED,
    OURS,
    OURS_LOCAL,
    WAYS,
    Step,
    estimate,
    fewest,
    predict,
)


def test_the_page_is_what_the_record_gives() -> None:
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    record = json.loads((DOCS / "scaling.json").read_text(encoding="utf-8"))
    for block, text in scaling.page_blocks(record).items():
        assert replace_block(page, f"benchmarks {block}", text) == page, "run: python -m benchmarks scaling --write"


def test_the_record_has_the_sizes_of_the_page_and_agrees_with_the_model() -> None:
    record = json.loads((DOCS / "scaling.json").read_text(encoding="utf-8"))
    assert [(part["target"], part["step"]) for part in record["parts"]] == [
        (target, json.loads(json.dumps(vars(step)))) for target, step in scaling.STEPS
    ]
    for part, (target, step) in zip(record["parts"], scaling.STEPS, strict=True):
        assert [way["way"] for way in part["ways"]] == list(WAYS)
        for way in part["ways"]:
            if way["reason"] is None:
                found = collectives.Compiled(tuple(collectives.Sent(**each) for each in way["sent"]), part["hosts"])
                assert found.total() == predict(way["way"], step, target[:3]), (target, way["way"])


@pytest.mark.parametrize("features", [None, 5])
def test_the_ways_are_one_loss(features: int | None) -> None:
    """Each gives the loss and gradients of ours, but for the one that has no smoothing."""
    step = Step(6, 8, (1, 2), features, "float32")
    mesh = jax.make_mesh(step.mesh, collectives.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    random = np.random.default_rng(0)
    shapes = [(6, 8)] if features is None else [(6, features), (features, 8)]
    floats = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    others = jnp.array([0, 3, 7, 4, 2, 5]), jnp.asarray(0.1, jnp.float32)
    ours = label_smoothed_cross_entropy if features is None else linear_label_smoothed_cross_entropy
    places = tuple(range(len(floats)))

    def reference(*operands):
        return ours(*operands[:-1], smoothing=operands[-1], reduction="mean")

    expected = jax.value_and_grad(reference, argnums=places)(*floats, *others)
    for way in WAYS:
        found = jax.jit(jax.value_and_grad(collectives.loss_of(way, step, mesh), argnums=places))(*floats, *others)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        close = all(np.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in pairs)
        assert close == (way != collectives_model.INTEGER), way


# --- Estimates ------------------------------------------------------------------------------------------------------


def test_small_messages_take_their_hops() -> None:
    """Two reductions there and back, over rings of 16 chips."""
    one_row = [estimate(OURS_LOCAL, Step(16, 4096, (1, count)), "tpu-v5e").classes for count in (1, 4, 16, 256)]
    assert one_row == pytest.approx([0, 2 * 2 * 2e-6, 2 * 2 * 8e-6, 2 * 2 * 16e-6])


def test_large_messages_take_the_bandwidth() -> None:
    step = Step(8192, 131072, (1, 16))
    links = estimate(GATHERED, step, "tpu-v5e").links
    assert links == pytest.approx(15 / 16 * 8192 * 131072 * 2 / 100e9)


def test_fewest_is_where_the_times_are_the_same() -> None:
    """With many features, so that the hops and the other numbers of a row do not show."""
    for rows in (2**16, 2**18):
        step = Step(rows, 2**20, (16, 1), 2**16)
        found = estimate(OURS_LOCAL, step, "tpu-v5e")
        ratio = fewest("tpu-v5e", 8, 2) / step.local_rows
        assert found.rows / found.compute == pytest.approx(ratio * 15 / 16)


def test_links_of_one_axis() -> None:
    """A v5e has two axes with 100 GB/s each, both ways together, a v5p three with 200."""
    assert AXIS["tpu-v5e"] == 100e9
    assert AXIS["tpu-v5p"] == 200e9
    assert AXIS["gpu-h100"] == LIMITS["gpu-h100"].links


def test_no_estimate_for_gpus() -> None:
    with pytest.raises(ValueError, match="there are estimates for tpu-v4"):
        estimate(OURS, Step(64, 64, (1, 8)), "gpu-h100")


def test_other_dtypes_are_an_error() -> None:
    with pytest.raises(ValueError, match="must be float32 or bfloat16, but is float16"):
        Step(64, 64, (1, 8), dtype="float16")


# --- The command line -----------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["scaling", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_command(tmp_path) -> None:
    file = tmp_path / "sent.json"
    result = run("--rows", 64, "--classes", 512, "--mesh", "2x4", "--dtype", "float32", "--json", file)
    assert result.exit_code == 0, result.output
    assert "8 virtual devices of a CPU: float32, 64 x 512 logits, rows over 2, classes over 4" in " ".join(
        result.stdout.split()
    )
    (part,) = json.loads(file.read_text(encoding="utf-8"))["parts"]
    of_ours = next(way for way in part["ways"] if way["way"] == OURS_LOCAL)
    assert of_ours["sent"] == [
        {"kind": "all-reduce", "axes": "classes", "times": 1, "bytes": 4 * 32 * numbers} for numbers in (1, 4)
    ]
