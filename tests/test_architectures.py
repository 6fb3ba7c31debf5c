"""Real architectures, tiny and random: everything is found, nothing changes but the speed."""

import copy

import pytest
import torch
import transformers

import graphfuse

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}

# name -> (config, model, its own settings, what must be rewritten)
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, {"rms_norm": 5, "rope": 4, "glu": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}, {"rms_norm": 9, "rope": 4, "glu": 2}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 16}, {"rms_norm": 13, "rope": 4, "glu": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 16}, {"rms_norm": 5, "rope": 4, "glu": 2}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}, {"rms_norm": 5, "rope": 4, "glu": 2}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}, {"rms_norm": 9, "rope": 4, "glu": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**MOE, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
        | {"first_k_dense_replace": 1},
        {"rms_norm": 9, "rope": 4, "glu": 3},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 16, "rope_parameters": {"rope_theta": 1e4}},
        {"rms_norm": 5, "rope": 4, "glu": 2},
    ),
}


def build(name, dtype=torch.float32):
    config, model, own, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**{**BASE, **own})).to(dtype).train()


def step(model, call, tokens):
    model.zero_grad()
    loss = call(tokens)
    loss.backward()
    return loss.item(), {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def counts(report):
    """What was rewritten; whether there is a mask to drop depends on the version of transformers."""
    return {name: count for name, count in report.counts.items() if name != "causal_attention"}


def loss_of(model):
    return lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss


@pytest.fixture
def tokens():
    return torch.randint(3, 300, (2, 24))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_everything_and_changes_nothing(name, tokens):
    model = build(name)
    expected, gradients = step(model, loss_of(model), tokens)
    compiled = graphfuse.optimize(loss_of(model), inner="aot_eager", fullgraph=True, strict=True)
    loss, ours = step(model, compiled, tokens)
    assert counts(graphfuse.report(compiled)) == {**ARCHITECTURES[name][3], "linear_cross_entropy": 1}
    assert loss == pytest.approx(expected, rel=1e-5)
    largest = max(g.norm() for g in gradients.values())
    assert ours.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        # a parameter whose gradient is rounding noise is compared with the others
        assert (ours[parameter] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * largest), parameter


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2"])
def test_is_as_near_to_float64_as_eager_in_bfloat16(name, tokens):
    model = build(name, torch.bfloat16)
    truth, true_gradients = step(exact := copy.deepcopy(model).double(), loss_of(exact), tokens)
    eager, eager_gradients = step(model, loss_of(model), tokens)
    compiled = graphfuse.optimize(loss_of(model), inner="aot_eager", fullgraph=True, strict=True)
    loss, gradients = step(model, compiled, tokens)
    assert counts(graphfuse.report(compiled)) == {**ARCHITECTURES[name][3], "linear_cross_entropy": 1}
    assert abs(loss - truth) <= 1.1 * abs(eager - truth) + 1e-4 * truth

    def error(found):  # over all parameters
        return sum((found[n] - g).square().sum() for n, g in true_gradients.items()).sqrt()

    assert error(gradients) <= 1.1 * error(eager_gradients)


def test_leaves_logits_that_are_returned(tokens):
    model = build("llama")
    expected = model(input_ids=tokens, labels=tokens, use_cache=False)
    graphfuse.optimize(model, inner="aot_eager", fullgraph=True, strict=True, lazy_logits=False)
    outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
    torch.testing.assert_close(outputs.logits, expected.logits)
    report = graphfuse.report(model)
    assert counts(report) == ARCHITECTURES["llama"][3]
    assert [site.reason for site in report.refused if site.pattern == "linear_cross_entropy"] == [
        "logits: expected no use besides the loss, got an output of the graph"
    ]
    assert {site.module for site in report.rewritten if site.pattern == "glu"} == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    }


def test_keeps_the_sequence_dynamic():
    model = build("qwen3")
    compiled = graphfuse.optimize(loss_of(model), inner="aot_eager", dynamic=True, strict=True)
    for length in (24, 31):
        tokens = torch.randint(3, 300, (2, length))
        assert compiled(tokens).item() == pytest.approx(loss_of(model)(tokens).item(), rel=1e-5)
    assert counts(graphfuse.report(compiled)) == {**ARCHITECTURES["qwen3"][3], "linear_cross_entropy": 1}
