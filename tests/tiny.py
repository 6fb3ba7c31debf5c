"""Tiny, random models of real architectures, and what a step of one must agree with."""

import math

import torch
import transformers

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
# model type -> (class, its own settings, what must be rewritten besides the head)
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
LAZY_HEAD = {**HEAD, "lazy_logits": 1}


def build(name, dtype=torch.float32, **settings):
    """A model of its own, with the same random weights every time."""
    cls, own, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(transformers.CONFIG_MAPPING[name](**TINY, **own, **settings))
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


def loss_of(model):
    return lambda **inputs: model(**inputs).loss


def step(model, call=None):
    """The loss of one batch, and the gradient of every parameter that has one."""
    loss = (call or loss_of(model))(**batch())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_close(ours, eager):
    assert ours.keys() == eager.keys()
    for name, expected in eager.items():
        scale = float(expected.abs().amax())
        torch.testing.assert_close(ours[name], expected, rtol=TOLERANCE, atol=TOLERANCE * scale, msg=name)


def error(results, truth):
    """Root mean square of the relative errors of all tensors."""
    relative = [float((results[n].double() - t).norm() / t.norm().clamp_min(1e-30)) for n, t in truth.items()]
    return math.sqrt(sum(e * e for e in relative) / len(relative))


def assert_complete(report, name, head=None, *, but=None, refused=()):
    """Every site of the architecture is rewritten, and `head`, less what `but` leaves out; no others are refused.

    Whether there is a causal mask to drop depends on the version of transformers and on the batch, and whether queries
    come one by one on what the model is used for.
    """
    expected = {**ARCHITECTURES[name][2], **(head or {})}
    for pattern, count in (but or {}).items():
        expected[pattern] -= count
    depends = {"causal_attention", "grouped_attention"}
    counts = {pattern: count for pattern, count in report.counts.items() if pattern not in depends}
    assert counts == expected, report
    assert {site.pattern for site in report.refused} <= {"causal_attention", *refused}, report
