"""Standard tasks by lm-eval, on local tasks and a tiny model."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rlpt.config import Config, Dtype
from megatron_rlpt.config.evaluation_tasks import STANDARD_TASKS, TaskChoice, parse_tasks
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation import standard_tasks
from megatron_rlpt.evaluation.models import EvaluatedModel
from megatron_rlpt.evaluation.results import Result, Scale
from megatron_rlpt.evaluation.standard_tasks import Score, load_tasks, open_tasks, standard_results

QUESTIONS = (
    ("the cat sat on the", ("mat", "river"), 0),
    ("a dog ran under the", ("stone", "tree"), 1),
    ("then saw the", ("big house", "light"), 0),
    ("a red", ("tree", "mat"), 1),
    ("the blue river and", ("stone", "dog"), 0),
)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
GROUP = "group: pets\ntask: [cats, dogs]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, questions in (("cats", QUESTIONS), ("dogs", QUESTIONS[:3])):
        data = folder / f"{name}.jsonl"
        records = ({"question": text, "choices": choices, "gold": gold} for text, choices, gold in questions)
        data.write_text("".join(f"{json.dumps(one)}\n" for one in records))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, cache=folder / "datasets"))
    (folder / "pets.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def config(tiny_model, tasks) -> Config:
    made = Config()
    made.model.path, made.model.dtype = str(tiny_model), Dtype.fp32
    made.evaluation.tasks, made.evaluation.tasks_path = ["cats"], str(tasks)
    return made


@pytest.fixture
def model(tiny_model) -> EvaluatedModel:
    return EvaluatedModel("m", tiny_model, "hf", tiny_model, "digest", True)


@pytest.fixture(scope="module")
def right_answers(tiny_model) -> list[bool]:
    """Whether the model finds the right choice of each question likelier, each in a forward pass of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)

    def nats(text: str, choice: str) -> float:
        tokens = tokenizer.encode(f"{text} {choice}", add_special_tokens=False)
        count = len(tokenizer.encode(choice, add_special_tokens=False))
        with torch.no_grad():
            rows = loaded(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return sum(rows[index - 1, tokens[index]].item() for index in range(len(tokens) - count, len(tokens)))

    found = []
    for text, choices, gold in QUESTIONS:
        values = [nats(text, choice) for choice in choices]
        found.append(values.index(max(values)) == gold)
    return found


def test_a_task_of_the_user_gives_accuracy_with_an_interval(config, model, right_answers, tmp_path, capfd):
    capfd.readouterr()
    (task,) = open_tasks(config.evaluation)
    results = standard_results(config, [task], [model], tmp_path)
    found = {one.measure: one for one in results}
    told = [line for line in capfd.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert told == [], "lm-eval says nothing"
    share = sum(right_answers) / len(right_answers)
    assert 0 < share < 1
    assert found["acc"].value == pytest.approx(share)
    error = math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1))
    assert found["acc"].ci95 == pytest.approx((max(0, share - 1.96 * error), min(1, share + 1.96 * error)), abs=1e-3)
    assert (found["acc"].scale, found["acc"].n, found["acc"].set) == (Scale.share, 5, "cats")
    assert found["acc"].higher_is_better
    assert set(found) == {"acc", "acc_norm"}
    assert (task.facts.name, task.facts.format, task.facts.path, task.facts.prompts) == ("cats", "lm-eval", "json", 5)


def test_a_group_is_one_result_and_shots_and_limit_apply(config, model, right_answers, tmp_path, monkeypatch):
    from megatron_rlpt.evaluation.lm_eval_model import RankedModel

    prompts = []
    shared = RankedModel._shared

    def keep(self, answer, requests):
        prompts.extend(one.args[0] for one in requests)
        return shared(self, answer, requests)

    monkeypatch.setattr(RankedModel, "_shared", keep)
    config.evaluation.tasks, config.evaluation.tasks_limit = ["pets", "dogs:1"], 2
    tasks = open_tasks(config.evaluation)
    results = standard_results(config, tasks, [model], tmp_path)
    found = {(one.set, one.measure): one for one in results}
    assert set(found) == {("pets", "acc"), ("dogs:1", "acc"), ("dogs:1", "acc_norm")}
    assert found["pets", "acc"].value == pytest.approx(sum(right_answers[:2]) / 2)
    assert [(one.facts.name, one.facts.prompts) for one in tasks] == [("pets", 4), ("dogs:1", 2)]
    assert [prompt.count("\n\n") for prompt in prompts] == [0] * 8 + [1] * 4, "one example in the prompt"


def test_results_are_stored_until_questions_or_model_change(config, model, tasks, tmp_path, monkeypatch):
    def run(model: EvaluatedModel) -> list[Result]:
        return standard_results(config, open_tasks(config.evaluation), [model], tmp_path)

    first = run(model)
    load = standard_tasks._model_of
    monkeypatch.setattr(standard_tasks, "_model_of", None)
    assert run(model) == first
    with pytest.raises(TypeError):
        run(replace(model, digest="other"))
    own = tmp_path / "own"
    shutil.copytree(tasks, own)
    for file in own.glob("*.yaml"):
        file.write_text(file.read_text().replace(str(tasks), str(own)))
    config.evaluation.tasks_path = str(own)
    data = own / "cats.jsonl"
    data.write_text(data.read_text().replace("mat", "hat", 1))
    with pytest.raises(TypeError):
        run(model)
    monkeypatch.setattr(standard_tasks, "_model_of", load)
    assert len(run(model)) == 2


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self.is_main, self._barrier, self._board = rank, size, rank == 0, barrier, board

    def all_gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait(20)
        values = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(20)
        return values

    def run_on_all_ranks(self, work, phase):
        return work()


def test_ranks_share_the_requests_of_a_task(config, tiny_model, tasks, tmp_path):
    from megatron_rlpt.evaluation.lm_eval_model import answering_model

    barrier, board, answered, scores = threading.Barrier(2), {}, {}, {}
    loaded = [load_tasks(parse_tasks(["cats"]), str(tasks))[0] for _ in range(2)]
    models = [
        answering_model(tiny_model, "cpu", Dtype.fp32, 1000, ThreadRanks(rank, 2, barrier, board)) for rank in range(2)
    ]

    def work(rank):
        tokens = models[rank]._loglikelihood_tokens
        models[rank]._loglikelihood_tokens = lambda given, **options: (
            answered.setdefault(rank, len(given)) and tokens(given, **options)
        )
        scores[rank] = standard_tasks._scores(loaded[rank], models[rank], 0)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores[0] == scores[1]
    assert answered == {0: 6, 1: 4}, "both choices of a question on one rank"


@pytest.fixture
def hf_home(tmp_path, monkeypatch) -> Path:
    """The cache of datasets as it is after somebody loaded ARC-Easy, with made-up questions."""
    import datasets

    records = [
        {
            "id": str(number),
            "question": f"the {word} cat sat on the",
            "choices": {"text": ["mat", "river"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for number, word in enumerate(("big", "red", "small"))
    ]
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    for file in files.values():
        Path(file).write_text("".join(f"{json.dumps(one)}\n" for one in records))
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "made"))
    builder.download_and_prepare()
    place = tmp_path / "hub" / "allenai___ai2_arc" / "ARC-Easy" / "0.0.0" / ("0" * 40)
    shutil.copytree(builder.cache_dir, place)
    for file in place.glob("json-*.arrow"):
        file.rename(place / file.name.replace("json-", "ai2_arc-"))
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"config_name": "ARC-Easy", "dataset_name": "ai2_arc", "builder_name": "parquet"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return tmp_path / "hub"


def test_a_standard_task_reads_the_cache_of_datasets(hf_home, config, model, tmp_path):
    config.evaluation.tasks, config.evaluation.tasks_path = ["arc_easy:1"], ""
    (task,) = open_tasks(config.evaluation)
    assert (task.facts.path, task.facts.prompts) == ("allenai/ai2_arc ARC-Easy", 3)
    results = standard_results(config, [task], [model], tmp_path)
    assert [(one.measure, one.set, one.n) for one in results] == [
        ("acc", "arc_easy:1", 3),
        ("acc_norm", "arc_easy:1", 3),
    ]


def test_data_that_is_not_here_is_named_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        DataError, match=r"data of task arc_easy is not on this machine .*allenai/ai2_arc.*HF_HOME"
    ) as error:
        load_tasks([TaskChoice("arc_easy")])
    assert "\n" not in str(error.value)


def test_unknown_tasks_and_folders_are_named(tasks, monkeypatch):
    with pytest.raises(ConfigError, match=r"tasks_path is absent, which is no folder"):
        load_tasks([TaskChoice("cats")], "absent")
    monkeypatch.setattr(standard_tasks, "FOLDERS", {"cows": "piqa"})  # do not read all of lm-eval's own
    with pytest.raises(ConfigError, match=r"'cows', which is neither a task of lm-eval 0.4.13 nor in "):
        load_tasks([TaskChoice("cows")], str(tasks))


def test_without_lm_eval_the_extra_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(standard_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-rlpt\[lm-eval\]'"):
        open_tasks(config.evaluation)
    config.evaluation.tasks = []
    assert open_tasks(config.evaluation) == []


def test_the_standard_group_has_folders_of_this_release():
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    names = [choice.name for choice in parse_tasks(["standard", "truthfulqa_mc1", "truthfulqa_mc2"])]
    assert set(names) == set(standard_tasks.FOLDERS)
    folders = dict.fromkeys(root / folder for folder in standard_tasks.FOLDERS.values())
    known = lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=False).all_tasks
    assert set(names) <= set(known)


def test_names_and_shots_are_parsed():
    assert parse_tasks(["mmlu:5", "piqa", "piqa"]) == [TaskChoice("mmlu", 5), TaskChoice("piqa")]
    assert [str(one) for one in parse_tasks(["standard", "boolq"])] == list(STANDARD_TASKS)
    with pytest.raises(ConfigError, match=r"evaluation.tasks has 'mmlu:many'; give a name, or name:shots"):
        parse_tasks(["mmlu:many"])


def test_intervals_of_metrics_that_are_no_share_or_all_alike():
    from megatron_rlpt.evaluation.standard_tasks import _interval

    assert _interval(Score("ppl", 5.0, 1.0, 9, False), False) == pytest.approx((3.04, 6.96), abs=1e-2)
    low, high = _interval(Score("acc", 1.0, 0.0, 20, True), True)
    assert high == 1.0
    assert 0.7 < low < 0.9
    assert _interval(Score("f1", 0.5, None, 9, True), True) is None
