"""``rlpt evaluate`` on a small trained run and its next-token baseline, and on models of any kind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
from tiny_runs import NEXT_TOKEN, finish, only_error, rlpt_process, save_model, start, torchrun_variables, write_config

from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format
from megatron_rlpt.errors import ConfigError, ModelError
from megatron_rlpt.evaluation import engines, evaluate
from megatron_rlpt.evaluation.results import Evaluation, Scale


@pytest.fixture(scope="module")
def trained(served_model, corpus, tmp_path_factory):
    """The configuration file and the folder of a run that contains its baseline."""
    base = tmp_path_factory.mktemp("evaluate")
    path, folder = base / "run.yaml", base / "run"
    other, third = base / "other.jsonl", base / "third.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for file, step in ((other, -1), (third, 2)):
        file.write_text("".join(json.dumps({"text": " ".join(text.split()[::step])}) + "\n" for text in texts))
    compared = {
        "data": {"heldout": [{"path": str(other)}]},
        "evaluation": {"prefixes": 12, "samples": 2, "examples": 3, "second_corpus": [{"path": str(third)}]},
    }
    for config in (
        write_config(base / "ntp.yaml", served_model, corpus, folder / "baseline_ntp", **NEXT_TOKEN),
        write_config(path, served_model, corpus, folder, **compared),
    ):
        code, _, err = finish(start(config))
        assert code == 0, err
    return path, folder


def read(folder) -> Evaluation:
    return Evaluation.from_json(json.loads((folder / "evaluation.json").read_text()))


def stored(cache) -> dict[str, int]:
    """Return how many blocks of continuations the cache has by digest of the weights."""
    return {
        json.loads((folder / "facts.json").read_text())["weights"]: sum(
            len(file.read_text().splitlines()) for file in folder.glob("*.jsonl")
        )
        for folder in (cache / "generations").iterdir()
    }


@pytest.fixture
def evaluated(trained, rlpt):
    """The evaluated run: configuration, folder, evaluation, and printed output."""
    config, folder = trained
    if not (folder / "evaluation.json").is_file():
        code, out, err = rlpt("evaluate", "-c", config)
        assert code == 0, err
        (folder / "printed.txt").write_text(out)
    return config, folder, read(folder), (folder / "printed.txt").read_text()


def test_an_evaluation_has_every_figure(evaluated):
    _, folder, found, printed = evaluated
    assert [(one.name, one.reference) for one in found.models] == [
        ("start", True), ("trained", False), ("baseline", False)
    ]  # fmt: skip
    assert [(one.name, one.prompts) for one in found.sets] == [("heldout", 12)]
    # The judge rewarded the training of the policy, not that of the baseline; the second measure of neither.
    assert {one.name: one.trained for one in found.judges} == {"judge": ("trained",), "second": ()}
    for decoding in ("sampled", "greedy"):
        for judge in ("judge", "second"):
            rates = found.find(measure="quality", scale=Scale.win_rate, judge=judge, decoding=decoding)
            assert [one.model for one in rates] == ["trained", "baseline"]
            for one in rates:
                assert one.ci95
                assert 0 <= one.ci95[0] <= one.value <= one.ci95[1] <= 1
                assert one.n + one.failed == (24 if decoding == "sampled" else 12)
                assert one.against == "start"
            (difference,) = found.find(measure="quality", scale=Scale.difference, judge=judge, decoding=decoding)
            assert (difference.model, difference.against) == ("trained", "baseline")
        for measure in ("repetition", "distinct_2", "distinct_3", "length"):
            values = {one.model: one.value for one in found.find(measure=measure, decoding=decoding)}
            assert values.keys() == {"start", "trained", "baseline"}
            assert all(0 <= one <= 8 for one in values.values())
    assert [one.value for one in found.find(measure="length", model="original")] == [8]
    (agreement,) = found.agreements
    assert (agreement.judges, agreement.measure) == (("judge", "second"), "quality")
    # Of the run and of its baseline, which have the same corpus.
    assert [(one["documents"], one["complete"]) for one in found.hygiene["sources"]] == [(60, True)]
    assert found.hygiene["sets"]["heldout"]["prompts"] == 12
    assert len(found.examples) == 3
    assert {name: set(texts) for name, texts in found.examples[0]["continuations"].items()} == {
        "greedy": {"start", "trained", "baseline"},
        "sampled": {"start", "trained", "baseline"},
    }
    assert "in-sample" in printed
    assert {file.name for file in folder.iterdir()} >= {"evaluation.json", "report.html", "report.md"}


def test_a_second_call_prints_the_same_without_an_engine_or_a_judge(evaluated, rlpt, monkeypatch):
    config, folder, _, printed = evaluated
    before = (folder / "evaluation.json").read_bytes()
    monkeypatch.delattr(engines, "start_policy_engine")
    monkeypatch.delattr(evaluate, "open_judges")
    code, out, err = rlpt("evaluate", "-c", config)
    assert (code, err) == (0, "")
    assert out == printed
    assert (folder / "evaluation.json").read_bytes() == before


def test_another_export_is_evaluated_anew_and_nothing_else(evaluated, rlpt, served_model, tmp_path):
    config, folder, found, _ = evaluated
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.copyfile(served_model / "model.safetensors", copy / "export/model.safetensors")
    before = stored(copy / "cache")
    code, _, err = rlpt("evaluate", "-c", config, f"run.dir={copy}")
    assert code == 0, err
    again = read(copy)
    assert again.fingerprint != found.fingerprint
    # The starting model against itself gives the same text, hence ties.
    assert {one.value for one in again.find(measure="quality", model="trained", scale=Scale.win_rate)} == {0.5}
    assert again.find(model="baseline", scale=Scale.win_rate) == found.find(model="baseline", scale=Scale.win_rate)
    # Its files differ from those of the starting model, so it is generated; the others are not.
    after = stored(copy / "cache")
    assert {key: after[key] for key in before} == before
    assert sum(after.values()) - sum(before.values()) == 2


def test_killed_and_continued_by_two_ranks_it_is_the_same(evaluated, tmp_path):
    config, _, found, _ = evaluated
    out = tmp_path / "out"
    # Killed as soon as the first model's continuations are stored.
    killed = rlpt_process("evaluate", "-c", str(config), "--out", str(out))
    until = time.monotonic() + 200
    while not list(out.glob("cache/generations/*/0.jsonl")) and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    finish(killed)
    assert not (out / "evaluation.json").exists()
    kept = stored(out / "cache")
    assert kept
    assert sum(kept.values()) < 6
    # A line that was cut off is no harm.
    file = next(out.glob("cache/generations/*/0.jsonl"))
    with file.open("a") as torn:
        torn.write('{"key": "00')
    before = file.read_bytes()
    ranks = [rlpt_process("evaluate", "-c", str(config), "--out", str(out), **place) for place in torchrun_variables(2)]
    for code, _, err in [finish(one) for one in ranks]:
        assert code == 0, err
    assert file.read_bytes().startswith(before)
    again = read(out)
    assert again.results == found.results
    assert again.examples == found.examples
    assert again.agreements == found.agreements


def test_models_of_any_kind_on_sets_of_the_users(evaluated, rlpt, served_model, other_model, tmp_path):
    config, run, found, _ = evaluated
    megatron, small = tmp_path / "megatron", tmp_path / "small"
    convert(other_model, megatron, Format.MEGATRON)
    save_model(small, served_model, seed=3, num_hidden_layers=1)
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"text": f"cat dog {'tree ' * n}", "reference": " blue", "label": "odd" if n % 2 else "even"} for n in range(8)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    asked = ({"text": f"the {word} is", "wrong": "red", "right": "blue"} for word in ("cat", "dog"))
    (tasks / "colors.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (tasks / "colors.yaml").write_text(
        "task: colors\ndataset_path: json\ndataset_kwargs:\n"
        f"  {{data_files: {{test: {tasks}/colors.jsonl}}, cache_dir: {tasks}/data}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: text\n"
        "doc_to_choice: ['{{wrong}}', '{{right}}']\ndoc_to_target: 1\nmetric_list: [{metric: acc}]\n"
    )
    words = tmp_path / "words.py"
    words.write_text(
        "class Blue:\n    def reward(self, prefix, candidates):\n"
        "        return [float('blue' in one) for one in candidates]\n"
    )
    sets = f"[{{name: mine, path: {prompts}, measures: [quality, safety, perplexity], labels: [even]}}]"
    judges = f"[{{name: blue, judge: '{words}:Blue', measures: [quality, safety]}}]"
    options = [
        "evaluation.samples=1", "evaluation.second_corpus=[]", f"evaluation.cache={run}/cache",
        f"evaluation.sets={sets}", f"evaluation.judges={judges}", "data.heldout_overlap=skip",
        "evaluation.tasks=[colors]", f"evaluation.tasks_path={tasks}",
    ]  # fmt: skip
    out = tmp_path / "out"
    named = ["--model", f"run={run}", "--model", f"{small}", "--reference", f"base={served_model}", "--out", out]
    code, _, err = rlpt("evaluate", "-c", config, *options, *named)
    assert code == 0, err
    first = read(out)
    assert [(one.name, one.kind) for one in first.models] == [("base", "hf"), ("run", "run"), ("small", "hf")]
    # What the run's own evaluation generated and judged was not done again.
    for measure in ("repetition", "length"):
        same = [one.value for one in found.find(measure=measure, model="trained", decoding="greedy")]
        again = first.find(measure=measure, model="run", set="heldout", decoding="greedy")
        assert [one.value for one in again] == same
    # Samples of a model with random weights are rarely blank, as its likeliest tokens often are.
    safe = first.find(measure="safety", set="mine", judge="blue", decoding="sampled")
    assert [(one.model, one.n + one.failed) for one in safe] == [("base", 4), ("run", 4), ("small", 4)]
    rates = first.find(measure="quality", model="small", judge="blue", decoding="sampled")
    assert {one.set for one in rates} == {"heldout", "mine", "all"}
    assert {one.model for one in first.find(measure="perplexity", set="mine")} == {"base", "run", "small"}
    assert not first.find(measure="perplexity", set="heldout")
    accuracy = [(one.model, one.n) for one in first.find(measure="acc", set="colors")]
    assert accuracy == [("base", 2), ("run", 2), ("small", 2)]
    assert [one.format for one in first.sets] == ["heldout", "jsonl", "lm-eval"]
    # One more model: only that one is generated, from a converted checkpoint.
    before = stored(run / "cache")
    code, _, err = rlpt("evaluate", "-c", config, *options, *named, "--model", f"mega={megatron}")
    assert code == 0, err
    more = read(out)
    after = stored(run / "cache")
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 1
    assert [(one.name, one.kind) for one in more.models][-1] == ("mega", "megatron")
    assert more.find(model="small", scale=Scale.win_rate) == first.find(model="small", scale=Scale.win_rate)


def test_a_model_with_another_tokenizer(rlpt, served_model, corpus, tmp_path):
    config = write_config(tmp_path / "run.yaml", served_model, corpus, tmp_path / "run")
    other = shutil.copytree(served_model, tmp_path / "other")
    layout = json.loads((other / "tokenizer.json").read_text())
    layout["pre_tokenizer"] = None
    (other / "tokenizer.json").write_text(json.dumps(layout))
    code, _, err = rlpt("evaluate", "-c", config, "--model", other, "--out", tmp_path / "out")
    assert code == ModelError.exit_code
    assert f"{other} has another tokenizer (pre_tokenizer) than model.path {served_model}" in only_error(err)


def test_two_models_with_one_name(rlpt, served_model, corpus, tmp_path):
    config = write_config(tmp_path / "run.yaml", served_model, corpus, tmp_path / "run")
    code, _, err = rlpt("evaluate", "-c", config, "--model", served_model, "--reference", served_model)
    assert code == ConfigError.exit_code
    assert f"two models have the name '{served_model.name}'" in only_error(err)


def test_a_run_that_exported_nothing_yet(rlpt, served_model, corpus, tmp_path):
    config = write_config(tmp_path / "run.yaml", served_model, corpus, tmp_path / "run")
    code, _, err = rlpt("evaluate", "-c", config)
    assert code == ConfigError.exit_code
    assert f"run.dir {tmp_path}/run has no export/" in only_error(err)


def test_no_documents_to_compare_on(evaluated, rlpt):
    config, _, _, _ = evaluated
    code, _, err = rlpt("evaluate", "-c", config, "data.heldout=[]")
    assert code == ConfigError.exit_code
    assert "data.heldout is empty" in only_error(err)
