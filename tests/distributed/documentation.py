"""The blocks of docs/distributed.md, one after the other, each with a model of its own."""

import re
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import graphfuse
from tests.distributed.harness import TOKENS, WORLD, call, case, llama

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


@case
def documentation_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    rank, names = distributed.get_rank(), {"graphfuse": graphfuse, "torch": torch}
    optimize = partial(graphfuse.optimize, inner="eager", strict=True)
    with mock.patch("graphfuse.api.optimize", optimize), torch._dynamo.config.patch(optimize_ddp=True):
        for block in blocks:
            torch._dynamo.reset()
            names |= {"model": llama(), "mesh": init_device_mesh("cpu", (WORLD,)), "rank": rank}
            names |= {"hidden": torch.randn(6, 8, requires_grad=True), "shard": torch.randn(5, 8, requires_grad=True)}
            names |= {"labels": torch.arange(6)}
            exec(compile(block, PAGE.name, "exec"), names)
            if "vocab_parallel" not in block:
                loss, _ = call(names["model"], TOKENS)
                loss.backward()
                assert graphfuse.report(names["model"]).counts["glu"] == 1, block
