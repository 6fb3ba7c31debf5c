"""Real architectures in other hands: generation, adapters, single layers, other people's parameters and hooks."""

import functools

import pytest
import torch
import transformers

import graphfuse
from tests.tiny import HEAD, LAZY_HEAD, assert_close, assert_complete, batch, build, step

BOTH = pytest.mark.parametrize("name", ["llama", "gemma3_text"])
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
    assert_complete(graphfuse.report(compiled), name)


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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft still reads it
@BOTH
def test_trains_adapters_of_all_linear_layers(name, optimize):
    """Low-rank adapters, and what they adapt is frozen; the logits are then a sum of two products."""
    peft = pytest.importorskip("peft")
    linear = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    models = []
    for _ in range(2):
        config = peft.LoraConfig(r=4, target_modules=[*linear, "lm_head"], init_lora_weights=False)
        models.append(peft.get_peft_model(build(name, tie_word_embeddings=False), config))
    model, compiled = models[0], optimize(models[1])
    compiled.load_state_dict(model.state_dict())
    assert_close(step(compiled), step(model))
    report = graphfuse.report(compiled)
    reasons = [site.reason for site in report.refused if site.pattern in HEAD]
    assert reasons == [
        "logits: expected casts, scales, a soft-cap and row slices of a matrix product, got aten.add.Tensor"
    ]
    assert_complete(report, name, refused=HEAD)
