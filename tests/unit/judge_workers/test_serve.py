"""Start of a judge worker."""

import asyncio
import logging

import pytest

from megatron_rlpt.config import load_config
from megatron_rlpt.judge_workers import serve


class LateTrainer:
    """A buffer whose trainer appears after ``enough`` log records, or after many reads."""

    def __init__(self, records: list[logging.LogRecord], enough: int) -> None:
        self.records, self.enough, self.looks = records, enough, 0

    def announced(self, kind: str) -> dict[str, str]:
        self.looks += 1
        return {"trainer": "settings"} if len(self.records) >= self.enough or self.looks > 2000 else {}


@pytest.mark.parametrize(
    ("where", "url", "name"),
    [
        ([], "sqlite:///{}/runs/mine/buffer.sqlite", "mine"),
        (["buffer.url=redis://store:6379/0", "buffer.name=other"], "redis://store:6379/0", "other"),
    ],
)
def test_a_worker_says_again_and_again_for_what_it_waits(where, url, name, tmp_path, monkeypatch, caplog):
    config = load_config(
        None,
        [f"run.dir={tmp_path}/runs/mine", "model.path=m", "train.steps=1", "data.sources=[{path: a}]", *where],
    )
    clock = [0.0]

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(serve.time, "monotonic", lambda: clock[0])
    agreed = []
    monkeypatch.setattr(serve, "require_same_settings", lambda config, announced: agreed.append(announced))
    caplog.set_level(logging.INFO, logger="megatron_rlpt")
    # One handler, whatever earlier tests and pytest have attached to the logger.
    records = list[logging.LogRecord]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logging.getLogger("megatron_rlpt"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("megatron_rlpt"), "propagate", False)
    asyncio.run(serve._wait_for_trainer(config, LateTrainer(records, 5)))
    assert agreed == ["settings"]
    first, *again = records
    assert first.getMessage() == "waiting for the trainer to open the rollout buffer"
    assert all(record.getMessage().startswith("still waiting for the trainer") for record in again)
    assert all(record.levelno == logging.WARNING for record in again)
    fields = [record.fields for record in records]
    assert all((one["buffer"], one["run"]) == (url.format(tmp_path), name) for one in fields)
    assert all("buffer.url" in one["check"] and "rlpt train" in one["check"] for one in fields[1:])
    assert [one["waited"] for one in fields[1:]] == ["30 s", "90 s", "210 s", "450 s"], "at growing intervals"
