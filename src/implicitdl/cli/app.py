"""The commands. Each imports its work when it is called, so that a command loads only what it needs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer

from .options import CertifyOptions, Options, SimOptions, with_options

# BadParameter < UsageError < ClickException, of the copy of click that this version of typer uses.
UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Implicit deep learning: x = φ(Ax + Bu), y = Cx + Du.",
)
Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder that `implicitdl train` or `implicitdl sim` wrote.")]
Root = Annotated[str | None, typer.Option(help="Folder of the data sets, if it is no longer that of the run.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cpu or cuda:0.", rich_help_panel="Run")]
Threads = Annotated[int | None, typer.Option(help="Number of PyTorch's threads on the CPU.", rich_help_panel="Run")]
Out = Annotated[
    str | None, typer.Option(help="Folder of the run. Default: a new one under runs/.", rich_help_panel="Run")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out with its options.", rich_help_panel="Run")
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"implicitdl {version('implicitdl')}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
@with_options(Options)
def train(
    ctx: typer.Context,
    out: Out = None,
    resume: Resume = False,
    device: Device = None,
    threads: Threads = None,
    **fields: Any,
) -> None:
    """Train a model, keep the best epoch on held-out training data, and test that one."""
    sources = {name: ctx.get_parameter_source(name) for name in fields}
    given = {name: fields[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    from . import train as work

    work.run(Options(**fields), given, out=out, resume=resume, device=device, threads=threads)


@app.command()
def evaluate(run: Run, root: Root = None, device: Device = None) -> None:
    """Test the best checkpoint of a run, or the model that `sim` found."""
    from . import evaluate as work

    work.run(run, root, device)


@app.command()
def plot(run: Run, root: Root = None) -> None:
    """Draw a run into RUN/plots: training curves, residual histories, the spy plot, the spectrum of A."""
    from . import plot as work

    work.run(run, root)


@app.command()
@with_options(CertifyOptions)
def certify(run: Run, root: Root = None, device: Device = None, **fields: Any) -> None:
    """Prove properties of a run's best checkpoint: well-posedness, Lipschitz constants, robust accuracy."""
    from . import certify as work

    work.run(run, CertifyOptions(**fields).check(), root, device)


@app.command()
def info(run: Run) -> None:
    """Print sizes, norms and sparsity of a run's best checkpoint, and how it was found."""
    from . import info as work

    work.run(run)


@app.command()
@with_options(SimOptions)
def sim(out: Out = None, device: Device = None, threads: Threads = None, **fields: Any) -> None:
    """Match the states of a teacher by an implicit model: convex, with a certificate for every row."""
    from . import sim as work

    work.run(SimOptions(**fields).check(), out=out, device=device, threads=threads)


command = typer.main.get_command(app)
