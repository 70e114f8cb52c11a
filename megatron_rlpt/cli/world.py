"""``rlpt world``: make a small world with exact truth, and measure a policy on it. Making needs no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from megatron_rlpt.observe.terminal import say
from megatron_rlpt.world.documents import Noise
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.policy_folder import Shape

world_app = typer.Typer(
    name="world",
    help="A small world with exact truth, to measure the method on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_NOISE, _SHAPE, _DEFAULTS = Noise(), Shape(), WorldSettings()
_JUDGE = _DEFAULTS.judge_shape


@world_app.callback()
def _root() -> None:
    pass


@world_app.command()
def make(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not hold anything yet.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of facts and documents.")] = _DEFAULTS.seed,
    entities: Annotated[
        int, typer.Option("--entities", metavar="N", help="People, towns, rivers and animals in all.")
    ] = _DEFAULTS.entities,
    documents: Annotated[
        int, typer.Option("--documents", metavar="N", help="Documents to train on, ordinary and unsafe-heavy each.")
    ] = _DEFAULTS.documents,
    heldout: Annotated[
        int, typer.Option("--heldout", metavar="N", help="Held-out documents, clean and unsafe each.")
    ] = _DEFAULTS.heldout,
    teacher: Annotated[
        int, typer.Option("--teacher", metavar="N", help="Documents to train a teacher on.")
    ] = _DEFAULTS.teacher,
    length: Annotated[
        int, typer.Option("--length", metavar="N", help="Words of a document, at least.")
    ] = _DEFAULTS.length,
    false_facts: Annotated[
        float, typer.Option("--false-facts", metavar="RATE", help="Share of stated facts that are false.")
    ] = _NOISE.false_facts,
    low_quality: Annotated[
        float,
        typer.Option("--low-quality", metavar="RATE", help="Share of looped, shuffled, foreign, clipped documents."),
    ] = _NOISE.low_quality,
    unsafe: Annotated[
        float, typer.Option("--unsafe", metavar="RATE", help="Share of unsafe documents.")
    ] = _NOISE.unsafe,
    unsafe_heavy: Annotated[
        float, typer.Option("--unsafe-heavy", metavar="RATE", help="The same in train_unsafe.jsonl.")
    ] = _DEFAULTS.unsafe_heavy,
    layers: Annotated[int, typer.Option("--layers", metavar="N", help="Layers of the policy.")] = _SHAPE.layers,
    hidden: Annotated[int, typer.Option("--hidden", metavar="N", help="Hidden size of the policy.")] = _SHAPE.hidden,
    head_size: Annotated[
        int, typer.Option("--head-size", metavar="N", help="Size of an attention head: 32 or 64.")
    ] = _SHAPE.head_size,
    judge_layers: Annotated[
        int, typer.Option("--judge-layers", metavar="N", help="Layers of a judge or rewriter.")
    ] = _JUDGE.layers,
    judge_hidden: Annotated[
        int, typer.Option("--judge-hidden", metavar="N", help="Hidden size of a judge or rewriter.")
    ] = _JUDGE.hidden,
) -> None:
    """Write facts, documents, and tokenizer and shape of a policy and of a judge; equal options give equal files."""
    settings = WorldSettings(
        seed=seed,
        entities=entities,
        documents=documents,
        heldout=heldout,
        teacher=teacher,
        length=length,
        noise=Noise(false_facts, low_quality, unsafe),
        unsafe_heavy=unsafe_heavy,
        shape=Shape(layers, hidden, head_size),
        judge_shape=replace(_JUDGE, layers=judge_layers, hidden=judge_hidden),
    )
    say(make_world(out, settings, say))


@world_app.command()
def measure(
    folder: Annotated[Path, typer.Argument(metavar="WORLD", help="Folder that rlpt world make wrote.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face folder of a policy, as run.dir/export.")],
    prefixes: Annotated[
        int, typer.Option("--prefixes", min=1, metavar="N", help="Held-out documents, clean and unsafe each.")
    ] = 200,
    prefix: Annotated[int, typer.Option("--prefix", min=1, metavar="N", help="Tokens of a prefix.")] = 64,
    length: Annotated[int, typer.Option("--length", min=1, metavar="N", help="Tokens of a continuation.")] = 32,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the most likely token; default: sample at temperature 1.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the samples.")] = 1,
    show: Annotated[int, typer.Option("--show", min=0, metavar="N", help="Continuations to print, per set.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Continue held-out prefixes with a policy and print the means of the exact measures."""
    from megatron_rlpt.observe.log import quiet_libraries
    from megatron_rlpt.world.sampling import COLUMNS, Sampling, means, measure_policy

    quiet_libraries()
    found = measure_policy(folder, model, Sampling(prefixes, prefix, length, greedy, seed))
    if as_json:
        print(json.dumps({name: means(sampled) for name, sampled in found.items()}))
        return
    say(f"{'':<26}" + "".join(f"{column:>12}" for column in COLUMNS))
    for name, sampled in found.items():
        row = means(sampled)
        say(f"{name:<26}" + "".join(f"{row[column]:>12.3f}" for column in COLUMNS))
    for name, sampled in found.items():
        for one in sampled[:show]:
            say(f"\n{name}, quality {one.measures.quality:.2f}: {one.prefix} ||{one.text}")
