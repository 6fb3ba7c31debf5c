"""Real architectures whose attention is written by hand (`attn_implementation="eager"`): rewritten, or refused."""

import copy

import pytest
import torch
import transformers

import graphfuse
from tests.test_architectures import BASE, MOE

GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
DRY = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
BERT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "pad_token_id": 0}
CAP = "scores: expected scales and masks of a product, got aten.tanh.default"
SINK = "scores: expected scales and masks of a product, got aten.cat.default"
RETURNED = "weights: expected no use besides the product with the values, got an output of the graph"
PADDING = "mask: expected the lower triangle, got another one even where nothing is padded"

DROPPED, LOOKED = "mask of 24 positions dropped, ", "mask looked at on every call, "
# name -> (config, model, its own settings, what is said of every layer, and that of a padded batch)
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", BASE, DROPPED + "grouped, ", LOOKED + "grouped, "),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**BASE, "head_dim": 16}, DROPPED + "grouped, ", LOOKED + "grouped, "),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2, DROPPED, LOOKED),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**BASE, **DRY}, DROPPED, LOOKED),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT2, DROPPED + "grouped, ", LOOKED + "grouped, "),
    "bert": ("BertConfig", "BertForMaskedLM", {**BASE, **BERT}, "no mask, ", PADDING),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**BASE, "head_dim": 16}, CAP, CAP),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**BASE, "num_experts_per_tok": MOE["num_experts_per_tok"], "num_local_experts": 4, "head_dim": 16}
        | {"rope_parameters": {"rope_theta": 1e4}},
        SINK,
        SINK,
    ),
}


def build(name, dtype=torch.float32):
    config, model, own, *_ = ARCHITECTURES[name]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**own, attn_implementation="eager")
    return getattr(transformers, model)(settings).to(dtype).train()


def step(model, call=None, **inputs):
    model.zero_grad()
    loss = (call or (lambda **kwargs: model(**kwargs).loss))(**inputs)
    loss.backward()
    return loss.item(), {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def batch(*, is_padded):
    tokens = torch.randint(3, 300, (2, 24))
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    return {"input_ids": tokens, "labels": tokens.masked_fill(mask == 0, -100)} | (
        {"attention_mask": mask} if is_padded else {}
    )


def attentions(compiled):
    return [s.variant or s.reason for s in graphfuse.report(compiled).sites if s.pattern == "attention"]


@pytest.mark.parametrize(
    ("name", "is_padded"), [*((name, False) for name in ARCHITECTURES), ("llama", True), ("gpt2", True), ("bert", True)]
)
def test_changes_nothing_but_the_memory(name, is_padded):
    model, inputs = build(name), batch(is_padded=is_padded)
    expected, gradients = step(model, **inputs)
    compiled = graphfuse.optimize(lambda **kwargs: model(**kwargs).loss, inner="aot_eager", strict=True)
    loss, ours = step(model, compiled, **inputs)
    wanted = ARCHITECTURES[name][4 if is_padded else 3]
    found = attentions(compiled)
    assert len(found) == 2
    assert {text if "expected" in text else text.removesuffix("float32") for text in found} == {wanted}
    assert loss == pytest.approx(expected, rel=1e-5)
    largest = max(g.norm() for g in gradients.values())
    for parameter, gradient in gradients.items():
        # a parameter whose gradient is rounding noise (a bias of keys) is compared with the others
        assert (ours[parameter] - gradient).norm() <= 2e-5 * max(gradient.norm(), 1e-3 * largest), parameter


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_is_as_near_to_float64_as_eager_in_bfloat16(name):
    model, inputs = build(name, torch.bfloat16), batch(is_padded=False)
    truth, true_gradients = step(copy.deepcopy(model).double(), **inputs)
    eager, eager_gradients = step(model, **inputs)
    compiled = graphfuse.optimize(lambda **kwargs: model(**kwargs).loss, inner="aot_eager", strict=True)
    loss, gradients = step(model, compiled, **inputs)
    assert len(attentions(compiled)) == 2
    assert abs(loss - truth) <= 1.1 * abs(eager - truth) + 1e-4 * truth

    def error(found):  # over all parameters
        return sum((found[n] - g).square().sum() for n, g in true_gradients.items()).sqrt()

    assert error(gradients) <= 1.1 * error(eager_gradients)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's, about a graph break of transformers
def test_leaves_attention_whose_weights_are_returned():
    model, inputs = build("llama"), batch(is_padded=False)

    def with_weights(**kwargs):
        outputs = model(**kwargs, output_attentions=True)
        return outputs.loss + outputs.attentions[0].square().mean()

    compiled = graphfuse.optimize(with_weights, inner="aot_eager", strict=True)
    assert step(model, compiled, **inputs)[0] == pytest.approx(step(model, with_weights, **inputs)[0], rel=1e-5)
    assert set(attentions(compiled)) == {RETURNED}
