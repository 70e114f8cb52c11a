"""The ``rlpt`` command and its subcommands.

Each command imports torch itself, if it needs it, so that ``rlpt --help`` and ``rlpt config`` are fast and work on a
login node without torch.
"""

from __future__ import annotations

import enum
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from megatron_rlpt.cli.buffer import buffer_app
from megatron_rlpt.cli.config import ConfigCommand, show_config
from megatron_rlpt.cli.experiment import experiment_app
from megatron_rlpt.cli.judge import judge_app, teacher_app
from megatron_rlpt.cli.launch import launch, status
from megatron_rlpt.cli.options import ConfigOption, Overrides, load
from megatron_rlpt.cli.plan import plan
from megatron_rlpt.cli.report import report
from megatron_rlpt.cli.version import describe_version
from megatron_rlpt.cli.world import world_app
from megatron_rlpt.distributed.processes import run_and_leave
from megatron_rlpt.errors import CheckpointError, RlptError, RunStopped, is_disk_full
from megatron_rlpt.observe.terminal import say
from megatron_rlpt.plain_text import one_line

_ANY_STEPS = 1_000_000
"""``train.steps`` of a configuration that trains nothing."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells and schedulers expect."""


class _Group(TyperGroup):
    """Exits with 130 on Ctrl-C with every version of typer (older ones exit with 1)."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    name="rlpt",
    help="Self-improving pretraining: a teacher rewrites and judges, the policy learns from the best candidates.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    # Its tracebacks print local variables, which may hold keys and tokens.
    pretty_exceptions_enable=False,
)


class ConvertTo(enum.StrEnum):
    """Formats that ``rlpt convert`` writes."""

    hf = "hf"
    megatron = "megatron"


class ConvertDtype(enum.StrEnum):
    """Precisions that ``rlpt convert`` and ``rlpt init`` write."""

    bf16 = "bf16"
    fp32 = "fp32"


app.add_typer(buffer_app)


def _print_version(requested: bool) -> None:
    if requested:
        print(describe_version())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _quiet_libraries() -> None:
    from megatron_rlpt.observe.log import quiet_libraries

    quiet_libraries()


app.add_typer(judge_app, name="judge")
app.command("launch")(launch)
app.command("status")(status)
app.add_typer(teacher_app, name="teacher")
app.add_typer(world_app)
app.add_typer(experiment_app)


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an existing run folder aside and start over instead of resuming.")
    ] = False,
) -> None:
    """Train a policy, or resume the run in run.dir."""
    resolved = load(config, overrides)
    _quiet_libraries()
    from megatron_rlpt.trainer.run import run_training

    run_training(resolved, fresh=fresh)


@app.command()
def evaluate(
    config: ConfigOption,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="[NAME=]PATH",
            help="Hugging Face folder, Megatron checkpoint or run to evaluate, once or several times; default: the "
            "export of run.dir and that of its next-token baseline.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option("--reference", metavar="[NAME=]PATH", help="Compare with this model; default: model.path.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for results and cache; default: run.dir, or runs/evaluation with --model or --reference.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare models with a reference: quality, coherence, safety, factuality, likelihood, diversity."""
    other = Path("runs/evaluation") if model or reference else None
    target = out or other
    # Models that are named belong to no run.
    unset = {"run.dir": str(target), "train.steps": _ANY_STEPS} if model else {}
    resolved = load(config, overrides, unset)
    _quiet_libraries()
    from megatron_rlpt.evaluation.evaluate import evaluate as compare
    from megatron_rlpt.reports import show_evaluation

    if folder := compare(resolved, target or Path(resolved.run.dir), model or (), reference):
        show_evaluation(folder)


app.command("report")(report)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Hugging Face folder, Megatron checkpoint, run folder or GGUF file.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not hold anything yet.")],
    to: Annotated[ConvertTo, typer.Option("--to", help="Format to write.")],
    tp: Annotated[int | None, typer.Option("--tp", min=1, metavar="N", help="Tensor-parallel files per stage.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", min=1, metavar="N", help="Pipeline stages.")] = None,
    ep: Annotated[int | None, typer.Option("--ep", min=1, metavar="N", help="Groups of experts.")] = None,
    dtype: Annotated[
        ConvertDtype | None,
        typer.Option("--dtype", help="Precision to write; default: that of IN, or bf16 for GGUF."),
    ] = None,
    hf_config: Annotated[
        Path | None,
        typer.Option(
            "--hf-config",
            metavar="FOLDER",
            help="Hugging Face folder for a Megatron checkpoint without hf/.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare tensors and logits afterwards; needs memory for the model in fp32."),
    ] = False,
) -> None:
    """Convert a checkpoint between Hugging Face and Megatron, or from GGUF.

    --tp, --pp and --ep set the number of files of a Megatron checkpoint; any layout can load it.
    """
    _quiet_libraries()
    from megatron_rlpt.config import Dtype
    from megatron_rlpt.convert.convert import convert as run
    from megatron_rlpt.convert.formats import Format
    from megatron_rlpt.policy.layout import Layout
    from megatron_rlpt.policy.precision import torch_dtype_of

    cut = (tp, pp, ep) != (None, None, None)
    result = run(
        source,
        target,
        Format(to.value),
        layout=Layout(tensor=tp or 1, pipeline=pp or 1, expert=ep or 1) if cut else None,
        dtype=torch_dtype_of(Dtype(dtype.value)) if dtype else None,
        hf_config=hf_config,
        verify=verify,
        say=say,
    )
    say(result.describe())


@app.command()
def init(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="config.json of the model, or its folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not hold anything yet.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FOLDER", help="Folder of the tokenizer; default: that of CONFIG."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights.")] = 1,
    dtype: Annotated[ConvertDtype, typer.Option("--dtype", help="Precision to write.")] = ConvertDtype.bf16,
) -> None:
    """Create a model with fresh weights, initialized as Megatron does."""
    _quiet_libraries()
    from megatron_rlpt.config import Dtype
    from megatron_rlpt.convert.fresh import init as run
    from megatron_rlpt.policy.precision import torch_dtype_of

    precision = torch_dtype_of(Dtype(dtype.value))
    say(run(config, target, tokenizer, seed=seed, dtype=precision, say=say))


app.command("plan")(plan)


app.command("config", cls=ConfigCommand)(show_config)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Report this machine, the installed packages, and problems with their fixes."""
    from megatron_rlpt.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json))


def entry() -> NoReturn:
    """Run ``main`` as the whole process."""
    run_and_leave(main)


def _tell(what: str, error: object) -> None:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    say(("" if rank == "0" else f"rank {rank}: ") + what + one_line(error), sys.stderr)


def main() -> None:
    """Run the ``rlpt`` command.

    Exit codes: 0 for success, 2 for wrong usage or configuration, ``RlptError.exit_code`` with one line on standard
    error for an error that the user can fix, 8 for a full disk, 130 after Ctrl-C, 1 with a traceback for a bug.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # never fail on a character that the terminal lacks
    try:
        app(prog_name="rlpt")
    except RlptError as error:
        _tell("" if isinstance(error, RunStopped) else "error: ", error)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if not is_disk_full(error):
            raise
        _tell(
            "error: ",
            f"{error.filename or 'a file'} could not be written ({error.strerror}); free space and run the same "
            "command again; a run resumes from its last checkpoint",
        )
        raise SystemExit(CheckpointError.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
