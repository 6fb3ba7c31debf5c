"""Transformers' Trainer over a model that was optimized in place: the same numbers, and logits only where they are
read."""

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import graphfuse
from graphfuse.lazy import materialised

VOCABULARY, LENGTH = 96, 12


class Texts(torch.utils.data.Dataset):
    def __init__(self, count=16):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        mask, labels = torch.ones_like(tokens), tokens.clone()
        if index % 3 == 0:
            mask[-4:], labels[-4:] = 0, -100
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def model():
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


def trainer(folder, optimized, **options):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "seed": 0,
    }
    called = {
        name: options.pop(name) for name in ("compute_metrics", "preprocess_logits_for_metrics") if name in options
    }
    made = model()
    if optimized:
        graphfuse.optimize(made, inner="aot_eager", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(
            made,
            TrainingArguments(**{**arguments, **options}),
            train_dataset=Texts(),
            eval_dataset=Texts(8),
            **called,
        )


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.fixture
def quiet(recwarn):
    """Warnings of the trainer's own are not ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trains_as_without(tmp_path, options, quiet):
    made = [trainer(tmp_path, optimized, **options) for optimized in (False, True)]
    materialised.clear()
    for each in made:
        each.train()
    tolerance = 2e-3 if options.get("bf16") else 1e-5
    assert losses(made[1]) == pytest.approx(losses(made[0]), rel=tolerance)
    if not options.get("bf16"):
        for (name, a), b in zip(made[0].model.named_parameters(), made[1].model.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)
    counts = graphfuse.report(made[1].model).counts
    if "label_smoothing_factor" not in options:  # the trainer's own loss, outside the model
        assert counts["linear_cross_entropy"] == 1
    assert counts["causal_attention"] == 1
    assert not materialised, materialised


def accuracy(evaluated):
    predicted, labels = evaluated.predictions, evaluated.label_ids
    predicted = predicted.argmax(-1) if predicted.ndim == 3 else predicted
    return {"accuracy": float((predicted[:, :-1] == labels[:, 1:]).mean())}


@pytest.mark.parametrize("inside", [False, True], ids=["logits gathered", "argmax"])
def test_evaluates_and_predicts_as_without(tmp_path, inside, quiet):
    options = {"compute_metrics": accuracy}
    if inside:
        options["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
    made = [trainer(tmp_path, optimized, **options) for optimized in (False, True)]
    for each in made:
        each.train()
    metrics = [each.evaluate() for each in made]
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-4)
    assert metrics[1]["eval_accuracy"] == pytest.approx(metrics[0]["eval_accuracy"], abs=0.03)
    predictions = [each.predict(Texts(4)).predictions for each in made]
    assert predictions[1].shape == predictions[0].shape
    if not inside:
        torch.testing.assert_close(*(torch.from_numpy(p) for p in predictions), rtol=1e-3, atol=1e-3)


def test_saves_and_resumes(tmp_path, quiet):
    made = [trainer(tmp_path / str(k), k == 1, save_strategy="steps", save_steps=2, max_steps=4) for k in (0, 1)]
    for each in made:
        each.train()
    again = trainer(tmp_path / "1", True, save_strategy="no", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-2"))
    assert losses(again)[-1] == pytest.approx(losses(made[0])[-1], rel=1e-4)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "1" / "checkpoint-4")
    for a, b in zip(saved.parameters(), made[1].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_generates_after_training(tmp_path, quiet):
    made = [trainer(tmp_path, optimized) for optimized in (False, True)]
    prompt = torch.arange(5)[None] + 3
    texts = []
    for each in made:
        each.train()
        texts.append(each.model.eval().generate(prompt, max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)
