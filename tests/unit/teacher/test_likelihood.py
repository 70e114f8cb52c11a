import math

import pytest
import torch

from megatron_rlpt.config import Dtype, LikelihoodConfig
from megatron_rlpt.errors import ModelError
from megatron_rlpt.teacher.likelihood import LikelihoodJudge
from megatron_rlpt.teacher.likelihood_reward import repetition
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

VOCABULARY = 97


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a model this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def judge_of(folder, **fields):
    return LikelihoodJudge(folder, LikelihoodConfig(**fields), "cpu", Dtype.fp32)


def random_tokens(generator, length):
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())


def make_groups(lengths):
    """One group per entry: (prefix length, candidate lengths)."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for number, (prefix_length, candidate_lengths) in enumerate(lengths):
        prefix = random_tokens(generator, prefix_length)
        candidates = [random_tokens(generator, length) for length in candidate_lengths]
        episode = Episode(str(number), prefix, candidates[0], "c", "d", 0)
        groups.append(Group(episode, tuple(Candidate(Source.ROLLOUT, tokens) for tokens in candidates)))
    return groups


def plain(model, prefix, tokens):
    """The unshared computation: the whole sequence in one forward pass, nothing batched or cached."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prefix, *tokens]])).logits[0]
    logprobs = logits.log_softmax(-1)
    picked = [logprobs[len(prefix) + index - 1, token].item() for index, token in enumerate(tokens)]
    return sum(picked) / len(picked)


LENGTHS = [(9, [6, 6, 1, 4]), (9, [6, 2]), (1, [5, 5, 5]), (17, [3])]


@pytest.mark.parametrize("batch_tokens", [1, 30, 16384])
def test_sharing_the_prefix_changes_nothing(folder, batch_tokens):
    judge = judge_of(folder, batch_tokens=batch_tokens, repetition_weight=2.0, repetition_ngram=1)
    groups = make_groups(LENGTHS)
    for group in judge.judge(groups):
        for candidate, reward in zip(group.candidates, group.rewards, strict=True):
            assert isinstance(reward, Reward)
            expected = plain(judge.model._model, group.episode.prefix, candidate.tokens)
            repeated = repetition(candidate.tokens, 1)
            assert reward.detail["loglik_mean"] == pytest.approx(expected, abs=1e-4)
            assert reward.detail["repetition"] == repeated
            assert reward.value == pytest.approx(expected - 2.0 * repeated, abs=1e-4)
            assert reward.judge.startswith("likelihood/")


def test_the_prefix_is_run_once_per_group(folder, monkeypatch):
    judge = judge_of(folder)
    shapes = []
    forward = judge.model._forward

    def spy(tokens, cache, **options):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, cache, **options)

    monkeypatch.setattr(judge.model, "_forward", spy)
    judge.judge(make_groups([(9, [6] * 4), (9, [6] * 4), (5, [6] * 2)]))
    # Two groups share one prefix pass; the last token of a candidate is a target only.
    assert shapes == [(2, 9), (8, 5), (1, 5), (2, 5)]


def test_batch_tokens_bounds_every_pass(folder, monkeypatch):
    judge = judge_of(folder, batch_tokens=40)
    held = []
    forward = judge.model._forward

    def spy(tokens, cache, **options):
        past = 0 if cache is None else cache.get_seq_length()
        held.append(tokens.shape[0] * (tokens.shape[1] + past))
        return forward(tokens, cache, **options)

    monkeypatch.setattr(judge.model, "_forward", spy)
    judge.judge(make_groups([(9, [6] * 5), (9, [6] * 5), (9, [6] * 5), (9, [6]), (9, [6])]))
    assert max(held) <= 40


def test_a_failure_is_not_a_score(folder):
    judge = judge_of(folder)
    (group,) = make_groups([(4, [3, 3, 3])])
    bad = (
        group.candidates[0],
        Candidate(Source.ROLLOUT, ()),
        Candidate(Source.ROLLOUT, (1, VOCABULARY)),
        group.candidates[1],
        Candidate(Source.ROLLOUT, (1,) * 61),
    )
    rewards = judge.judge([Group(group.episode, bad)])[0].rewards
    assert [type(reward) for reward in rewards] == [Reward, Failed, Failed, Reward, Failed]
    assert rewards[1].reason == "empty candidate"
    assert rewards[2].reason == "token id outside the teacher's vocabulary of 97"
    assert rewards[4].reason == "longer than the teacher's context of 64 tokens"


def test_not_finite_is_a_failure(folder):
    judge = judge_of(folder)
    with torch.no_grad():
        judge.model._model.get_output_embeddings().weight[5] = math.inf
    rewards = judge.judge(make_groups([(4, [3, 3])]))[0].rewards
    assert all(isinstance(reward, Failed) and "not finite" in reward.reason for reward in rewards)


def test_nothing_to_judge(folder):
    judge = judge_of(folder)
    assert judge.judge([]) == []
    (group,) = make_groups([(4, [3])])
    assert judge.judge([Group(group.episode, ())])[0].rewards == ()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"absent; it needs to be a local Hugging Face folder"):
        judge_of(tmp_path / "absent")


def test_a_family_that_scales_its_logits_counts_as_it_does(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
        logits_scaling=8.0,
    )
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    judge = judge_of(tmp_path)
    for group in judge.judge(make_groups(LENGTHS)):
        for candidate, reward in zip(group.candidates, group.rewards, strict=True):
            expected = plain(judge.model._model, group.episode.prefix, candidate.tokens)
            assert reward.detail["loglik_mean"] == pytest.approx(expected, abs=1e-4)
