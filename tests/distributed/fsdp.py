"""FSDP2: `fully_shard`, layer by layer and the rest."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import graphfuse
from tests.distributed.harness import (
    HANDWRITTEN,
    HEAD,
    LLAMA,
    OPTIONS,
    TOKENS,
    Handwritten,
    agrees,
    assert_rewritten,
    call,
    case,
    llama,
    step,
    whole,
)
from tests.tiny import SLACK, assert_close, error


def shard(model, *parts, **options):
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, *parts, model):
        fully_shard(part, mesh=mesh, **options)
    return model


def optimized(model):
    return graphfuse.optimize(model, **OPTIONS)


@case
def fsdp_of_an_optimized_model():
    model = llama()
    agrees(model, lambda m: shard(optimized(m)))
    assert_rewritten(model, LLAMA | HEAD)


@case
def fsdp_report_names_the_layers():
    """Though FSDP shows the compiler other parameters than the model has afterwards."""
    model = Handwritten()
    agrees(model, lambda m: shard(optimized(m)))
    assert_rewritten(model, HANDWRITTEN | HEAD)
    assert [s.module for s in graphfuse.report(model).rewritten if s.pattern == "glu"] == [
        "model.layers.0",
        "model.layers.1",
    ]
    alone = graphfuse.report(model.model.layers[1])
    assert [site.module for site in alone.rewritten if site.pattern == "glu"] == [""], alone


@case
def optimize_after_fsdp():
    model = Handwritten()
    agrees(model, lambda m: optimized(shard(m, reshard_after_forward=False)))
    assert_rewritten(model, HANDWRITTEN | HEAD)


@case
def compile_around_fsdp():
    model = Handwritten()
    agrees(model, lambda m: torch.compile(shard(m), backend="graphfuse", options=OPTIONS))
    assert_rewritten(model, HANDWRITTEN | HEAD)


@case
def fsdp_that_frees_the_head_after_forward():
    model = Handwritten()
    graphfuse.lazy.tensor.materialised.clear()
    agrees(model, lambda m: shard(optimized(m), reshard_after_forward=True), read=None)
    assert not graphfuse.lazy.tensor.materialised, "FSDP hangs a hook on every output"
    assert_rewritten(model, HANDWRITTEN | HEAD)
    _, logits = call(model, TOKENS[:2])
    with pytest.raises(RuntimeError, match="FSDP reshards after forward"):
        logits.sum()


@case
def fsdp_trains_on_logits_alone():
    """The hook on them then has to bring the weights."""
    model, alone = Handwritten(), Handwritten()
    shard(optimized(model), reshard_after_forward=False)
    rows = slice(2 * distributed.get_rank(), 2 * distributed.get_rank() + 2)
    for each, tokens in ((alone, TOKENS), (model, TOKENS[rows])):
        _, logits = call(each, tokens)
        logits.float().square().mean().backward()
    found, expected = ({n: whole(p.grad) for n, p in each.named_parameters()} for each in (model, alone))
    assert_close(found, expected)


@case
def fsdp_with_a_group_for_the_head():
    """The head then runs outside the graph: nothing to fuse, and nothing breaks."""
    model = Handwritten()
    agrees(model, lambda m: shard(optimized(m), m.head))
    assert_rewritten(model, HANDWRITTEN)
    (site,) = graphfuse.report(model).refused
    assert site.reason == "logits: expected a matrix product in the same graph, got an input of the graph"


@case
def fsdp_in_mixed_precision():
    """As far from the truth as FSDP is without us."""
    truth = step(Handwritten(), TOKENS, read="before")
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    errors = []
    for prepared in (Handwritten(), optimized(Handwritten())):
        found = step(shard(prepared, mp_policy=halves), TOKENS, read="before")
        errors.append(error(found, truth))
    assert errors[1] <= SLACK * errors[0], errors
    assert_rewritten(prepared, HANDWRITTEN | HEAD)


@case
def fsdp_of_layers_optimized_one_by_one():
    def wrap(model):
        for layer in model.model.layers:
            optimized(layer)
        return shard(model)

    model = Handwritten()
    agrees(model, wrap)
    assert_rewritten(model, {"rms_norm": 2, "glu": 2})
