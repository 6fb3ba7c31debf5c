"""What the trainer examples share: a small random Llama, a byte tokenizer, pieces of a book, and `compare`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _memory import Peak
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import graphfuse
from graphfuse.lazy import materialised

TEXT = Path(__file__).parent / "data" / "alice.txt"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Size:
    """How much is trained. Every field is an option of every example."""

    steps: int = 4
    batch: int = 2
    length: int = 64  # tokens, and a token is a byte
    vocabulary: int = 320
    hidden: int = 64
    layers: int = 2


Train = Callable[..., tuple[nn.Module, list[float]]]  # (size, **options of optimize) -> the model, the losses


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; nothing to download."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def language_model(size: Size, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def passages(size: Size, length: int) -> list[str]:
    """Consecutive pieces of the book, one for each row of every step."""
    text = TEXT.read_text()[5000:]
    return [text[i * length : (i + 1) * length] for i in range(size.steps * size.batch)]


def rows(size: Size) -> list[dict[str, Tensor]]:
    """The same as token ids, with labels."""
    tokens = [torch.tensor(list(text.encode())) for text in passages(size, size.length)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def settings(size: Size) -> dict[str, Any]:
    """What the trainers of transformers and TRL are told here."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": size.steps,
        "per_device_train_batch_size": size.batch,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": DEVICE == "cuda",
    }


def logged(trainer: Any) -> list[float]:
    """The losses that a trainer of transformers or TRL has logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compare(train: Train) -> None:
    """Train in eager and with graphfuse, from the same start, and print losses, memory, and what was rewritten."""
    parser = argparse.ArgumentParser()
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--inner", default="inductor", help="what compiles the rewritten graphs")
    parser.add_argument("--memory", action="store_true", help="measure the last step's, with Inductor alone as well")
    options = vars(parser.parse_known_args()[0])
    inner, memory = options.pop("inner"), options.pop("memory")
    size = Size(**options)

    ways: dict[str, dict[str, Any]] = {"eager": {}, "graphfuse": {}}
    if memory:
        ways |= {"Inductor": {"patterns": (), "lazy_logits": False, "memory": "speed"}}
    lines = []
    for name, way in ways.items():
        torch._dynamo.reset()
        torch.compiler.set_stance("force_eager" if name == "eager" else "default")
        with last_step(size.steps if memory else 0) as peak:
            model, losses = train(size, inner=inner, **way)
        line = f"{name:>9}  loss {' '.join(f'{loss:.5f}' for loss in losses)}"
        lines.append(line + (f"  {peak.bytes / 2**20:8.1f} MiB" if memory else ""))
        if name == "graphfuse":
            report = graphfuse.report(model)
            lines.append(f"           {report.totals()}; logits computed {sum(materialised.values())} times")
    print("\n".join(lines))


@contextmanager
def last_step(number: int) -> Iterator[Peak]:
    """Measure the memory of one optimizer step's forward, backward and update, whoever runs it; 0 measures none."""
    peak, done = Peak(), 0

    def stepped(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == number - 1:
            peak.__enter__()
        elif done == number:
            peak.__exit__(None, None, None)

    hook = register_optimizer_step_post_hook(stepped)
    try:
        yield peak
    finally:
        hook.remove()
