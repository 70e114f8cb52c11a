import math
import random

import numpy as np
import pytest

from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation.ngram_model import NgramModel

VOCAB = 60


def fitted(documents: list[list[int]], vocab_size: int, order: int = 4) -> NgramModel:
    model = NgramModel(vocab_size, order)
    model.fit(documents)
    return model


def markov_documents(count: int, length: int, seed: int) -> list[list[int]]:
    """Text in which every token has three likely successors."""
    table = random.Random(0)
    successors = [[table.randrange(VOCAB - 5) for _ in range(3)] for _ in range(VOCAB)]
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        document = [rng.randrange(VOCAB - 5)]
        while len(document) < length:
            document.append(rng.choice(successors[document[-1]]))
        documents.append(document)
    return documents


@pytest.fixture(scope="module")
def model() -> NgramModel:
    return fitted(markov_documents(40, 200, seed=1), VOCAB)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_probabilities_sum_to_one_after_any_context(order):
    documents = markov_documents(20, 100, seed=1)
    model = fitted(documents, VOCAB, order)
    seen = documents[0][10:20]
    never = [VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 1]
    end_of_document = documents[3][-6:]
    for context in ([], seen[:1], seen, never, seen + never[:1], never + seen[:1], end_of_document):
        probabilities = model.distribution(context)
        assert probabilities.shape == (VOCAB,)
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("documents", [[[3]], [[1, 2, 1, 2, 1, 2, 1, 2]], [[0], [1], [2, 2]], [[4] * 50]])
def test_tiny_texts_still_give_a_distribution(documents):
    model = fitted(documents, 8)
    for context in ([], [1], [1, 2, 1], [7, 7, 7], [4, 4, 4, 4]):
        assert model.distribution(context).sum() == pytest.approx(1, abs=1e-9)
        assert model.distribution(context).min() > 0


def test_lower_orders_count_contexts_not_occurrences():
    # Token 1 follows only token 0, but often; token 2 follows many tokens, each once. After an unseen context the
    # second is the better guess: that is what Kneser-Ney is for.
    documents = [[0, 1] * 30, *[[other, 2] for other in range(3, 15)]]
    after_unseen = fitted(documents, 20, order=2).distribution([19])
    assert after_unseen[2] > after_unseen[1]


def test_bigram_probability_done_by_hand():
    # One document "0 1 0 2": bigrams (start 0), (0 1), (1 0), (0 2), each once; no bigram occurs twice, so every
    # discount is one half. Left neighbours: two for token 0 (start and 1), one for 1, one for 2.
    model = fitted([[0, 1, 0, 2]], vocab_size=4, order=2)
    # One token has two left neighbours and two have one: discount 2 / (2 + 2 * 1) = 0.5 as well.
    base = 1.5 / 4 / 4
    unigram = np.array([1.5 / 4 + base, 0.5 / 4 + base, 0.5 / 4 + base, base])
    expected = np.array([0, 0.5, 0.5, 0]) / 2 + 0.5 * unigram
    np.testing.assert_allclose(model.distribution([0]), expected)


def test_score_is_the_mean_log_of_the_distribution(model):
    prefix, continuation = markov_documents(1, 12, seed=5)[0], markov_documents(1, 6, seed=6)[0]
    text = prefix + continuation
    expected = [
        math.log(model.distribution(text[:position])[text[position]]) for position in range(len(prefix), len(text))
    ]
    assert model.score([prefix], [continuation])[0] == pytest.approx(sum(expected) / len(expected))


def test_prefers_text_of_its_kind_to_the_same_words_shuffled(model):
    texts = markov_documents(20, 60, seed=7)
    prefixes, continuations = [text[:30] for text in texts], [text[30:] for text in texts]
    shuffled = [random.Random(1).sample(text, len(text)) for text in continuations]
    for own, mixed in zip(model.score(prefixes, continuations), model.score(prefixes, shuffled), strict=True):
        assert own > mixed


def test_documents_do_not_run_into_each_other():
    apart = fitted([[1, 2], [3, 4]] * 5, 8, order=2)
    assert apart.distribution([2])[3] == pytest.approx(fitted([[3, 4], [1, 2]] * 5, 8, order=2).distribution([2])[3])
    assert apart.distribution([2])[3] < apart.distribution([1])[2]


def test_empty_continuation_has_no_score(model):
    assert model.score([[1], [1], [1]], [[], [2], []])[::2] == [None, None]
    assert model.score([], []) == []
    assert model.score([[1]], [[]]) == [None]


@pytest.mark.parametrize("documents", [[], [[]], [[1, VOCAB]], [[-1, 2]]])
def test_unusable_text_is_named(documents):
    with pytest.raises(DataError, match=r"has no text|outside the vocabulary"):
        fitted(documents, VOCAB)


def test_scoring_outside_the_vocabulary_is_an_error(model):
    with pytest.raises(ValueError, match="vocabulary"):
        model.score([[1]], [[VOCAB]])
