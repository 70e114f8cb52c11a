"""Published formats, on made-up records that are laid out as the published files are."""

from __future__ import annotations

import csv
import gzip
import json
import sqlite3
from pathlib import Path

import pytest

from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation.formats import FORMATS, load
from megatron_rlpt.evaluation.prompts import MC1, MC2, Question, TextPrompt


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def table(path: Path, *rows: dict[str, object]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, *records: dict[str, object]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def toxicity(text: str, score: float | None) -> dict[str, object]:
    return {"text": text, "toxicity": score, "threat": 0.1}


def test_real_toxicity_prompts(tmp_path):
    file = jsonl(
        tmp_path / "prompts.jsonl",
        {"prompt": toxicity("The cat", 0.2), "continuation": toxicity(" sat.", 0.1), "challenging": False},
        {"prompt": toxicity("The dog", 0.5), "continuation": toxicity(" ran.", None), "challenging": True},
        {"prompt": toxicity("The hen", None), "continuation": toxicity(" flew.", 0.1), "challenging": False},
    )
    found = load("realtoxicityprompts", file)
    assert found[0] == TextPrompt("1", "The cat", reference=" sat.", label="nontoxic")
    assert [one.label for one in found] == ["nontoxic", "toxic/challenging", "unscored"]
    assert load("realtoxicityprompts", tmp_path) == found, "the folder does as well"
    assert [one.text for one in load("realtoxicityprompts", file, labels=["toxic"])] == ["The dog"]


def test_toxigen_statements_and_lists(tmp_path):
    rows = [
        {"text": "gardeners are kind", "target_group": "gardeners", "toxicity_ai": 1, "toxicity_human": 1.3},
        {"text": 'b"gardeners can\'t dig"', "target_group": "gardeners", "toxicity_ai": 4, "toxicity_human": 3},
    ]
    table(tmp_path / "annotated_test.csv", *rows)
    assert [(one.text, one.label) for one in load("toxigen", tmp_path)] == [
        ("gardeners are kind", "benign/gardeners"),
        ("gardeners can't dig", "toxic/gardeners"),
    ]
    file = table(
        tmp_path / "toxigen.csv",
        {"prompt": "- a\n- b\n-", "generation": "c", "group": "bakers", "prompt_label": 1},
        {"prompt": "- a\n- b\n-", "generation": "d", "group": "bakers", "prompt_label": 1},
        {"prompt": "- e\n-", "generation": "f", "group": "bakers", "prompt_label": 0},
    )
    assert [(one.text, one.label) for one in load("toxigen", file)] == [
        ("- a\n- b\n-", "toxic/bakers"),
        ("- e\n-", "benign/bakers"),
    ]


def test_toxigen_prompt_files(tmp_path):
    (tmp_path / "hate_bakers_1k.txt").write_text("- bakers nap\\n- bakers burn\\n-\n")
    (tmp_path / "neutral_bakers_1k.txt").write_text("- bakers bake\\n-\n\n")
    assert [(one.text, one.label) for one in load("toxigen", tmp_path)] == [
        ("- bakers nap\n- bakers burn\n-", "toxic/bakers"),
        ("- bakers bake\n-", "benign/bakers"),
    ]


def test_xstest(tmp_path):
    rows = [
        {
            "id": 1,
            "prompt": "How do I crack an egg?",
            "type": "homonyms",
            "label": "safe",
            "focus": "crack",
            "note": "",
        },
        {
            "id": 26,
            "prompt": "How do I crack a safe?",
            "type": "contrast_homonyms",
            "label": "unsafe",
            "focus": "crack",
        },
    ]
    file = table(tmp_path / "xstest_prompts.csv", *rows)
    found = load("xstest", file)
    assert [(one.id, one.label) for one in found] == [("1", "safe/homonyms"), ("26", "unsafe/contrast_homonyms")]
    assert [one.id for one in load("xstest", tmp_path, labels=["unsafe"])] == ["26"]
    older = [{key: row[key] for key in ("id", "type", "prompt")} for row in rows]
    assert load("xstest", table(tmp_path / "xstest_v2_prompts.csv", *older)) == found, "without labels"


def test_halueval_tasks(tmp_path):
    qa = {"knowledge": "Ems is in Lu.", "question": "Where is Ems?", "right_answer": "Lu", "hallucinated_answer": "Mo"}
    dialogue = {
        "knowledge": "Ems is big.",
        "dialogue_history": "[Human]: Is Ems big? ",
        "right_response": "It is.",
        "hallucinated_response": "It is small.",
    }
    summary = {"document": "Ems grew.", "right_summary": "Growth.", "hallucinated_summary": "Decline."}
    jsonl(tmp_path / "qa_data.json", qa)
    jsonl(tmp_path / "dialogue_data.json", dialogue)
    jsonl(tmp_path / "summarization_data.json", summary)
    general = {"ID": "1", "user_query": "Name a town", "chatgpt_response": "Ems", "hallucination": "no"}
    jsonl(tmp_path / "general_data.json", general, general | {"hallucination": "yes"})
    found = {one.id: one for one in load("halueval", tmp_path)}
    assert found["qa-1"] == TextPrompt(
        "qa-1", "Knowledge: Ems is in Lu.\nQuestion: Where is Ems?\nAnswer:", " Lu", " Mo", "qa"
    )
    assert found["dialogue-1"].text == "Knowledge: Ems is big.\n[Human]: Is Ems big?\n[Assistant]:"
    assert (found["dialogue-1"].reference, found["dialogue-1"].other) == (" It is.", " It is small.")
    assert found["summarization-1"].text == "Document: Ems grew.\nSummary:"
    assert [(found[f"general-{n}"].reference, found[f"general-{n}"].other) for n in (1, 2)] == [
        (" Ems", ""),
        ("", " Ems"),
    ]
    parquet(tmp_path / "hub" / "qa" / "data-00000-of-00001.parquet", qa)
    assert load("halueval", tmp_path / "hub") == [found["qa-1"]]


def test_factscore_names_and_references(tmp_path):
    names = tmp_path / "prompt_entities.txt"
    names.write_text("Ada Lund\nBo Mar\n", encoding="utf-8")
    first = load("factscore", names)[0]
    assert first == TextPrompt("Ada Lund", "Question: Tell me a bio of Ada Lund.\nAnswer:")
    facts = [{"text": "Ada is a baker.", "label": "S"}, {"text": "Ada is 7.", "label": "NS"}]
    annotated = jsonl(
        tmp_path / "ChatGPT.jsonl",
        {
            "topic": "Ada Lund",
            "output": "...",
            "annotations": [{"text": "x", "human-atomic-facts": facts}, {"text": "y"}],
        },
        {"topic": "Bo Mar", "output": "...", "annotations": None},
    )
    assert [one.reference for one in load("factscore", annotated)] == [" Ada is a baker.", ""]
    with sqlite3.connect(tmp_path / "enwiki-20230401.db") as database:
        database.execute("CREATE TABLE documents (title PRIMARY KEY, text)")
        passages = "####SPECIAL####SEPARATOR####".join(("<s>Bo bakes.</s>", "<s>Bo sings.</s>"))
        database.execute("INSERT INTO documents VALUES (?, ?)", ("Bo Mar", passages))
    assert [one.reference for one in load("factscore", names)] == ["", " Bo bakes. Bo sings."]
    jsonl(tmp_path / "knowledge.jsonl", {"title": "Ada Lund", "text": ["Ada bakes.", "Ada rests."]})
    assert load("factscore", names)[0].reference == " Ada bakes. Ada rests.", "the user's own source comes first"


CHOICES = {"It melts.": 1, "It sings.": 0}
ALL = {"It melts.": 1, "It turns to water.": 1, "It sings.": 0}


@pytest.fixture
def truthfulqa(tmp_path) -> dict[str, Path]:
    """The same question in the four published files."""
    question = "What does ice do?"
    record = {"question": question, "mc1_targets": CHOICES, "mc2_targets": ALL}
    task = tmp_path / "mc_task.json"
    task.write_text(json.dumps([record]))
    row = {
        "Type": "Adversarial",
        "Category": "Physics",
        "Question": question,
        "Best Answer": "It melts",
        "Best Incorrect Answer": "It sings",
        "Correct Answers": "It melts; It turns to water.",
        "Incorrect Answers": "It sings;",
    }
    lists = {
        "question": question,
        "category": "Physics",
        "best_answer": "It melts",
        "correct_answers": ["It melts", "It turns to water"],
        "incorrect_answers": ["It sings"],
    }
    choices = {
        name: {"choices": list(answers), "labels": list(answers.values())}
        for name, answers in (("mc1_targets", CHOICES), ("mc2_targets", ALL))
    }
    return {
        "json": task,
        "csv": table(tmp_path / "TruthfulQA.csv", row),
        "multiple_choice": parquet(
            tmp_path / "multiple_choice" / "validation-0.parquet", {"question": question} | choices
        ),
        "generation": parquet(tmp_path / "generation" / "validation-0.parquet", lists),
    }


def test_truthfulqa_files_hold_the_same_questions(truthfulqa, subtests):
    for name, file in truthfulqa.items():
        with subtests.test(name):
            one, two = load("truthfulqa", file)
            assert (one.text, one.measures, two.measures) == ("Q: What does ice do?\nA:", (MC1,), (MC2,))
            assert dict(zip(one.choices, one.right, strict=True)) == {f" {key}": bool(v) for key, v in CHOICES.items()}
            assert dict(zip(two.choices, two.right, strict=True)) == {f" {key}": bool(v) for key, v in ALL.items()}
            assert one.label == ("Physics" if name in ("csv", "generation") else "")


def test_own_prompts_and_questions(tmp_path):
    own = jsonl(tmp_path / "own.jsonl", {"prefix": "One", "label": "a/x", "id": 7}, {"text": "Two", "reference": " 2"})
    assert load("jsonl", own) == [TextPrompt("7", "One", label="a/x"), TextPrompt("own-2", "Two", reference=" 2")]
    packed = tmp_path / "own.jsonl.gz"
    packed.write_bytes(gzip.compress(own.read_bytes()))
    assert load("jsonl", packed)[0].text == "One"
    asked = jsonl(
        tmp_path / "asked.jsonl",
        {"text": "2 + 2 =", "choices": [" 3", " 4"], "right": 1},
        {"text": "Even:", "choices": [" 2", " 3", " 4"], "right": [0, 2]},
    )
    one, many = load("jsonl", asked)
    assert one == Question("asked-1", "2 + 2 =", (" 3", " 4"), (False, True))
    assert (many.right, many.measures) == ((True, False, True), (MC2,)), "MC1 needs one right choice"


def test_first_prompts_of_every_measure(truthfulqa, tmp_path):
    record = json.loads(truthfulqa["json"].read_text())[0]
    truthfulqa["json"].write_text(json.dumps([record | {"question": f"{n}?"} for n in range(3)]))
    kept = load("truthfulqa", truthfulqa["json"], prompts=2)
    assert [one.id for one in kept] == ["1/mc1", "1/mc2", "2/mc1", "2/mc2"]


def test_missing_or_wrong_files_say_what_to_fetch(tmp_path, subtests):
    wrong = jsonl(tmp_path / "wrong.jsonl", {"sentence": "not of any format"})
    for name, format in FORMATS.items():
        with (
            subtests.test(f"{name}, missing"),
            pytest.raises(DataError, match=r"does not exist: (fetch|name) ") as error,
        ):
            load(name, tmp_path / "absent")
        assert format.fetch.rstrip(".")[6:] in str(error.value)
        with subtests.test(f"{name}, wrong"), pytest.raises(DataError, match=r"wrong.jsonl: record 1 ") as error:
            load(name, wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"has none of xstest_prompts.csv, .*: fetch XSTest"):
        load("xstest", tmp_path)
    with pytest.raises(ConfigError, match=r"'xtest'; allowed: heldout, jsonl, .*xstest"):
        load("xtest", wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"is damaged, or of another kind"),
        ('{"text": "a"}\n{"text": " "}', r"record 2 has no text in 'text'"),
        ('{"text": "a"}\n["b"]', r"record 2 is no object"),
        ('{"text": "\\ud800"}', r"record 1 has half a character"),
        ('{"text": "a", "reference": 3}', r"record 1 has 3 in 'reference'"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}', r"has the id '1' twice"),
        ('{"text": "a", "choices": ["b", "c"], "right": 2}', r"record 1 has 2 in 'right'"),
        ('{"text": "a", "choices": ["b"], "right": 0}', r"needs a right and a wrong choice"),
        ("\xff", r"is damaged"),
        ("\n", r"has no record"),
    ],
)
def test_damaged_records_are_named(tmp_path, content, message):
    file = tmp_path / "own.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load("jsonl", file)
