"""A callback for transformers' `Trainer`, and for the trainers of TRL and others that are built on it.

    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[GraphfuseCallback()])

The model is compiled in place when the trainer has been made: after the trainer has loaded it, given it an adapter or a
fused head, and before `accelerate` wraps it. So evaluation before training is compiled too, and checkpoints keep their
names.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from graphfuse.api import optimize, report
from graphfuse.errors import GraphfuseWarning

try:
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"graphfuse.integrations.transformers: expected transformers to be installed, got: {error}"
    ) from error


class GraphfuseCallback(TrainerCallback):
    """Compiles the model of a `Trainer` with graphfuse.

    A model that is compiled already, by `graphfuse.optimize` or `model.compile`, is left as it is. So is one that the
    trainer is going to wrap in `torch.nn.DataParallel`, with a warning: its replicas would all call the compiled
    original.

    Args:
        show_report: print the report when training ends.
        options: see `graphfuse.optimize`.
    """

    def __init__(self, *, show_report: bool = False, **options: Any) -> None:
        self.show_report = show_report
        self.options = options

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """The trainer is made: compile its model, unless it makes one for each trial (`model_init`)."""
        self._compile(args, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Compile a model that came later, or came before this callback (`Trainer.add_callback`)."""
        self._compile(args, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Print the report, if asked."""
        if self.show_report and model is not None and state.is_world_process_zero:
            print(report(model))

    def _compile(self, args: TrainingArguments, model: nn.Module | None) -> None:
        if model is None or model._compiled_call_impl is not None:
            return
        if args.n_gpu > 1:
            warnings.warn(
                "graphfuse: n_gpu: expected 1, as the replicas of torch.nn.DataParallel run uncompiled, got"
                f" {args.n_gpu}; the model is not compiled. Start with torchrun or accelerate launch, or"
                " set CUDA_VISIBLE_DEVICES to one GPU.",
                GraphfuseWarning,
                stacklevel=2,
            )
            return
        _keep_one_hook(model)
        optimize(model, **self.options)


def _keep_one_hook(model: nn.Module) -> None:
    """Have `enable_input_require_grads` replace its hooks on the embeddings, and have them say nothing to Dynamo.

    With activation checkpointing, transformers calls it every time checkpointing is switched on, and does not take the
    hooks off again. TRL switches checkpointing off and on around every generation and every pass of a reference: one
    more hook each step, one more compilation each step, and after eight of them Dynamo gives up and runs eager.

    Under LoRA, what the hooks do breaks the graph, and puts the loss into another one than `lm_head`. Compiled
    checkpoints need no input that requires a gradient.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.enable_input_require_grads = functools.partial(_enable_input_require_grads, module)


def _enable_input_require_grads(module: PreTrainedModel) -> None:
    module.disable_input_require_grads()
    type(module).enable_input_require_grads(module)
    for handle in module._require_grads_hooks:
        handle.hooks_dict_ref()[handle.id] = _require_grad


def _require_grad(module: nn.Module, arguments: Any, output: Tensor) -> None:
    if not torch.compiler.is_compiling():
        output.requires_grad_(True)
