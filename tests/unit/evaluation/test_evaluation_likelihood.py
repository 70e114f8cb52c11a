"""Perplexity and multiple choice by likelihood, on a tiny model, against one forward pass per text."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import pytest
import torch

from megatron_rlpt.config import Config, Dtype, PromptSetConfig, SourceConfig
from megatron_rlpt.errors import ModelError
from megatron_rlpt.evaluation import likelihood
from megatron_rlpt.evaluation.likelihood import (
    LikelihoodModel,
    Passage,
    PassageLikelihood,
    choice_passages,
    choice_results,
    likelihood_results,
    passage_likelihoods,
    perplexity_results,
)
from megatron_rlpt.evaluation.models import EvaluatedModel
from megatron_rlpt.evaluation.prompt_sets import load_sets
from megatron_rlpt.evaluation.prompts import MC1, MC2, Question
from megatron_rlpt.evaluation.statistics import weighted_mean
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer

BOS = 1
TEXTS = ("the cat sat on the mat", "a dog ran under the big red tree and then saw the river", "stone")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_model) -> LikelihoodModel:
    return LikelihoodModel(tiny_model, "digest")


@pytest.fixture(scope="module")
def encode(tiny_model):
    return PolicyTokenizer(tiny_model).encode


@pytest.fixture(scope="module")
def logprobs(tiny_model):
    """Log-probabilities of the tokens after the first, each from one forward pass over all tokens before it."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_model).eval()

    def compute(tokens):
        with torch.no_grad():
            rows = loaded(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return [rows[index, token].item() for index, token in enumerate(tokens[1:])]

    return compute


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def all_gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait(20)
        values = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(20)
        return values

    def broadcast(self, value, source=0):
        return self.all_gather(value)[source]

    def run_on_all_ranks(self, work, phase):
        return work()


def test_a_document_counts_every_token_after_bos(model, encode, logprobs, tmp_path):
    found = passage_likelihoods(model, [Passage(text) for text in TEXTS], tmp_path)
    for text, one in zip(TEXTS, found, strict=True):
        assert one.nats == pytest.approx(sum(logprobs([BOS, *encode(text)])), abs=1e-3)
        assert (one.tokens, one.bytes) == (len(encode(text)), len(text))


def test_windows_overlap_by_half_and_count_each_token_once(model, encode, logprobs, tmp_path):
    text = " ".join(TEXTS * 3)
    tokens = [BOS, *encode(text)]
    (found,) = passage_likelihoods(model, [Passage(text, window=8)], tmp_path)
    expected = sum(logprobs(tokens[:8]))
    for start in range(8, len(tokens), 4):
        expected += sum(logprobs(tokens[start - 4 : start + 4])[3:])
    assert found.nats == pytest.approx(expected, abs=1e-3)
    assert found.tokens == len(tokens) - 1
    long = " ".join(TEXTS * 20)
    (beyond,) = passage_likelihoods(model, [Passage(long)], tmp_path)
    assert beyond.tokens == len(encode(long)) > 128, "the model's own context of 128 is a window as well"


def test_a_long_question_loses_its_beginning_not_its_choices(model, encode, logprobs, tmp_path):
    text, choice = " ".join(TEXTS), " the red house"
    (found,) = passage_likelihoods(model, [Passage(choice, text, window=10)], tmp_path)
    tokens = [*encode(text), *encode(choice)][-10:]
    assert found.nats == pytest.approx(sum(logprobs(tokens)[-3:]), abs=1e-3)
    (with_bos,) = passage_likelihoods(model, [Passage(" mat", "the cat", add_bos=True)], tmp_path)
    assert with_bos.nats == pytest.approx(logprobs([BOS, *encode("the cat mat")])[-1], abs=1e-3)


def test_the_context_of_several_choices_runs_once(model, tmp_path, monkeypatch):
    prefixes = []
    whole = likelihood.FrozenModel.mean_loglikelihood

    def spy(self, given, continuations):
        prefixes.extend(given)
        return whole(self, given, continuations)

    monkeypatch.setattr(likelihood.FrozenModel, "mean_loglikelihood", spy)
    questions = [Question("1", "the cat", (" sat", " ran"), (True, False)), Question("2", "a dog", (" sat",), (True,))]
    passage_likelihoods(model, choice_passages(questions), tmp_path)
    assert len(prefixes) == 2


def test_stored_values_are_not_computed_again(model, tmp_path, monkeypatch):
    passages = [Passage(text) for text in TEXTS]
    first = passage_likelihoods(model, passages[:2], tmp_path)
    (file,) = tmp_path.rglob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:20])  # killed while it wrote the second value
    scored = []
    score = likelihood._Scorer.score
    monkeypatch.setattr(likelihood._Scorer, "score", lambda self, given: scored.extend(given) or score(self, given))
    assert passage_likelihoods(model, passages[:2], tmp_path)[1].nats == pytest.approx(first[1].nats, abs=1e-4)
    assert len(scored) == 1
    monkeypatch.setattr(likelihood, "_Scorer", None)
    assert passage_likelihoods(model, passages[:2], tmp_path)[0] == first[0], "nothing is loaded"
    assert all(json.loads(line) for line in file.read_text().splitlines() if line.endswith("}"))
    with pytest.raises(TypeError):
        passage_likelihoods(replace(model, digest="other"), passages[:2], tmp_path)


def test_ranks_share_the_passages(model, tmp_path, monkeypatch):
    lock, load = threading.Lock(), likelihood._Scorer

    def load_alone(given):  # transformers cannot load in two threads at once
        with lock:
            return load(given)

    monkeypatch.setattr(likelihood, "_Scorer", load_alone)
    passages = [Passage(text) for text in TEXTS] + choice_passages(
        [Question("1", "a", (" cat", " dog"), (True, False))]
    )
    alone = passage_likelihoods(model, passages, tmp_path / "alone")
    barrier, board, found = threading.Barrier(2), {}, {}

    def work(rank):
        ranks = ThreadRanks(rank, 2, barrier, board)
        found[rank] = passage_likelihoods(model, passages, tmp_path / "shared", ranks)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert [one.nats for one in found[0]] == pytest.approx([one.nats for one in alone], abs=1e-4)
    stored = [file.read_text() for file in sorted((tmp_path / "shared").rglob("*.jsonl"))]
    assert [text.count("\n") for text in stored] in ([2, 3], [3, 2])
    choices = [likelihood._key(passage) for passage in passages[-2:]]
    assert any(all(key in text for key in choices) for text in stored), "the question runs once"


def test_a_model_without_finite_likelihoods_is_named(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        loaded.get_input_embeddings().weight[5] = math.nan
    loaded.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match=r"no likelihood under .*broken: the model returns no finite number"):
        passage_likelihoods(LikelihoodModel(tmp_path / "broken", "d"), [Passage(TEXTS[0])], tmp_path / "cache")


def test_perplexity_is_over_tokens_and_bits_over_bytes():
    found = [PassageLikelihood(-math.log(8) * 10, 10, 30), PassageLikelihood(-math.log(2) * 30, 30, 90)]
    perplexity, bits = perplexity_results("m", "heldout", found)
    assert perplexity.value == pytest.approx(2 ** ((3 * 10 + 30) / 40))
    assert bits.value == pytest.approx((3 * 10 + 30) / 120)
    low, high = perplexity.ci95
    assert (low, high) == (pytest.approx(2), pytest.approx(8)), "resamples of two documents are either one, or both"
    assert (perplexity.n, perplexity.prompts, perplexity.higher_is_better) == (40, 2, False)
    assert perplexity_results("m", "heldout", found[:1])[0].ci95 is None
    assert weighted_mean([3.0, 1.0], [1.0, 3.0])[0] == 1.0


def test_choices_by_likelihood_per_byte_and_by_mass():
    questions = [
        Question("a", "q", (" no", " the long right one"), (False, True)),
        Question("b", "q", (" x", " y"), (True, False), measures=(MC1,)),
        Question("c", "q", (" x", " y", " z"), (True, True, False), measures=(MC2,)),
    ]
    likelihoods = [(-6.0, 3), (-8.0, 19), (-1.0, 2), (-2.0, 2), (-1.0, 2), (-1.0, 2), (-1.0, 2)]
    found = [PassageLikelihood(nats, 1, size) for nats, size in likelihoods]
    results = {one.measure: one for one in choice_results("m", "set", questions, found)}
    assert results["mc1"].value == 0.5, "the short wrong choice is likelier as a whole"
    assert results["mc1_norm"].value == 1.0
    assert results["mc2"].value == pytest.approx((math.exp(-8) / (math.exp(-6) + math.exp(-8)) + 2 / 3) / 2)
    assert [results[name].prompts for name in ("mc1", "mc1_norm", "mc2")] == [2, 2, 2]
    assert results["mc1_norm"].ci95[0] < 0.5, "two right answers of two are little evidence"


def test_every_set_is_measured_by_what_it_asks_for(tiny_model, corpus, encode, logprobs, tmp_path):
    asked = [
        {"text": "the cat", "choices": [" sat", " ran"], "right": 0},
        {"text": "a dog", "choices": [" saw", " ran"], "right": 1},
    ]
    told = [{"text": "the cat", "reference": " sat on"}, {"text": "a dog", "reference": " ran"}, {"text": "big"}]
    for name, records in (("asked", asked), ("told", told)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    config = Config()
    config.model.path, config.model.dtype = str(tiny_model), Dtype.fp32
    config.data.heldout = [SourceConfig(path=str(corpus))]
    config.data.min_prefix, config.data.max_prefix, config.data.suffix_length = 4, 24, 8
    config.evaluation.prefixes, config.evaluation.perplexity_characters = 3, 40
    config.evaluation.measures = ["quality", "perplexity"]
    config.evaluation.sets = [
        PromptSetConfig(name="asked", path=str(tmp_path / "asked.jsonl")),
        PromptSetConfig(name="told", path=str(tmp_path / "told.jsonl"), measures=["perplexity"]),
    ]
    sets = load_sets(config, PolicyTokenizer(tiny_model))
    model = EvaluatedModel("m", tiny_model, "hf", tiny_model, "digest", True)
    results = {(one.set, one.measure): one for one in likelihood_results(config, [model], sets, tmp_path / "cache")}
    texts = [json.loads(line)["text"][:40] for line in corpus.read_text().splitlines()[:3]]
    nats = [-value for text in texts for value in logprobs([BOS, *encode(text)])]
    assert results["heldout", "perplexity"].value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3)
    assert results["heldout", "bits_per_byte"].value == pytest.approx(sum(nats) / 120 / math.log(2), rel=1e-3)
    told_nats = sum(logprobs(encode("the cat sat on"))[1:]) + logprobs(encode("a dog ran"))[-1]
    assert results["told", "perplexity"].value == pytest.approx(math.exp(-told_nats / 3), rel=1e-3)
    assert results["told", "perplexity"].prompts == 2, "one prompt has no reference"
    assert {measure for name, measure in results if name == "asked"} == {"mc1", "mc1_norm", "mc2"}
    config.evaluation.perplexity_characters = 0
    whole = likelihood_results(config, [model], sets[:1], tmp_path / "cache")
    sizes = [len(json.loads(line)["text"]) for line in corpus.read_text().splitlines()[:3]]
    assert whole[1].n == sum(sizes), "0 is all"
