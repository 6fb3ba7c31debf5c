"""Real architectures in other hands: generation, adapters, single layers, other people's parameters and hooks."""

import functools

import pytest
import torch
import transformers

import graphfuse
from graphfuse.kernels import _op
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.patterns import _attention_kernels
from tests.tiny import HEAD, LAZY_HEAD, SLACK, assert_close, assert_complete, batch, build, error, loss_of, step

BOTH = pytest.mark.parametrize("name", ["llama", "gemma3_text"])
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
NEW_TOKENS = 4  # the second of a dynamic cache makes its length a symbol

# Dynamo asks every input of a later graph for its gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def optimize():
    return functools.partial(graphfuse.optimize, inner="eager", strict=True)


def generated(model, **options):
    """The tokens that a padded prompt leads to, and the logits of each step."""
    inputs = {key: value for key, value in batch().items() if key in ("input_ids", "attention_mask")}
    found = model.generate(
        **inputs,
        **options,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, found.logits


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@BOTH
def test_generates(name, cache, optimize):
    """The prompt in one graph, single tokens in the next; as many sites in either."""
    model, compiled = build(name).eval(), optimize(build(name).eval())
    options = {"cache_implementation": cache, "disable_compile": True}
    tokens, logits = generated(model, **options)
    ours, our_logits = generated(compiled, **options)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-5)
    report = graphfuse.report(compiled)
    assert_complete(report, name)
    assert "grouped_attention" in report.counts  # both have fewer heads of keys


@needs_triton
@pytest.mark.parametrize(("name", "cache"), [("llama", "static"), ("gemma3_text", "dynamic")])
def test_generates_with_split_keys(name, cache, optimize, monkeypatch):
    """As on a GPU where nothing can be measured, but for what its kernels run in."""
    monkeypatch.setattr(_op, "launches", lambda *operands: _op.compute_dtype(*operands) == torch.float32)
    monkeypatch.setattr(_attention_kernels, "MANY_KEYS", 1)
    model, compiled = build(name).eval(), optimize(build(name).eval(), patterns=["grouped_attention"])
    options = {"cache_implementation": cache, "disable_compile": True}
    tokens, logits = generated(model, **options)
    ours, our_logits = generated(compiled, **options)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-5)
    sites = graphfuse.report(compiled).rewritten
    assert {site.params["kernel"] for site in sites} == {"split"}


def test_generates_where_transformers_compiles(optimize):
    """What `generate` compiles by itself, given the backend's name."""
    model, compiled = build("llama").eval(), build("llama").eval()
    config = transformers.CompileConfig(backend="graphfuse", mode=None, options={"inner": "aot_eager", "strict": True})
    config._compile_all_devices = True  # else on CUDA only
    tokens, _ = generated(model, cache_implementation="static", disable_compile=True)
    ours, _ = generated(compiled, cache_implementation="static", compile_config=config)
    assert torch.equal(ours, tokens)
    assert_complete(graphfuse.report(compiled), "llama")


@BOTH
def test_trains_layers_that_are_compiled_one_by_one(name, optimize):
    """One graph serves equal layers; what lies outside of them stays as it was."""
    model, compiled = build(name), build(name)
    for layer in compiled.model.layers:
        optimize(layer, fullgraph=True)
    assert_close(step(compiled), step(model))
    assert_complete(graphfuse.report(compiled), name, but={"rms_norm": 1})  # the last norm


@BOTH
def test_trains_other_peoples_parameters(name, optimize):
    """`functional_call`: the parameters are arguments, and the module only says how."""
    model = build(name)
    inputs = batch()

    def loss_of(parameters):
        return torch.func.functional_call(model, parameters, kwargs=inputs).loss

    def gradients(call):
        own = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        loss = call(own)
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in own.items() if p.grad is not None}}

    compiled = optimize(loss_of)
    assert_close(gradients(compiled), gradients(loss_of))
    assert all(p.grad is None for p in model.parameters())
    assert_complete(graphfuse.report(compiled), name, HEAD)


@BOTH
def test_trains_in_several_graphs(name, optimize):
    """A hook that Dynamo cannot trace, in every layer: each graph is rewritten."""

    def untraceable(module, args, output):
        torch._dynamo.graph_break()
        return output

    model, compiled = build(name), build(name)
    for layer in (*model.model.layers, *compiled.model.layers):
        layer.mlp.register_forward_hook(untraceable)
    optimize(compiled)
    assert_close(step(compiled), step(model))
    report = graphfuse.report(compiled)
    assert len({site.graph for site in report.sites}) > 2
    assert_complete(report, name, LAZY_HEAD)


@pytest.fixture
def adapted():
    """Models with adapters on every linear layer, the head included."""
    peft = pytest.importorskip("peft")
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]

    def make(name, dtype=torch.float32, **settings):
        config = peft.LoraConfig(r=4, target_modules=linear, init_lora_weights=False, **settings)
        model = build(name, dtype, tie_word_embeddings=False)
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    return make


adapters = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft still reads it


@adapters
@BOTH
def test_trains_adapters(name, adapted, optimize):
    """The frozen weights get no gradients; the head's logits are the sum of two products."""
    model, compiled = adapted(name), optimize(adapted(name))
    assert_close(step(compiled), step(model))
    assert_complete(graphfuse.report(compiled), name, LAZY_HEAD)
    (head,) = [site for site in graphfuse.report(compiled).rewritten if site.pattern == "linear_cross_entropy"]
    assert head.params["needs"] == "('hidden', 'low_hidden', 'low_weight')"


@adapters
def test_trains_adapters_with_dropout(adapted, optimize):
    model, compiled = adapted("llama", lora_dropout=0.5), optimize(adapted("llama", lora_dropout=0.5))
    results = []
    for each in (compiled.train(), model.train()):
        torch.manual_seed(2)
        results.append(step(each))
    assert_close(*results)
    assert_complete(graphfuse.report(compiled), "llama", LAZY_HEAD)


@adapters
def test_trains_wide_adapters_of_a_narrow_model(adapted, optimize):
    """peft keeps adapters in fp32 beside bf16 weights."""
    truth = step(adapted("qwen3", torch.bfloat16).double())
    ours = adapted("qwen3", torch.bfloat16)
    assert {p.dtype for n, p in ours.named_parameters() if "lora" in n} == {torch.float32}
    compiled = optimize(loss_of(ours))
    eager = error(step(adapted("qwen3", torch.bfloat16)), truth)
    assert error(step(ours, compiled), truth) <= SLACK * eager
    assert_complete(graphfuse.report(compiled), "qwen3", HEAD)


@adapters
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_evaluates_adapters(merged, adapted, optimize):
    model, ours = adapted("llama").eval(), adapted("llama").eval()
    if merged:
        for each in (model, ours):
            each.merge_adapter()
    compiled = optimize(ours)
    with torch.no_grad():
        expected, got = model(**batch()), compiled(**batch())
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.logits + 0, expected.logits, rtol=1e-4, atol=1e-5)
    assert_complete(graphfuse.report(compiled), "llama", LAZY_HEAD)
