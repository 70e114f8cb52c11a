"""``rlpt judge`` and ``rlpt teacher``: judge workers, trial and calibration of judges, and teacher servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megatron_rlpt.cli.options import ConfigOption, Overrides, load, split_overrides
from megatron_rlpt.config import Role
from megatron_rlpt.config.choices import AnswerForm, PromptLength
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.terminal import say

judge_app = typer.Typer(
    help="Run judge workers, or try and measure judges.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
teacher_app = typer.Typer(
    help="Make data to train a teacher on, and run teacher servers.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Kinds = Annotated[
    list[str] | None, typer.Option("--kind", metavar="KIND", help="A way to spoil a text; default: all.")
]
_Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", min=4, metavar="N", help="Tokens of a text; default: data.suffix_length, half, quarter."),
]
_Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; must not hold anything yet.")]
_Corpus = Annotated[
    list[str] | None, typer.Option("--corpus", metavar="PATH", help="Documents; repeatable.", show_default=False)
]
_HeldoutShare = Annotated[
    float, typer.Option("--heldout-share", min=0.0, max=1.0, metavar="SHARE", help="Documents held out.")
]


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
    from megatron_rlpt.teacher.judge_card import accuracy_lines, accuracy_notes

    group = try_judge(resolved, prefix, candidates, reference, url)
    say(describe(group, candidates, as_json))
    if not as_json:
        for line in (*accuracy_lines(resolved), *accuracy_notes(resolved)):
            say(line)
    require_score(group)


@judge_app.command("calibrate")
def judge_calibrate(
    config: ConfigOption,
    overrides: Overrides = None,
    world: Annotated[
        Path | None,
        typer.Option("--world", metavar="FOLDER", help="World whose held-out documents to spoil."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FOLDER", help="Folder of rlpt teacher data: measures all axes that it has."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Records with prefix, good, bad and kind, or texts with a verdict."
        ),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="Format of --file, as in evaluation.sets.")] = "jsonl",
    judges: Annotated[
        list[str] | None, typer.Option("--judge", metavar="NAME", help="A judge of rlpt evaluate; default: judge.")
    ] = None,
    measure: Annotated[str, typer.Option("--measure", help="What a prompted judge decides; default: its first.")] = "",
    pairs: Annotated[int, typer.Option("--pairs", min=2, metavar="N", help="Pairs, or texts, at most.")] = 200,
    kinds: _Kinds = None,
    lengths: _Lengths = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of spoiling and of votes.")] = 1,
    save: Annotated[
        bool, typer.Option("--save", help="Put the accuracy into the folder of the judge's model (judge_card.json).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Measure judges on pairs whose better text is known, and on texts whose verdict is.

    Pairs are held-out documents and the same spoiled, unless --data, --world or --file names others.
    """
    from megatron_rlpt.observe.log import quiet_libraries

    resolved = load(config, overrides)
    quiet_libraries()
    with _packages():
        from megatron_rlpt.cli import judge_calibrate as command
        from megatron_rlpt.evaluation.labelled_pairs import PairPlan
    plan = PairPlan(pairs, tuple(kinds or ()), tuple(lengths or ()), seed)
    found = command.calibrate_judges(
        resolved, command.Asked(plan, tuple(judges or ()), measure, world, file, data, form)
    )
    if save:
        command.save_cards(resolved, found, str(data or world or file or "data.heldout"))
    if as_json:
        say(command.as_json(found))
    else:
        command.show(found)
    command.require_verdicts(found)


@teacher_app.command("data")
def teacher_data(
    config: ConfigOption,
    out: _Out,
    overrides: Overrides = None,
    role: Annotated[Role, typer.Option("--role", help="Whom to train.")] = Role.judge,
    corpus: _Corpus = None,
    world: Annotated[
        Path | None,
        typer.Option("--world", metavar="DIR", help="Folder of a world, for exact corruptions.", show_default=False),
    ] = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--axis", metavar="AXIS", help="Of a judge: quality (default), safety or factuality."),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND[=N]",
            help="A way to spoil a text, asked (of a model) or sampled (from the policy), for N times as many pairs; "
            "default: all rules, for a rewriter in a world unsafe.",
        ),
    ] = None,
    unseen: Annotated[
        list[str] | None, typer.Option("--unseen", metavar="KIND", help="A way that only the held-out part has.")
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            min=4,
            metavar="N",
            help="Tokens of a suffix; default: data.suffix_length, for a judge its half and quarter too.",
        ),
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, metavar="N", help="Pairs to train on.")] = 2000,
    heldout_pairs: Annotated[int, typer.Option("--heldout-pairs", min=1, metavar="N", help="Held-out pairs.")] = 200,
    heldout_share: _HeldoutShare = 0.1,
    form: Annotated[
        AnswerForm | None,
        typer.Option(
            "--answer", help="Of a judge: form of its answers, as teacher.generative.answer; default: reasoned."
        ),
    ] = None,
    copies: Annotated[
        float | None,
        typer.Option(
            "--copies", min=0.0, max=1.0, metavar="SHARE", help="Of a rewriter: suffixes that are good; default: half."
        ),
    ] = None,
    restore: Annotated[
        bool,
        typer.Option(
            "--restore",
            help="Of a rewriter in a world: answers are suffixes as they were, not the exact rewriter's texts.",
        ),
    ] = False,
    safety_votes: Annotated[
        int,
        typer.Option(
            "--safety-votes", min=0, metavar="N", help="Votes of a served model on a text's safety that have to agree."
        ),
    ] = 0,
    prompt: Annotated[
        PromptLength,
        typer.Option(
            "--prompt", help="Length of the prompts: as teacher.generative.prompt or teacher.rewriter.prompt."
        ),
    ] = PromptLength.full,
    seed: Annotated[int, typer.Option("--seed", help="Seed of split, corruptions and codes.")] = 1,
) -> None:
    """Make prompts with known answers to train a judge or a rewriter on, of documents that the policy never sees."""
    from megatron_rlpt.teacher_training.build import build_teacher_data
    from megatron_rlpt.teacher_training.request import DataRequest, kinds_of

    request = DataRequest(
        out=out,
        corpus=tuple(corpus or ()),
        world=world,
        role=role,
        axes=tuple(axes or ()),
        kinds=kinds_of(kinds or ()),
        unseen=tuple(unseen or ()),
        lengths=tuple(lengths or ()),
        pairs=pairs,
        heldout_pairs=heldout_pairs,
        heldout_share=heldout_share,
        form=form,
        copies=copies,
        restore=restore,
        length=prompt,
        safety_votes=safety_votes,
        seed=seed,
    )
    say(build_teacher_data(load(config, overrides), request))


@teacher_app.command("thoughts")
def teacher_thoughts(
    config: ConfigOption,
    out: _Out,
    overrides: Overrides = None,
    corpus: _Corpus = None,
    world: Annotated[
        Path | None,
        typer.Option("--world", metavar="DIR", help="Folder of a world, for exact thoughts.", show_default=False),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Without thoughts, to compare with; give it the same --chunks.")
    ] = False,
    chunks: Annotated[
        int,
        typer.Option("--chunks", min=1, metavar="N", help="Parts of a suffix, whole sentences, each after a thought."),
    ] = 1,
    prompts: Annotated[int, typer.Option("--prompts", min=1, metavar="N", help="Prompts to train on.")] = 4000,
    heldout_prompts: Annotated[
        int, typer.Option("--heldout-prompts", min=1, metavar="N", help="Held-out prompts.")
    ] = 200,
    heldout_share: _HeldoutShare = 0.1,
    prompt: Annotated[PromptLength, typer.Option("--prompt", help="Length of the prompts.")] = PromptLength.full,
    seed: Annotated[int, typer.Option("--seed", help="Seed of split, choice, sampling and codes.")] = 1,
) -> None:
    """Put thoughts between sentences of documents, to train a model that thinks before it goes on (experimental).

    The teacher writes them (teacher.workers.endpoints or teacher.path), or a world that knows the facts.
    """
    from megatron_rlpt.teacher_training.thinking_data import ThoughtsRequest, build_thoughts

    request = ThoughtsRequest(
        out=out,
        corpus=tuple(corpus or ()),
        world=world,
        plain=plain,
        chunks=chunks,
        prompts=prompts,
        heldout_prompts=heldout_prompts,
        heldout_share=heldout_share,
        length=prompt,
        seed=seed,
    )
    say(build_thoughts(load(config, overrides), request))


@teacher_app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def teacher_serve(
    context: typer.Context,
    config: ConfigOption,
    role: Annotated[
        str,
        typer.Option("--role", metavar="ROLE", help="Whose model to serve, where there are two: judge or rewriter."),
    ] = "",
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on and announce; 0.0.0.0: all, announced by host name."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 0,
    weight: Annotated[float, typer.Option("--weight", help="Relative share of requests.")] = 1.0,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Most concurrent requests per worker.")] = 32,
) -> None:
    """Serve a model of the teacher with vLLM and announce it to judge workers.

    Arguments of the form section.key=value override the file; all others are passed to the vLLM server.
    """
    from megatron_rlpt.observe.log import quiet_libraries, setup_logging

    overrides, extra = split_overrides(context.args)
    resolved = load(config, overrides)
    quiet_libraries()
    setup_logging()
    from megatron_rlpt.judge_workers.teacher_server import serve_teacher

    serve_teacher(resolved, role=_role(role), host=host, port=port, weight=weight, concurrency=concurrency, extra=extra)


def _role(name: str) -> Role | None:
    if name and name not in list(Role):
        raise ConfigError(f"--role is {name}; allowed: {' or '.join(Role)}")
    return Role(name) if name else None
