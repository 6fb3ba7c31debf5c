"""accelerate and TrainingArguments take graphfuse by name, once they are told to."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import graphfuse
import graphfuse.backend
import graphfuse.integrations.accelerate


@pytest.fixture(autouse=True)
def closed():
    """accelerate's list of names as it comes, before and after; warnings of its own are not ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    if "_missing_" in vars(DynamoBackend):
        del DynamoBackend._missing_


@pytest.fixture
def quick(monkeypatch):
    """No options travel with the name: have the rewritten graphs run as they are."""
    compile_inner = graphfuse.backend.compile_inner
    monkeypatch.setattr(
        graphfuse.backend,
        "compile_inner",
        lambda graph, inputs, config: compile_inner(graph, inputs, dataclasses.replace(config, inner="eager")),
    )


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    return LlamaForCausalLM(config)


def test_refuses_the_name_without(tmp_path):
    """Should accelerate ever take it by itself, `enable` can go."""
    with pytest.raises(ValueError, match="GRAPHFUSE"):
        TorchDynamoPlugin(backend="graphfuse")


def test_name_is_a_member_like_the_others():
    graphfuse.integrations.accelerate.enable()
    graphfuse.integrations.accelerate.enable()
    member = DynamoBackend("GRAPHFUSE")
    assert (member.name, member.value, isinstance(member, str)) == ("GRAPHFUSE", "GRAPHFUSE", True)
    assert member is copy.deepcopy(member) is pickle.loads(pickle.dumps(member))
    assert TorchDynamoPlugin(backend="graphfuse").to_dict()["backend"] == "graphfuse"
    with pytest.raises(ValueError, match="SOMETHING"):
        DynamoBackend("SOMETHING")


def test_training_arguments_take_the_name(tmp_path, quick):
    model = language_model()
    row = torch.arange(1, 13)
    data = [{"input_ids": row, "labels": row}] * 4
    rest = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "output_dir": tmp_path}

    graphfuse.integrations.accelerate.enable()
    arguments = TrainingArguments(torch_compile=True, torch_compile_backend="graphfuse", **rest)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert graphfuse.report(model).counts.items() >= {"linear_cross_entropy": 1, "rms_norm": 3}.items()


def test_accelerator_takes_the_name(quick):
    graphfuse.integrations.accelerate.enable()
    model = Accelerator(cpu=True, dynamo_backend="graphfuse").prepare(language_model())
    tokens = torch.arange(1, 13)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert graphfuse.report(model).counts.items() >= {"linear_cross_entropy": 1, "rms_norm": 3}.items()
