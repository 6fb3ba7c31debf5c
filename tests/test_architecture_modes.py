"""Real architectures in every mode that people run them in: the same rewrites, the same numbers."""

import functools
import math

import pytest
import torch
import transformers

import graphfuse

TOLERANCE = 1e-5  # fp32, relative to the largest element: the same sums in another order
SLACK = 1.1  # error over eager's
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type -> (class, its own settings, what must be rewritten)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", {}, {"rms_norm": 5, "rope": 4, "glu": 2}),
    "qwen3": ("Qwen3ForCausalLM", {}, {"rms_norm": 9, "rope": 4, "glu": 2}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        {"rms_norm": 13, "rope": 4, "glu": 2},
    ),
}
HEAD = {"linear_cross_entropy": 1}


def build(name, dtype=torch.float32):
    """A model of its own, with the same random weights every time."""
    cls, own, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(transformers.CONFIG_MAPPING[name](**TINY, **own))
    with torch.no_grad():
        for parameter in model.parameters():  # norms that start at 0 or 1 would hide a lost weight
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model.to(dtype)


def batch(length=24):
    """Padded on the left, with labels that do not count."""
    ids = torch.randint(3, 320, (2, length), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = -100
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def step(model, call=None):
    """The loss of one batch, and the gradient of every parameter."""
    loss = (call or loss_of(model))(**batch())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def loss_of(model):
    return lambda **inputs: model(**inputs).loss


def assert_close(ours, eager):
    assert ours.keys() == eager.keys()
    for name, expected in eager.items():
        scale = float(expected.abs().amax())
        torch.testing.assert_close(ours[name], expected, rtol=TOLERANCE, atol=TOLERANCE * scale, msg=name)


def error(results, truth):
    """Root mean square of the relative errors of all tensors."""
    relative = [float((results[n].double() - t).norm() / t.norm().clamp_min(1e-30)) for n, t in truth.items()]
    return math.sqrt(sum(e * e for e in relative) / len(relative))


def counts(report):
    """What was rewritten; whether there is a mask to drop depends on the version of transformers."""
    return {name: count for name, count in report.counts.items() if name != "causal_attention"}


def layers(report):
    """What was rewritten besides the head."""
    return {name: count for name, count in counts(report).items() if name not in (*HEAD, "lazy_logits")}


@pytest.fixture
def optimize():
    return functools.partial(graphfuse.optimize, inner="aot_eager", strict=True, fullgraph=True)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_trains_in_place_in_one_graph(name, optimize):
    """A whole model, and so a module whose outputs are a dataclass; one graph, as without graphfuse."""
    torch._dynamo.utils.counters.clear()
    model = build(name)
    compiled = optimize(build(name))
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert_close(step(compiled), step(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    report = graphfuse.report(compiled)
    assert counts(report) == {**ARCHITECTURES[name][2], **HEAD, "lazy_logits": 1}, report


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_serves(name, mode, optimize):
    model, compiled = build(name).eval(), optimize(build(name).eval())
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with mode():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert layers(graphfuse.report(compiled)) == ARCHITECTURES[name][2], graphfuse.report(compiled)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_trains_under_autocast(name, optimize):
    truth = step(build(name).double())
    ours = build(name)
    compiled = optimize(loss_of(ours))
    with torch.autocast("cpu", torch.bfloat16):
        eager = error(step(build(name)), truth)
        assert error(step(ours, compiled), truth) <= SLACK * eager
    report = graphfuse.report(compiled)
    assert counts(report) == {**ARCHITECTURES[name][2], **HEAD}, report


def test_trains_in_bfloat16(optimize):
    truth = step(build("qwen3", torch.bfloat16).double())
    ours = build("qwen3", torch.bfloat16)
    compiled = optimize(loss_of(ours))
    eager = error(step(build("qwen3", torch.bfloat16)), truth)
    assert error(step(ours, compiled), truth) <= SLACK * eager
    assert counts(graphfuse.report(compiled)) == {**ARCHITECTURES["qwen3"][2], **HEAD}


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
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
    assert layers(graphfuse.report(compiled)) == ARCHITECTURES[name][2], graphfuse.report(compiled)


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
    assert counts(graphfuse.report(compiled)) == {**ARCHITECTURES["llama"][2], **HEAD}
