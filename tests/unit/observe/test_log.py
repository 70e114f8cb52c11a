"""One line per event, fields as key=value, on standard error and in run.log."""

import logging
import re
import shutil

from megatron_rlpt.observe import get_logger, setup_logging


def test_line_goes_to_stderr_and_file(tmp_path, capsys):
    setup_logging(tmp_path / "run")
    get_logger("rollout").info("weights updated", version=3, seconds=0.123456789, folder="a b", note="")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert (tmp_path / "run" / "run.log").read_text() == shown.err
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO rollout: "
        r'weights updated version=3 seconds=0\.123457 folder="a b" note=""\n',
        shown.err,
    )


def test_an_event_is_one_line_whatever_is_in_it(capsys):
    setup_logging()
    get_logger("megatron_rlpt.teacher.judge").warning("bad\nreply %s", "x", reply="a\nb")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert 'WARNING teacher.judge: bad\\nreply x reply="a\\nb"' in line


def test_a_traceback_follows_its_line(capsys):
    setup_logging()
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        get_logger("run").exception("step failed", step=3)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith("ERROR run: step failed step=3")
    assert rest[-1] == "RuntimeError: broken"


def test_level_and_set_up_again(tmp_path, capsys):
    setup_logging(tmp_path / "a", level=logging.WARNING)
    setup_logging(tmp_path / "b", level=logging.WARNING)
    log = get_logger("run")
    log.info("unseen")
    log.warning("seen")
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "a" / "run.log").read_text() == ""
    assert "seen" in (tmp_path / "b" / "run.log").read_text()


def test_standard_error_is_looked_up_at_every_line(monkeypatch, capsys):
    import io
    import sys

    setup_logging()
    replaced = io.StringIO()
    monkeypatch.setattr(sys, "stderr", replaced)
    get_logger("run").info("above the progress display")
    assert "above the progress display" in replaced.getvalue()


def test_a_log_file_whose_folder_is_gone_ends_no_run(tmp_path, capsys):
    setup_logging(tmp_path / "run")
    for handler in logging.getLogger("megatron_rlpt").handlers:
        handler.close()
    shutil.rmtree(tmp_path / "run")
    for _ in range(2):
        get_logger("run").info("next step")
    lines = capsys.readouterr().err.splitlines()
    assert sum("next step" in line for line in lines) == 2
    assert sum("the log file cannot be written" in line for line in lines) == 1
