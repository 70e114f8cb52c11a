import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlpt.teacher.bradley_terry import PRIOR_PRECISION, expected_shares, strengths, win_probability


def slope(found, player, wins):
    """Derivative of the log-posterior with respect to one strength, written out."""
    total = -PRIOR_PRECISION * found[player]
    for (winner, loser), count in wins.items():
        if player in (winner, loser):
            expected = 1 / (1 + math.exp(found[loser] - found[winner]))
            total += count * (1 - expected) * (1 if player == winner else -1)
    return total


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (3, 1), (2, 2), (0, 400)])
def test_two_players_have_a_closed_form(won, lost):
    """By symmetry the strengths are x and -x with won - (won + lost) sigmoid(2x) = precision x."""
    one, other = strengths(2, {(0, 1): won, (1, 0): lost})
    assert one == -other
    low, high = -50.0, 50.0
    for _ in range(200):
        x = (low + high) / 2
        left = won - (won + lost) / (1 + math.exp(-2 * x)) - PRIOR_PRECISION * x
        low, high = (x, high) if left > 0 else (low, x)
    assert one == pytest.approx(low, abs=1e-8)
    if won and lost:
        many = strengths(2, {(0, 1): won * 10**6, (1, 0): lost * 10**6})
        assert many[0] - many[1] == pytest.approx(math.log(won / lost), abs=1e-5), "without a prior: the log of odds"


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.integers(1, 30))
def test_the_answer_is_where_the_posterior_is_flat(players, seed, games):
    draw = random.Random(seed)
    wins = {}
    for _ in range(games):
        pair = tuple(draw.sample(range(players), 2))
        wins[pair] = wins.get(pair, 0) + draw.choice([1, 1, 5])
    found = strengths(players, wins)
    assert all(abs(slope(found, player, wins)) < 1e-6 for player in range(players))


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(0, 10**6))
def test_all_met_equally_often_orders_as_shares_of_wins(players, votes, seed):
    draw = random.Random(seed)
    wins, won = {}, [0] * players
    for one in range(players):
        for other in range(one + 1, players):
            for _ in range(votes):
                winner, loser = draw.sample([one, other], 2)
                wins[winner, loser] = wins.get((winner, loser), 0) + 1
                won[winner] += 1
    shares = expected_shares(strengths(players, wins))
    for one in range(players):
        for other in range(players):
            assert (won[one] > won[other]) == (shares[one] > shares[other])


@settings(deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**6))
def test_names_do_not_matter(players, seed):
    draw = random.Random(seed)
    wins = {tuple(draw.sample(range(players), 2)): draw.randint(1, 3) for _ in range(players)}
    names = draw.sample(range(players), players)
    renamed = strengths(players, {(names[winner], names[loser]): count for (winner, loser), count in wins.items()})
    # Strengths are rounded; a sum in another order may fall on the other side.
    assert [renamed[name] for name in names] == pytest.approx(strengths(players, wins), abs=2e-9)


def test_strength_of_opponents_counts_and_the_unknown_are_in_the_middle():
    wins = {(0, 1): 1, (1, 2): 1, (0, 3): 1, (3, 2): 1, (4, 2): 1}
    found = strengths(6, wins)
    assert found[0] == max(found)
    assert found[2] == min(found)
    assert found[5] == 0.0
    assert found[4] < found[0], "beating the last is worth less than beating the middle"


def test_probabilities():
    assert win_probability(1.0, 1.0) == 0.5
    assert win_probability(math.log(3), 0.0) == pytest.approx(0.75)
    assert win_probability(1e9, -1e9) == 1.0
    assert expected_shares([0.0, 0.0, math.log(3)]) == pytest.approx([0.375, 0.375, 0.75])
    assert sum(expected_shares([0.3, -2.0, 5.0, 1.0])) == pytest.approx(2.0), "every pair has one winner"
