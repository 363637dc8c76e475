"""The messages that only PyTorch users can get. All others are in `lsce_spec.errors`."""

from collections.abc import Iterable
from inspect import isfunction
from typing import Any, NoReturn

from torch import nn

from lsce_spec import MESSAGES as SHARED_MESSAGES

MESSAGES: dict[str, tuple[type[Exception], str]] = {
    "not_traceable": (
        RuntimeError,
        "{tool} cannot record this loss, which chooses by shapes and values how to compute: use torch.export or "
        "torch.compile.",
    ),
    "labels_device": (
        ValueError,
        "logits and labels must be on the same device, got {logits} and {labels}. Move one of them.",
    ),
    "layout": (
        TypeError,
        "{name} must be a dense tensor, got layout {given}. Pass {name}.to_dense(), "
        "or {name}.to_padded_tensor() of a nested tensor.",
    ),
    "layer_device": (
        ValueError,
        "hidden, weight, bias and labels must be on the same device, got {name} on {given} and hidden on {expected}. "
        "Move one of them.",
    ),
    "module_operands": (
        TypeError,
        "LabelSmoothedCrossEntropyLoss(...) makes the loss, and input and target go to its call: "
        "loss = LabelSmoothedCrossEntropyLoss(...) and then loss(input, target).",
    ),
    "weight_type": (
        TypeError,
        "weight must be None or a tensor of class weights, got {given}. "
        "A number goes to label_smoothing, as in nn.CrossEntropyLoss.",
    ),
    "trainer_outputs": (
        TypeError,
        "outputs must hold the logits, as .logits, ['logits'] or the first of a tuple, or be the logits; got {given}. "
        "A model that leaves its logits out (use_liger_kernel=True does so) needs a loss within the model.",
    ),
    "trainer_labels": (
        TypeError,
        "labels must be class indices (an integer dtype), got {given}. For None, name the column of the data 'labels'. "
        "For class probabilities, whose elements the Trainer would count, override compute_loss and take "
        "label_smoothed_cross_entropy there.",
    ),
    "bad_labels_unknown": (
        RuntimeError,
        "bad_labels='raise' reads the labels' values, which are not at hand under vmap and in tensors without data. "
        "Use bad_labels='nan' there, or call the loss outside of vmap.",
    ),
    "inplace_reference": (
        ValueError,
        "inplace_backward=True needs implementation='fused', got 'reference', which differentiates what it computed "
        "from the logits. Drop one of the two.",
    ),
    "inplace_logits": (
        ValueError,
        "inplace_backward=True writes the gradient over the logits, but {problem}. "
        "Pass inplace_backward=False, or logits that are plain tensors with memory of their own.",
    ),
    "inplace_needs_reference": (
        ValueError,
        "inplace_backward=True needs the fused implementation, but {reason}, which only the reference supports. "
        "Pass inplace_backward=False.",
    ),
    "inplace_transformed": (
        RuntimeError,
        "inplace_backward=True works in plain eager backward passes, not within torch.compile or torch.func, and its "
        "gradient cannot be differentiated again. Pass inplace_backward=False there.",
    ),
    "denominator_dtensor": (
        TypeError,
        "labels must be the rows of this rank, got a DTensor. Pass labels.to_local(). Losses of DTensors need no "
        "denominator: their mean is that of all rows.",
    ),
    "no_group": (
        RuntimeError,
        "there is no process group. Call torch.distributed.init_process_group first; torchrun sets what it needs. "
        "For one process use label_smoothed_cross_entropy.",
    ),
    "group_type": (
        TypeError,
        "group must be a torch.distributed.ProcessGroup or None, got {given}. Of a DeviceMesh pass mesh.get_group().",
    ),
    "group_member": (
        RuntimeError,
        "this process is not in the group. Call the loss in the processes of the group only.",
    ),
    "ranks_differ": (
        ValueError,
        "the ranks of the group disagree about {name}: rank 0 has {first}, rank {rank} has {other}. "
        "Pass the same on every rank; only the classes are divided.",
    ),
    "ranks_rows": (
        ValueError,
        "the ranks of the group disagree about {name}: those of rank {rank} are not those of rank 0. Pass the same "
        "rows on every rank; only the classes are divided. If the rows of a linear loss are divided too, and its "
        "weight is a DTensor, pass hidden and labels as DTensors: DTensor.from_local(hidden, mesh, [Shard(0)]).",
    ),
    "ranks_tensor": (
        ValueError,
        "the ranks of the group disagree about {name}: the tensor of rank {rank} is not that of rank 0. "
        "Pass the same on every rank; only the classes are divided.",
    ),
    "rank_failed": (
        RuntimeError,
        "the loss failed on other ranks of the group: {ranks}. The error of each says why.",
    ),
    "no_classes_anywhere": (
        ValueError,
        "no rank of the group has a class. Check which dimension of the logits holds the classes.",
    ),
    "shard_gradient": (
        ValueError,
        "{name} has no gradient where classes or rows are divided over ranks. Pass {name}.detach().",
    ),
    "shard_transform": (
        RuntimeError,
        "the loss of divided classes has no {transform}: {instead}.",
    ),
    "dtensor_partial": (
        ValueError,
        "{name} must be whole numbers, got a DTensor that is Partial, {given}: each rank has a part of each number. "
        "Call {name}.redistribute(placements=...) with Shard or Replicate first.",
    ),
    "dtensor_placement": (
        ValueError,
        "{name} must be Replicate or Shard on each dimension of the mesh, and the classes Shard on one at most, "
        "got {given}. Call {name}.redistribute(placements=...) first.",
    ),
    "dtensor_mesh": (
        ValueError,
        "all DTensors of a call must be on the same mesh, got {name} on the ranks {given} and others on {expected}. "
        "Pass DTensor.from_local({name}.to_local(), mesh, placements) with the mesh of the others.",
    ),
    "dtensor_option": (
        ValueError,
        "the loss of a DTensor has no {name}. Leave it out.",
    ),
    "overwritten": (
        RuntimeError,
        "these logits were overwritten by their gradient, as inplace_backward=True allows. "
        "Use them before backward(), or pass inplace_backward=False.",
    ),
}


def error(key: str, **given: object) -> Exception:
    """Return the exception for `key` of this table or of the shared one, filled in with `given`."""
    kind, text = (MESSAGES if key in MESSAGES else SHARED_MESSAGES)[key]
    return kind(text.format(**given))


def refuse_script(public: Iterable[Any]) -> None:
    """Make torch.jit.script of our functions and modules, and of what contains them, say what to use instead.

    torch calls the `__prepare_scriptable__` of each function and module that it is about to compile.
    """

    def refuse(*_: object) -> NoReturn:
        raise error("not_traceable", tool="torch.jit.script")

    for each in public:
        if each.__module__.startswith(__package__) and (isfunction(each) or issubclass(each, nn.Module)):
            each.__prepare_scriptable__ = refuse
