"""Groups for tests of the rollout buffer."""

from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source


def group(number: int, version: int = 0) -> Group:
    episode = Episode(f"episode-{number}", (number, 1, 2), (3, 4), "corpus", f"file:{number}", 3)
    rollout = Candidate(Source.ROLLOUT, (5, number), version, number, "length", (-0.1 * number, -1 / 3))
    return Group(episode, (Candidate(Source.ORIGINAL, (3, 4)), rollout))


def judged(given: Group, value: float = 0.0) -> Group:
    rewards = (Reward(value, "judge", "v1", {"replies": ["good", "bad"]}), Failed("empty reply", {"tries": 3}))
    return Group(given.episode, given.candidates, rewards)


def items(*numbers: int) -> list[tuple[int, Group]]:
    return [(number, group(number)) for number in numbers]
