"""Where two models part: right ports agree, and each mistake is found in its layer and direction."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from examples import ported_block
from parity_tests.losses.models import LOSS, MODEL, ModelError
from parity_tests.losses.models_jax import JaxModel
from parity_tests.losses.models_torch import TorchModel
from parity_tests.meta.running import invoke, run_code
from parity_tests.studies.layer_pairs import tokens
from parity_tests.studies.layers import LayerVerdict, ModelsVerdict, compare_layers

# Rounding, which the machine determines, and indices of the largest share.
NUMBER = r"-?\d+(\.\d+)?(e[+-]\d+)?|\[[\d, ]+\]"


@pytest.fixture(autouse=True)
def _standard(one_thread: None) -> Iterator[None]:
    """Flax does not take the strictness of our tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def shares(verdict: ModelsVerdict) -> dict[str, tuple[float, float]]:
    return {each.name: (each.share("forward"), each.share("backward")) for each in verdict.layers}


def parting(verdict: ModelsVerdict) -> list[str]:
    return [each.name for each in verdict.layers if not each.agrees]


def layer(verdict: ModelsVerdict, name: str) -> LayerVerdict:
    return next(each for each in verdict.layers if each.name == name)


# --- A transformer block ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block() -> JaxModel:
    """The block in Flax. It is compiled once."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return JaxModel(*ported_block.in_flax())


class Attention(ported_block.TorchAttention):
    """The attention of the example, with something wrong."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0, detached: bool = False, narrow: bool = False) -> None:
        super().__init__()
        self.scale, self.rate, self.detached, self.narrow = scale, dropout, detached, narrow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            each(x).view(*x.shape[:2], ported_block.HEADS, -1).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        if self.detached:
            key = key.detach()
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale / query.shape[-1] ** 0.5, dropout_p=self.rate
        )
        mixed = mixed.bfloat16().float() if self.narrow else mixed
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


def port(change: Callable[[Any], None] | None = None, **options: Any) -> TorchModel:
    """Return the block in torch, after a change."""
    model, inputs, loss = ported_block.in_torch(**options)
    if change is not None:
        change(model)
    return TorchModel(model, inputs, loss)


def with_attention(**options: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, "attention", Attention(**options))


def without_bias(model: Any) -> None:
    model.narrow = torch.nn.Linear(2 * ported_block.WIDTH, ported_block.WIDTH, bias=False)


def test_right_ports_agree(block: JaxModel) -> None:
    verdict = compare_layers(block, port())
    assert verdict.agrees is True
    assert not verdict.left_out
    assert [each.name for each in verdict.layers][:4] == [MODEL, "embed", "norm_1", "attention"]
    assert verdict.layers[-1].name == LOSS
    assert verdict.layers[2].other == "norm1"
    assert max(max(pair) for pair in shares(verdict).values()) < 0.5
    assert all(each.dtype == "float32" for each in verdict.layers)
    # jax.nn computes the softmax of attention in float32, whatever it is given.
    assert [each.name for each in verdict.layers if each.no_exact] == ["attention"]


FAULTS = {
    "eps": (port, {"eps": 1e-6}, ["norm_1", "norm_2"], "forward", "output"),
    "gelu": (port, {"approximate": "tanh"}, [MODEL], "forward", "input of narrow"),
    "scale": (port, {"change": with_attention(scale=1.01)}, ["attention"], "forward", "input of attention.out"),
    "stopped gradient": (
        port,
        {"change": with_attention(detached=True)},
        ["attention"],
        "backward",
        "gradient of the output of key",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_found_in_their_layers(block: JaxModel, fault: str) -> None:
    make, options, names, direction, what = FAULTS[fault]
    verdict = compare_layers(block, make(**options))
    assert parting(verdict) == names
    assert verdict.agrees is False
    found = verdict.first
    assert found is not None
    assert found.name == names[0]
    assert (found.beyond("forward") is None) == (direction == "backward")
    part = found.beyond(direction)
    assert part is not None
    assert part.what == what.replace("attention.", "")
    assert part.first != part.second
    assert part.is_function == (names != ["attention"])
    assert list(found.not_derivatives) == ["B"] * (direction == "backward")


def test_a_missing_bias(block: JaxModel) -> None:
    verdict = compare_layers(block, port(without_bias))
    assert parting(verdict) == ["narrow"]
    assert layer(verdict, "narrow").weights == ["only A has narrow.bias"]
    assert layer(verdict, "narrow").beyond("forward") is not None


def test_dropout_left_on(block: JaxModel) -> None:
    verdict = compare_layers(block, port(with_attention(dropout=0.1)))
    assert parting(verdict) == ["attention"]
    assert layer(verdict, "attention").random == "B"
    assert verdict.agrees is False


def test_dropout_left_on_in_both() -> None:
    def make() -> TorchModel:
        return TorchModel(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)), torch.ones(2, 3))

    verdict = compare_layers(make(), make())
    assert verdict.agrees is None
    assert layer(verdict, "1").random == "A and B"
    assert layer(verdict, "0").agrees


@pytest.mark.parametrize(("bits", "cause"), [
    (8, "matrix products in one bfloat16 pass"),
    (11, "matrix products in TF32"),
    (16, "matrix products in three bfloat16 passes"),
])  # fmt: skip
def test_matrix_products_of_fewer_bits_are_named(block: JaxModel, bits: int, cause: str) -> None:
    verdict = compare_layers(block, port(), bits=(None, bits))
    linear = [
        "attention",
        "wide",
        "narrow",
        "head",
        *(f"attention.{part}" for part in ("query", "key", "value", "out")),
    ]
    if bits == 16:  # so accurate that rounding explains the rest
        linear = parting(verdict)
        assert linear
    assert set(parting(verdict)) == {*linear}
    for name in linear:
        assert layer(verdict, name).causes == {"B": (cause, "a simulation of them has the same results")}, name
        assert not any(part.is_function for part in layer(verdict, name).parts)
    assert verdict.common_cause == f"{cause} in B"


def test_matrix_products_of_fewer_bits_in_flax() -> None:
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    pair = JaxModel(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), x), TorchModel(torch.nn.Linear(8, 4), torch.tensor(x))
    assert compare_layers(*pair).agrees
    assert compare_layers(*pair, bits=(8, None)).common_cause == "matrix products in one bfloat16 pass in A"
    precise = JaxModel(nnx.Linear(8, 4, precision="highest", rngs=nnx.Rngs(0)), x)
    assert compare_layers(precise, pair[1], bits=(8, None)).agrees


def test_a_narrow_dtype_on_one_side(block: JaxModel) -> None:
    verdict = compare_layers(block, port(with_attention(narrow=True)))
    assert parting(verdict) == ["attention"]
    assert layer(verdict, "attention").narrow == ("float32", "bfloat16")
    assert layer(verdict, "attention").causes == {}  # neither side has a float64 run


@pytest.mark.parametrize("kind", [torch.nn.Tanh, torch.nn.Linear])
def test_products_are_not_blamed_for_other_roundings(kind: Any) -> None:
    """An output that is rounded to 16 bits has no product as its cause, whether or not the layer has products."""

    class Rounded(kind):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y + ((y * 257 - (y * 257 - y)) - y).detach() if y.dtype == torch.float32 else y  # Veltkamp's split

    def make(kind: Any) -> TorchModel:
        layer = kind(16, 16) if issubclass(kind, torch.nn.Linear) else kind()
        return TorchModel(torch.nn.Sequential(layer), torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))

    verdict = compare_layers(make(kind), make(Rounded))
    assert parting(verdict) == ["0"]
    found = layer(verdict, "0")
    assert [part.off for part in found.parts if part.share > 1] == ["B"]
    assert not any(part.is_function for part in found.parts)
    assert (found.causes["B"] or ("", ""))[1] != "a simulation of them has the same results"
    assert found.causes["B"] is None or kind is torch.nn.Linear


# --- Weights ----------------------------------------------------------------------------------------------------------


def copied_into(model: Any, block: JaxModel) -> None:
    """Copy the weights of the block as users do."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            ours = {"weight": "kernel"} if "norm" not in name and "embed" not in name else {"weight": "scale"}
            path, _, last = name.replace("norm1", "norm_1").replace("norm2", "norm_2").rpartition(".")
            last = "embedding" if path == "embed" else ours.get(last, last)
            values = torch.tensor(block.tensors[f"{path}.{last}"])
            tensor.copy_(values.T if last == "kernel" else values)


def test_weights_of_their_own(block: JaxModel) -> None:
    verdict = compare_layers(block, port(lambda model: copied_into(model, block)), copy_weights=False)
    assert verdict.agrees is True
    assert verdict.notes == ["19 tensors compared, as both models have them"]


def test_a_square_kernel_that_is_not_transposed(block: JaxModel) -> None:
    def change(model: Any) -> None:
        copied_into(model, block)
        with torch.no_grad():
            model.attention.key.weight.copy_(model.attention.key.weight.T.clone())

    verdict = compare_layers(block, port(change), copy_weights=False)
    assert parting(verdict) == ["attention.key"]
    found = layer(verdict, "attention.key")
    assert found.weights == [
        "attention.key.weight holds the numbers of attention.key.kernel, but not in its layout: it must be transposed"
    ]
    part = found.beyond("forward")
    assert part is not None
    assert part.is_function


def test_other_weights(block: JaxModel) -> None:
    verdict = compare_layers(block, port(), copy_weights=False)
    assert verdict.agrees is False
    assert "attention.key.kernel and attention.key.weight do not hold the same numbers" in (
        layer(verdict, "attention.key").weights
    )


# --- Images -----------------------------------------------------------------------------------------------------------


class JaxImages(nnx.Module):
    """Convolutions with channels last."""

    def __init__(self, rngs: nnx.Rngs, train: bool) -> None:
        self.layers = nnx.List([nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Conv(4, 6, (2, 2), padding="VALID", rngs=rngs)])
        self.norm = nnx.BatchNorm(4, use_running_average=not train, rngs=rngs)
        self.head = nnx.LinearGeneral((6,), (2, 5), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.layers[0](x)))
        x = self.layers[1](x)
        return self.head(jnp.mean(x, axis=(1, 2)))


class TorchImages(torch.nn.Module):
    """The same with channels second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3, padding="same"), torch.nn.Conv2d(4, 6, 2)])
        self.norm, self.act = torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True)
        self.head = torch.nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.layers[0](x)))
        return self.head(self.layers[1](x).mean((2, 3)))


def images() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(4, 5, 4, 3)).astype(np.float32)


def jax_images(train: bool = False) -> JaxModel:
    return JaxModel(JaxImages(nnx.Rngs(0), train), jnp.asarray(images()))


def torch_images(train: bool = False) -> TorchModel:
    return TorchModel(TorchImages().train(train), torch.tensor(images().transpose(0, 3, 1, 2)))


@pytest.mark.slow
def test_images_have_channels_last_and_first() -> None:
    """The outputs of the convolution, 5 x 4 with 4 channels, fit in two ways; their kinds tell which."""
    one = jax_images()
    verdict = compare_layers(one, torch_images())
    assert verdict.agrees is True, shares(verdict)
    assert verdict.left_out == {"act": "only in B (ReLU)"}
    assert [each.name for each in verdict.layers] == [MODEL, "layers.0", "norm", "layers.1", "head"]
    assert all(not each.no_exact for each in verdict.layers)

    verdict = compare_layers(one, torch_images(train=True))
    assert parting(verdict) == ["norm"]
    assert "B is in training mode, A is not" in layer(verdict, "norm").settings

    verdict = compare_layers(one, torch_images(), bits=(None, 11))
    assert parting(verdict) == ["layers.0", "layers.1", "head"]
    assert verdict.common_cause == "matrix products in TF32 in B"


@pytest.mark.slow
def test_convolutions_of_fewer_bits_in_flax() -> None:
    verdict = compare_layers(jax_images(), torch_images(), bits=(8, None))
    assert parting(verdict) == ["layers.0", "layers.1", "head"]
    assert verdict.common_cause == "matrix products in one bfloat16 pass in A"


class Flattened(torch.nn.Module):
    """A convolution whose output is flattened."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv, self.head, self.last = torch.nn.Conv2d(3, 2, 1), torch.nn.Linear(40, 5), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.head((x.permute(0, 2, 3, 1) if self.last else x).flatten(1))


def test_numbers_in_another_order() -> None:
    """The mistake of ports that flatten images: the last layer gets the same numbers in another order."""
    batch = torch.tensor(images().transpose(0, 3, 1, 2))
    verdict = compare_layers(TorchModel(Flattened(True), batch), TorchModel(Flattened(False), batch))
    assert parting(verdict) == [MODEL]
    part = layer(verdict, MODEL).beyond("forward")
    assert part is not None
    assert (part.what, part.reordered) == ("input of head", True)


# --- Names and layouts ------------------------------------------------------------------------------------------------


def stack(names: tuple[str, ...] = ("first", "second"), sizes: tuple[int, ...] = (4, 4, 4)) -> TorchModel:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, inside, outside in zip(names, sizes, sizes[1:], strict=False):
                self.add_module(name, torch.nn.Linear(inside, outside))

        def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
            for module in self.children():
                x = module(x).tanh()
            return x

    return TorchModel(Stack(), torch.ones(3, sizes[0]))


def test_names_are_mapped() -> None:
    assert compare_layers(stack(), stack(("one", "two")), mapping={"first": "one", "second": "two"}).agrees
    assert tokens("blocks_3.Norm1") == tokens("blocks.3.norm_1") == tokens("blocks[3]/norm1")
    assert tokens("layers.1.10") != tokens("layers.11.0")
    with pytest.raises(ModelError, match=r"the second model has no won; did you mean .*one"):
        compare_layers(stack(), stack(("one", "two")), mapping={"first": "won"})
    with pytest.raises(
        ModelError, match=r"no counterpart: first\.weight, .*; nor have these of the second: one\.weight"
    ):
        compare_layers(stack(), stack(("one", "second")))


@pytest.mark.parametrize(("other", "message"), [
    (lambda: stack(sizes=(4, 3, 4)), r"first\.weight has shape \[4, 4\] and first\.weight \[3, 4\]"),
    (lambda: stack(sizes=(5, 4, 4)), r"array 0 is not: shapes \[3, 4\] and \[3, 5\]"),
    (lambda: TorchModel(torch.nn.Linear(4, 4), torch.ones(3, 4), torch.sum), "only one of the models has a loss"),
])  # fmt: skip
def test_models_that_cannot_be_compared(other: Callable[[], TorchModel], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        compare_layers(stack(), other())


def test_ambiguous_layouts_are_refused() -> None:
    class Twice(nnx.Module):
        def __init__(self, sign: float) -> None:
            self.inner, self.sign = Inner(), sign

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(self.sign * x)

    class Inner(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * x * x

    class TorchInner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**3

    class TorchTwice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TorchInner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    cube = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)

    def pair(sign: float) -> tuple[JaxModel, TorchModel]:
        return JaxModel(Twice(sign), jnp.asarray(cube)), TorchModel(TorchTwice(), torch.tensor(cube))

    assert compare_layers(*pair(1.0)).agrees  # the numbers tell
    with pytest.raises(
        ModelError, match=r"\(model\), \[2, 3, 3\], may have the same layout .* --layout '\(model\)=same'"
    ):
        compare_layers(*pair(-1.0))
    verdict = compare_layers(*pair(-1.0), layouts={"*": "same"})
    assert parting(verdict) == [MODEL]


def test_layers_that_are_called_differently() -> None:
    class Shared(torch.nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.inner, self.times = torch.nn.Linear(4, 4), times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = self.inner(x)
            return x

    verdict = compare_layers(TorchModel(Shared(2), torch.ones(2, 4)), TorchModel(Shared(2), torch.ones(2, 4)))
    assert [each.name for each in verdict.layers] == [MODEL, "inner", "inner#2"]
    assert verdict.agrees
    verdict = compare_layers(TorchModel(Shared(2), torch.ones(2, 4)), TorchModel(Shared(3), torch.ones(2, 4)))
    assert verdict.left_out == {"inner": "B calls it more often"}
    assert parting(verdict) == [MODEL]


def test_weights_of_layers_that_are_not_called() -> None:
    """A layer around them uses their weights, as the attention of torch.nn does."""

    class Around(torch.nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.inner.weight, self.inner.bias)

    def make(bias: bool) -> TorchModel:
        return TorchModel(torch.nn.Sequential(Around(bias)), torch.eye(4))

    assert compare_layers(make(True), make(True)).agrees
    verdict = compare_layers(make(True), make(False))
    assert verdict.left_out == {"0.inner": "never called"}
    assert parting(verdict) == ["0"]
    assert layer(verdict, "0").weights == ["only A has 0.inner.bias"]


def test_shapes_that_do_not_fit() -> None:
    """Layers that only one side calls with the sequence first are compared as a part of the layer around them."""

    class Turned(torch.nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.inner, self.turned = torch.nn.Linear(4, 4), turned

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1) if self.turned else self.inner(x)

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    verdict = compare_layers(TorchModel(Turned(False), x), TorchModel(Turned(True), x))
    assert verdict.agrees
    assert verdict.left_out == {"inner": "its inputs have shape [2, 3, 4] in A, [3, 2, 4] in B"}


def test_one_wrong_backward_pass() -> None:
    """The gradients are a hundredth too small from one layer on; the others get those of the first model."""

    class Damped(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y + 0.01 * (y.detach() - y)

    def make(kind: type[torch.nn.Linear]) -> TorchModel:
        layers = torch.nn.Linear(4, 4), kind(4, 4), torch.nn.Linear(4, 4)
        return TorchModel(torch.nn.Sequential(*layers), torch.ones(2, 4), torch.sum)

    verdict = compare_layers(make(torch.nn.Linear), make(Damped))
    assert parting(verdict) == ["1"]
    beyond = [part.what for part in layer(verdict, "1").parts if part.share > 1]
    assert beyond == ["gradient of the input", "gradient of 1.bias", "gradient of 1.weight"]


def test_a_layer_that_raises() -> None:
    class Once(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("no more")
            return x.square()

    def make() -> TorchModel:
        return TorchModel(torch.nn.Sequential(Once(), torch.nn.Linear(4, 4)), torch.ones(2, 4))

    verdict = compare_layers(make(), make())
    assert verdict.agrees is None
    assert layer(verdict, "0").error == "RuntimeError: no more"
    assert layer(verdict, "1").agrees


def test_two_models_of_flax() -> None:
    def make(seed: int, epsilon: float = 1e-6) -> JaxModel:
        rngs = nnx.Rngs(seed)
        return JaxModel(
            nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.RMSNorm(4, epsilon=epsilon, rngs=rngs)), jnp.ones((2, 4))
        )

    assert compare_layers(make(0), make(1)).agrees
    verdict = compare_layers(make(0), make(1, epsilon=1e-5))
    assert parting(verdict) == ["layers.1"]


def test_a_dtype_given_to_a_layer_of_flax() -> None:
    """The layer casts to it, but not in the float64 run."""

    def make(dtype: Any) -> JaxModel:
        return JaxModel(nnx.Linear(4, 4, dtype=dtype, rngs=nnx.Rngs(0)), np.ones((2, 4), np.float32))

    verdict = compare_layers(make(jnp.bfloat16), make(jnp.bfloat16))
    assert verdict.agrees
    assert (verdict.layers[0].dtype, verdict.layers[0].no_exact) == ("bfloat16", {})
    verdict = compare_layers(make(jnp.bfloat16), make(jnp.float32))
    assert verdict.common_cause == "it computes in bfloat16 in A"


class Conv1D(torch.nn.Module):
    """The linear layer of Hugging Face's transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_weights_of_hugging_face_are_not_transposed() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    verdict = compare_layers(JaxModel(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), x), TorchModel(Conv1D(), torch.tensor(x)))
    assert verdict.agrees, shares(verdict)


def test_bfloat16_models() -> None:
    def make(eps: float = 1e-5) -> TorchModel:
        layers = torch.nn.Linear(16, 16), torch.nn.LayerNorm(16, eps=eps)
        return TorchModel(torch.nn.Sequential(*layers).bfloat16(), torch.ones(4, 16).bfloat16())

    verdict = compare_layers(make(), make())
    assert verdict.agrees
    assert {each.dtype for each in verdict.layers} == {"bfloat16"}
    # An epsilon that rounding in bfloat16 hides is seen in float64.
    verdict = compare_layers(make(), make(eps=1e-6))
    assert parting(verdict) == ["1"]


# --- The command ------------------------------------------------------------------------------------------------------

STACK = """
import torch

class Stack(torch.nn.Sequential):
    pass

def make(eps=1e-5, seed=0, what="pair"):
    model = Stack(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4, eps=eps))
    inputs = torch.arange(12.0).reshape(3, 4) + seed
    return {"pair": (model, inputs), "model": model, "number": (3, inputs)}[what]
"""


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    (tmp_path / "brought_model.py").write_text(STACK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "torch:brought_model:make", "torch:brought_model:make"


def test_command(pair: tuple[str, str], tmp_path: Path) -> None:
    outcome = invoke("layers", *pair)
    assert outcome.exit_code == 0, outcome.output
    assert "AGREE in 3 layers, forward and backward" in outcome.output
    file, page = tmp_path / "out" / "found.json", tmp_path / "page"
    outcome = invoke("layers", *pair, "--b", "eps=1e-6", "--json", str(file), "--report", str(page))
    assert outcome.exit_code == 1, outcome.output
    assert outcome.output.splitlines()[-3:] == [
        "DISAGREE in 1 of 3 layers (A is taken as right): 1.",
        "The first mistake is in 1, forward: eps is 1e-05 in A, eps 1e-06 in B.",
        "Change in B: set eps to 1e-05 in 1.",
    ]
    assert "eps is 1e-05 in A, eps 1e-06 in B" in outcome.output
    content = json.loads(file.read_text())
    assert content["first"] == "1"
    assert [each["verdict"] for each in content["layers"]] == ["same", "same", "another function"]
    assert "The first mistake is in 1, forward" in (page / "index.html").read_text()


def test_command_simulates_devices(pair: tuple[str, str]) -> None:
    outcome = invoke("layers", *pair, "--device-model", "b=tpu-v5e")
    assert outcome.exit_code == 1, outcome.output
    assert (
        "B is less accurate than rounding in float32 explains: matrix products in one bfloat16 pass" in outcome.output
    )
    assert invoke("layers", *pair, "--device-model", "gpu-h100").exit_code == 0  # torch does not use TF32 by default


def test_command_reads_maps(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "names").write_text("0 = 0  # the same\n\n1 = 1\n")
    assert invoke("layers", *pair, "--map", str(tmp_path / "names")).exit_code == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["--a", "what=model"], "must return (model, inputs) or (model, inputs, loss), and returned a Stack"),
    (["--a", "what=number"], "expected a torch.nn.Module, got a int"),
    (["--a", "what=none"], "raised KeyError"),
    (["--b", "seed=1"], "the example batches must be the same, but array 0 is not"),
    (["--map", "0"], "needs NAME=NAME or a file of such lines, and 0 cannot be read"),
    (["--map", "0="], "--map needs NAME=NAME, got '0='"),
    (["--map", "3=0"], "the first model has no 3"),
    (["--layout", "0=moved", "--layout", "1=sideways"], "--layout 1 must be same or moved, got 'sideways'"),
    (["--weights", "mine"], "--weights is copy or own, got 'mine'"),
    (["--device-model", "tpu-v99"], "there is no device 'tpu-v99'"),
    (["--device-model", "c=tpu-v5e"], "--device-model needs a name, a=NAME or b=NAME, got 'c=tpu-v5e'"),
])  # fmt: skip
def test_command_that_cannot_run(pair: tuple[str, str], arguments: list[str], message: str) -> None:
    outcome = invoke("layers", *pair, *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.output


@pytest.mark.parametrize(("blocked", "framework", "code"), [(("flax", "jax"), "torch", 0), (("flax",), "jax", 2)])
def test_frameworks_that_are_missing(
    pair: tuple[str, str], blocked: tuple[str, ...], framework: str, code: int
) -> None:
    names = [name.replace("torch", framework, 1) for name in pair]
    outcome = run_code(f"from parity_tests.__main__ import app; app(['layers', *{names!r}])", blocked, cwd=Path.cwd())
    assert outcome.returncode == code, outcome.stderr
    if code:
        assert "lsce-parity layers needs flax" in outcome.stderr


PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```sh\nlsce-parity (layers [^\n]*)\n```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_page_shows_what_the_commands_print(number: int) -> None:
    assert len(SHOWN) == 2
    command, shown = SHOWN[number]
    outcome = invoke(*command.split())
    assert outcome.exit_code == 1, outcome.output
    printed = {re.sub(NUMBER, "#", " ".join(line.split())) for line in outcome.output.splitlines()}
    for line in shown.splitlines():
        assert line == "..." or re.sub(NUMBER, "#", " ".join(line.split())) in printed, line
