"""The command line: `graphfuse inspect` and `graphfuse bench`."""

from __future__ import annotations

import typer

from graphfuse.bench import head, matching, model

app = typer.Typer(
    help="Rewrite PyTorch model graphs to hand-written Triton kernels, and see what was rewritten.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure on this machine, side by side with the alternatives.", no_args_is_help=True)
bench.command("head")(head.main)
bench.command("matching")(matching.main)
bench.command("model")(model.main)
app.add_typer(bench, name="bench")


@app.callback()
def main() -> None:
    """Say that `bench` is a command among others, even while it is the only one."""
