"""DTensor weights: plans by hand, and the one that transformers brings."""

import shutil
import tempfile
from pathlib import Path

import transformers
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import graphfuse
from tests.distributed.harness import (
    HANDWRITTEN,
    HEAD,
    LLAMA,
    OPTIONS,
    Handwritten,
    agrees,
    assert_rewritten,
    case,
    llama,
)


def mesh():
    return init_device_mesh("cpu", (2,))


def parallel(model):
    """The usual plan: heads and features of the MLP are shared out."""
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return graphfuse.optimize(parallelize_module(model, mesh(), plan), **OPTIONS)


@case
def tensor_parallel_layers():
    model = llama()
    agrees(model, parallel, tokens="all")
    assert_rewritten(model, LLAMA | HEAD)


@case
def tensor_parallel_head_whose_logits_are_gathered():
    """Its product is one of distributed tensors, which our kernels are not made for."""
    model = Handwritten()
    plan = {"head": ColwiseParallel(output_layouts=Replicate())}
    agrees(model, lambda m: graphfuse.optimize(parallelize_module(m, mesh(), plan), **OPTIONS), tokens="all")
    assert_rewritten(model, HANDWRITTEN)
    (site,) = graphfuse.report(model).refused
    assert site.reason == "logits: expected a matrix product of plain tensors, got a DTensor", site.reason


@case
def tensor_parallel_head_with_loss_parallel():
    def wrap(model):
        plan = {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
        # aot_eager, and so Inductor, fail without us too: they guess the logits' gradient to be distributed.
        return graphfuse.optimize(parallelize_module(model, mesh(), plan), inner="eager", strict=True)

    model = Handwritten()
    with loss_parallel():
        agrees(model, wrap, tokens="all")
    assert_rewritten(model, HANDWRITTEN)
    assert [site.pattern for site in graphfuse.report(model).refused] == ["linear_cross_entropy"]


@case
def sequence_parallel_norms():
    """They work on their share of the tokens, as distributed tensors: not ours."""
    plan = {
        "model.layers.*.norm": SequenceParallel(use_local_output=True),
        "model.layers.*": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=True
        ),
        "model.layers.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "model.layers.*.gate": ColwiseParallel(input_layouts=Shard(1)),
        "model.layers.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "model.embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True),
    }

    def wrap(model):
        return graphfuse.optimize(parallelize_module(model, mesh(), plan), **OPTIONS)

    model = Handwritten()
    model.scale.requires_grad_(requires_grad=False)  # would see the gradient of its share of the tokens
    agrees(model, wrap, tokens="all")
    assert_rewritten(model, {"rms_norm": 1, "glu": 2, **HEAD})
    reasons = [site.reason for site in graphfuse.report(model).refused if site.pattern == "rms_norm"]
    assert [reason.partition(": ")[2] for reason in reasons] == 2 * ["expected a plain tensor, got a DTensor"], reasons


@case
def tp_plan_of_transformers():
    folder = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)
    model = llama()
    if distributed.get_rank() == 0:
        model.save_pretrained(folder[0])
    distributed.barrier()

    def wrap(_):
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder[0], tp_plan="auto", device_mesh=mesh())
        return graphfuse.optimize(loaded.train(), **OPTIONS)

    wrapped = agrees(model, wrap, tokens="all")
    assert_rewritten(wrapped, LLAMA)
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.rmtree(Path(folder[0]))
