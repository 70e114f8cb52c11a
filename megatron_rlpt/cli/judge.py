"""``rlpt judge`` and ``rlpt teacher``: judge workers, a trial of the judge, and teacher servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from megatron_rlpt.cli.options import ConfigOption, Overrides, load, split_overrides
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.terminal import say

judge_app = typer.Typer(
    help="Run judge workers, or try the judge.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
teacher_app = typer.Typer(
    help="Run teacher servers.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    """Turn a failed import of an optional package into a ConfigError with the fix."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'megatron-rlpt[workers]'") from None


@judge_app.command("serve")
def judge_serve(
    config: ConfigOption,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes to run.")] = 1,
    name: Annotated[
        str,
        typer.Option("--name", help="Name of the worker (of several: NAME-1, ...); default: generated."),
    ] = "",
) -> None:
    """Judge groups from the rollout buffer until SIGTERM, then finish the current groups."""
    from megatron_rlpt.observe.log import quiet_libraries, setup_logging

    resolved = load(config, overrides)
    quiet_libraries()
    setup_logging()
    if workers > 1:
        from megatron_rlpt.judge_workers.supervisor import run_workers

        raise typer.Exit(run_workers(config, overrides or (), resolved, workers, name))
    with _packages():
        from megatron_rlpt.judge_workers.serve import run_worker
    run_worker(resolved, name)


@judge_app.command("try")
def judge_try(
    config: ConfigOption,
    prefix: Annotated[str, typer.Option("--prefix", help="Text that the candidates continue.")],
    candidates: Annotated[
        list[str], typer.Option("--candidate", metavar="TEXT", help="A candidate; give two or more.")
    ],
    overrides: Overrides = None,
    reference: Annotated[
        str, typer.Option("--reference", help="Text of the document, for factuality; default: the first candidate.")
    ] = "",
    url: Annotated[str, typer.Option("--url", help="Server to use instead of the configured ones.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output, with every detail.")] = False,
) -> None:
    """Judge a few candidates and print rewards, verdicts and replies."""
    from megatron_rlpt.observe.log import quiet_libraries

    resolved = load(config, overrides)
    quiet_libraries()
    with _packages():
        from megatron_rlpt.cli.judge_try import describe, require_score, try_judge
    group = try_judge(resolved, prefix, candidates, reference, url)
    say(describe(group, candidates, as_json))
    require_score(group)


@teacher_app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def teacher_serve(
    context: typer.Context,
    config: ConfigOption,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on and announce; 0.0.0.0: all, announced by host name."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 0,
    weight: Annotated[float, typer.Option("--weight", help="Relative share of requests.")] = 1.0,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Most concurrent requests per worker.")] = 32,
) -> None:
    """Serve the teacher with vLLM and announce it to judge workers.

    Arguments of the form section.key=value override the file; all others are passed to the vLLM server.
    """
    from megatron_rlpt.observe.log import quiet_libraries, setup_logging

    overrides, extra = split_overrides(context.args)
    resolved = load(config, overrides)
    quiet_libraries()
    setup_logging()
    from megatron_rlpt.judge_workers.teacher_server import serve_teacher

    serve_teacher(resolved, host=host, port=port, weight=weight, concurrency=concurrency, extra=extra)
