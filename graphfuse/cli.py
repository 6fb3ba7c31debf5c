"""The command line: `graphfuse inspect` and `graphfuse bench`."""

from __future__ import annotations

import enum
import importlib
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _Benchmarks(TyperGroup):
    """Commands of which each is the `main` of a module, imported when it is called: that takes seconds."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return ["head", "kernels", "matching", "model"]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name not in self.list_commands(ctx):
            return None
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        command.command(cmd_name)(importlib.import_module(f"graphfuse.bench.{cmd_name}").main)
        return typer.main.get_command(command)


app = typer.Typer(
    help="Rewrite PyTorch model graphs to hand-written Triton kernels, and see what was rewritten.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    cls=_Benchmarks, help="Measure on this machine, side by side with the alternatives.", no_args_is_help=True
)
app.add_typer(bench, name="bench")


class Dtype(enum.StrEnum):
    """Of the weights of an inspected model."""

    bfloat16 = enum.auto()
    float16 = enum.auto()
    float32 = enum.auto()


@app.command("inspect")
def inspect_model(
    factory: Annotated[str | None, typer.Argument(help="package.module:function that returns the model.")] = None,
    model_type: Annotated[str | None, typer.Option(help="A model type of transformers, such as qwen3.")] = None,
    config: Annotated[Path | None, typer.Option(help="A Hugging Face config.json, or its folder.")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence; 2048 or all it has.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a batch.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.bfloat16,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report as data.")] = None,
    details: Annotated[bool, typer.Option("--details", help="Print all that is known of each site.")] = False,
) -> None:
    """Show what graphfuse would rewrite in a model's training step: without weights, a GPU or a step."""
    given = [name for name in (factory, model_type, config) if name is not None]
    if len(given) != 1:
        typer.echo(f"graphfuse: expected one of FACTORY, --model-type and --config, got {len(given)}", err=True)
        raise typer.Exit(2)

    import os

    os.environ.setdefault("GRAPHFUSE_LOG", "off")  # the report is the output
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # and an error is one line

    # Importing torch's compiler takes seconds, which --help does not need.
    from graphfuse import inspect

    try:
        if factory is not None:
            report = inspect.of_factory(factory, batch, seq, dtype)
        elif model_type is not None:
            report = inspect.of_type(model_type, batch, seq, dtype)
        else:
            assert config is not None, "config: expected the one that is left"
            report = inspect.of_config(config, batch, seq, dtype)
        if html is not None:
            report.to_html(html)
        if json is not None:
            report.to_json(json)
    except (inspect.InspectError, OSError) as error:
        typer.echo(f"graphfuse: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(report.to_text(details=details))
