"""Reading ahead gives the same episodes, and a state that knows nothing of what was not taken."""

from __future__ import annotations

import json
import threading

import pytest
from corpora import encode, settings, source, story, write

from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import DataError
from megatron_rlpt.trainer.episode_feed import EpisodeFeed


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens the same stream anew; every fifth record is malformed."""
    path = write(tmp_path / "c", "jsonl", [story("a", index, 12 + index % 5) for index in range(20)])
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        (path,) = path.glob("*.jsonl")
        lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" + ("broken\n" if n % 5 == 4 else "") for n, line in enumerate(lines)))
    config = settings(source(path), buffer=6, max_bad_fraction=1.0)
    return lambda: EpisodeStream(config, encode, seed=3, quarantine=tmp_path / "quarantine.jsonl")


def test_every_batch_state_and_metric_is_that_of_the_stream_alone(opened):
    alone, feed = opened(), EpisodeFeed(opened(), Ranks(), 4)
    assert feed.state_dict() == alone.state_dict()
    for _ in range(12):
        assert feed.take() == alone.take(4)
        assert feed.state_dict() == alone.state_dict()
        assert feed.metrics() == alone.metrics()
    feed.close()


def test_a_resumed_feed_goes_on_with_the_batch_that_was_read_but_not_taken(opened):
    first = EpisodeFeed(opened(), Ranks(), 4)
    for _ in range(3):
        first.take()
    state = json.loads(json.dumps(first.state_dict()))
    expected = [first.take() for _ in range(3)]
    first.close()
    second = EpisodeFeed(opened(), Ranks(), 4)
    assert second.load_state_dict(state) is None
    assert [second.take() for _ in range(3)] == expected
    second.close()


class Ending:
    """A stream of two batches that then fails; tells when a batch is being read."""

    def __init__(self):
        self.taken = 0
        self.reading = threading.Semaphore(0)

    def take(self, count):
        self.reading.release()
        self.taken += count
        if self.taken > 2 * count:
            raise DataError("no further document")
        return list(range(count))

    def state_dict(self):
        return {"taken": self.taken}

    def metrics(self):
        return {"data/read": self.taken}


def test_the_next_batch_is_read_meanwhile_and_its_error_counts_only_once_it_is_taken():
    stream = Ending()
    feed = EpisodeFeed(stream, Ranks(), 3)
    for number in (1, 2):
        feed.take()
        for _ in range(2 if number == 1 else 1):
            assert stream.reading.acquire(timeout=60), "nothing is read ahead"
        assert feed.state_dict() == {"taken": 3 * number}
    with pytest.raises(DataError, match="no further document"):
        feed.take()
    feed.close()
