"""Real architectures in every mode that people run them in: the same rewrites, the same numbers."""

import functools

import pytest
import torch

import graphfuse
from tests.tiny import HEAD, LAZY_HEAD, SLACK, assert_close, assert_complete, batch, build, error, loss_of, step

BOTH = pytest.mark.parametrize("name", ["llama", "gemma3_text"])


@pytest.fixture
def optimize():
    return functools.partial(graphfuse.optimize, inner="aot_eager", strict=True, fullgraph=True)


@BOTH
def test_trains_in_place_in_one_graph(name, optimize):
    """A whole model, and so a module whose outputs are a dataclass; one graph, as without graphfuse."""
    torch._dynamo.utils.counters.clear()
    model = build(name)
    compiled = optimize(build(name))
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert_close(step(compiled), step(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_complete(graphfuse.report(compiled), name, LAZY_HEAD)


@BOTH
def test_trains_with_tied_embeddings(name, optimize):
    """The head's weight is the embedding's: its gradient has two parts, and both are there."""
    model = build(name, tie_word_embeddings=True)
    compiled = optimize(build(name, tie_word_embeddings=True), inner="eager")
    assert compiled.lm_head.weight is compiled.model.embed_tokens.weight
    assert_close(step(compiled), step(model))
    assert_complete(graphfuse.report(compiled), name, LAZY_HEAD)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_serves(name, mode, optimize):
    model, compiled = build(name).eval(), optimize(build(name).eval(), inner="eager")
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with mode():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert_complete(graphfuse.report(compiled), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BOTH
def test_trains_under_autocast(name, dtype, optimize):
    truth = step(build(name).double())
    ours = build(name)
    compiled = optimize(loss_of(ours), inner="eager")
    with torch.autocast("cpu", dtype):
        eager = error(step(build(name)), truth)
        assert error(step(ours, compiled), truth) <= SLACK * eager
    assert_complete(graphfuse.report(compiled), name, HEAD)


def test_trains_in_bfloat16(optimize):
    truth = step(build("qwen3", torch.bfloat16).double())
    ours = build("qwen3", torch.bfloat16)
    compiled = optimize(loss_of(ours))
    eager = error(step(build("qwen3", torch.bfloat16)), truth)
    assert error(step(ours, compiled), truth) <= SLACK * eager
    assert_complete(graphfuse.report(compiled), "qwen3", HEAD)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@BOTH
def test_trains_with_checkpoints(name, reentrant, optimize):
    """The bodies of the checkpoints are rewritten; what is recomputed is what was computed."""
    models = build(name).train(), build(name).train()
    for model in models:
        # one name in transformers 5.23 and later, the other before
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = optimize(models[1], fullgraph=False)
    assert_close(step(compiled), step(models[0]))
    assert_complete(graphfuse.report(compiled), name, LAZY_HEAD)


@BOTH
def test_trains_at_dynamic_shapes(name, optimize):
    """Every size is a symbol, and so is every eps; one graph serves all lengths."""
    model, compiled = build(name), optimize(build(name), inner="eager", dynamic=True)
    assert_close(step(compiled), step(model))
    torch._dynamo.utils.counters.clear()
    for length in (17, 31):
        inputs = batch(length)
        torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert_complete(graphfuse.report(compiled), name, LAZY_HEAD)


def test_takes_two_optimizer_steps(optimize):
    """Weights that change in place are read anew."""
    losses = []
    for compiled in (False, True):
        model = build("llama")
        call = optimize(loss_of(model)) if compiled else loss_of(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = call(**batch())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)
    assert losses[2] < losses[0]


def test_accumulates_the_sum_over_counted_tokens(optimize):
    """What a Trainer passes: the loss is a sum over a count that comes from outside."""
    model, ours = build("llama"), build("llama")
    count = torch.tensor(46)

    def call(of):
        return lambda **inputs: of(**inputs, num_items_in_batch=count).loss

    compiled = optimize(call(ours))
    assert_close(step(ours, compiled), step(model, call(model)))
    assert_complete(graphfuse.report(compiled), "llama", HEAD)
