"""The vocab-parallel loss of lsce_torch in a script that torchrun starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# As users write it. The classes do not divide evenly.
SCRIPT = """
import os
import signal
import sys

import torch
import torch.distributed as dist

import lsce_torch

dist.init_process_group("gloo")
rank, number = dist.get_rank(), dist.get_world_size()
if sys.argv[1] == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
torch.manual_seed(0)
logits, labels = torch.randn(6, 11), torch.tensor([0, 10, 5, 3, 7, -100])
mine = logits.tensor_split(number, dim=1)[rank].clone().requires_grad_()
options = {"smoothing": 0.1, "ignore_index": -100, "reduction": "mean"}
loss = lsce_torch.vocab_parallel_label_smoothed_cross_entropy(mine, labels, **options)
loss.backward()
whole = logits.clone().requires_grad_()
of_one = lsce_torch.label_smoothed_cross_entropy(whole, labels, **options)
of_one.backward()
torch.testing.assert_close(loss, of_one)
torch.testing.assert_close(mine.grad, whole.grad.tensor_split(number, dim=1)[rank])
print(f"rank {rank} of {number} agrees", flush=True)
dist.destroy_process_group()
"""


def under_torchrun(number: int, how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Return the outcome of the script in so many processes."""
    (folder / "script.py").write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*start, str(folder / "script.py"), how]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


@pytest.mark.parametrize("number", [2, *(pytest.param(number, marks=pytest.mark.distributed) for number in (3, 4))])
def test_torchrun(number: int, tmp_path: Path) -> None:
    outcome = under_torchrun(number, "whole", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert sorted(re.findall(r"rank \d of \d agrees", outcome.stdout)) == [
        f"rank {i} of {number} agrees" for i in range(number)
    ]


@pytest.mark.distributed
def test_torchrun_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    outcome = under_torchrun(3, "killed", tmp_path)
    assert outcome.returncode != 0
    assert "agrees" not in outcome.stdout
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", outcome.stderr), outcome.stderr
