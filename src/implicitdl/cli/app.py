"""The commands and their options."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer

from . import certify as proofs
from . import fit, report, sim
from .fit import RunInterruptedError
from .options import Options, with_options

__all__ = ["RunInterruptedError", "UsageError", "command"]

# typer ships its own copy of click from 0.26 on, and uses the installed one before.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Implicit deep learning: x = φ(Ax + Bu), y = Cx + Du.",
)
Run = Annotated[str, typer.Argument(metavar="RUN", help="A folder that `implicitdl train` or `sim` wrote.")]
Root = Annotated[str | None, typer.Option(help="Folder of the datasets, if it is not where it was.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")]
_RUN = "Run"


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
@with_options
def train(
    ctx: typer.Context,
    out: Annotated[
        str | None, typer.Option(help="The run's folder; a new one under runs/ by default.", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, as it was set up.", rich_help_panel=_RUN)
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.", rich_help_panel=_RUN)] = None,
    threads: Annotated[int | None, typer.Option(help="of PyTorch on the CPU.", rich_help_panel=_RUN)] = None,
    **fields: Any,
) -> None:
    """Train a model, keep the best epoch on held-out training data, and test that one."""
    given = {name: value for name, value in fields.items() if _on_command_line(ctx, name)}
    fit.run(Options(**fields), given, out=out, resume=resume, device=device, threads=threads)


def _on_command_line(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def evaluate(run: Run, root: Root = None, device: Device = None) -> None:
    """Test the best checkpoint of a run, or the model that `sim` found."""
    report.evaluate(run, root, device)


@app.command()
def plot(run: Run, root: Root = None) -> None:
    """Draw a run into RUN/plots: training curves, residual histories, the spy plot, the spectrum of A."""
    report.plot(run, root)


@app.command()
def certify(
    run: Run,
    eps: Annotated[
        list[float] | None,
        typer.Option(help="Radius of every pixel in [0, 1]; give it once for each.  0.01, 0.05 and 0.1 by default."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Test samples to look at.")] = 1000,
    method: Annotated[str, typer.Option(help=" | ".join(proofs.METHODS))] = "crown",
    slope_steps: Annotated[int, typer.Option(help="Steps that improve the slopes of crown's lines.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often crown refines the bounds it starts from.")] = 0,
    attack_steps: Annotated[int, typer.Option(help="Steps of the PGD attack.")] = 20,
    restarts: Annotated[int, typer.Option(help="Starts of the attack.")] = 1,
    root: Root = None,
    device: Device = None,
) -> None:
    """Prove what can be proved about a run's best checkpoint: well-posedness, Lipschitz constants, robust accuracy."""
    proofs.certify(run, eps or proofs.RADII, samples, method, slope_steps, rounds, attack_steps, restarts, root, device)


@app.command()
def info(run: Run) -> None:
    """Sizes, norms and sparsity of a run's best checkpoint, and how it was found."""
    report.info(run)


app.command()(sim.sim)
command = typer.main.get_command(app)
