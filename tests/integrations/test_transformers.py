"""The callback compiles the trainer's model once, when it is complete, and keeps it compiled."""

import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import graphfuse
from graphfuse.integrations.transformers import GraphfuseCallback
from graphfuse.lazy import materialised

VOCABULARY = 96
LAYER = {"rms_norm": 3, "rope": 2, "glu": 1}
HEAD = {"linear_cross_entropy": 1, "lazy_logits": 1}


@pytest.fixture(autouse=True)
def quiet():
    """Warnings of the trainer's own are not ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows(count=12):
    tokens = torch.randint(1, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[::3, 9:] = -100  # so that accumulated batches count different numbers of tokens
    return [{"input_ids": row, "labels": target} for row, target in zip(tokens, labels, strict=True)]


def trainer(folder, model, *callbacks, **options):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    arguments = TrainingArguments(**{**arguments, **options})
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


def callback(**options):
    return GraphfuseCallback(inner="eager", strict=True, **options)


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


EVERYTHING = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("adapt", [lambda model: model, lora], ids=["whole", "LoRA"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "bf16, checkpointing, accumulation"])
def test_trains_as_in_eager(tmp_path, adapt, options):
    eager = trainer(tmp_path, adapt(language_model()), **options)
    eager.train()
    materialised.clear()
    made = trainer(tmp_path, adapt(language_model()), callback(), **options)
    made.train()
    assert losses(made) == pytest.approx(losses(eager), rel=2e-3 if options else 1e-5)
    counts = graphfuse.report(made.model).counts
    assert counts.items() >= {**LAYER, **HEAD}.items(), counts
    assert not materialised, materialised


def test_compiles_evaluation_before_training(tmp_path):
    eager, made = trainer(tmp_path, language_model()), trainer(tmp_path, language_model(), callback())
    assert made.evaluate()["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], rel=1e-5)
    assert graphfuse.report(made.model).counts.items() >= LAYER.items()


def test_compiles_a_model_made_for_the_training(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    made = Trainer(None, arguments, train_dataset=rows(), model_init=language_model, callbacks=[callback()])
    made.train()
    assert graphfuse.report(made.model).counts.items() >= {**LAYER, **HEAD}.items()


def test_added_later_compiles_when_training_begins(tmp_path, capsys):
    made = trainer(tmp_path, language_model(), max_steps=1)
    made.add_callback(callback(show_report=True))
    made.train()
    assert "linear_cross_entropy" in capsys.readouterr().out


def test_leaves_a_compiled_model_as_it_is(tmp_path):
    model, counter = language_model(), CompileCounter()
    model.compile(backend=counter)
    trainer(tmp_path, model, callback(), max_steps=1).train()
    assert counter.frame_count > 0
    assert not graphfuse.report(model).sites


def test_warns_of_data_parallel_and_does_not_compile(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    arguments._n_gpu = 2
    model = language_model()
    with pytest.warns(graphfuse.GraphfuseWarning, match="n_gpu: expected 1.*DataParallel.*got 2"):
        callback().on_init_end(arguments, None, None, model=model)
    assert model._compiled_call_impl is None


def test_saves_reloads_and_generates(tmp_path):
    made = trainer(tmp_path, language_model(), callback(), save_strategy="steps", save_steps=3)
    made.train()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    for (name, a), b in zip(again.named_parameters(), made.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    prompt = torch.arange(5)[None] + 3
    texts = [m.eval().generate(prompt, max_new_tokens=4, do_sample=False) for m in (again, made.model)]
    assert torch.equal(*texts)


def test_switching_checkpointing_on_and_off_compiles_nothing_again(tmp_path):
    """TRL does, around every generation; transformers adds a hook to the embeddings each time."""
    model = language_model()
    trainer(tmp_path, model, callback())
    tokens = torch.arange(1, 13)[None]
    for step in range(3):
        model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()


def test_says_what_is_missing():
    code = "import sys; sys.modules['transformers'] = None; import graphfuse.integrations.transformers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: graphfuse.integrations.transformers: expected transformers to be installed" in run.stderr
