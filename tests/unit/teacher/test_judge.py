import subprocess
import sys

import pytest

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.records import Candidate, Episode, Failed, Group, Score, Source
from megatron_rlpt.teacher.judge import check_failure_rate


def group_of(*outcomes):
    candidates = tuple(Candidate(Source.ROLLOUT, (index,)) for index in range(len(outcomes)))
    return Group(Episode("e", (1,), (2,), "c", "d", 0), candidates, outcomes)


GOOD = Score(1.0, "j", "p")


def test_rate_is_over_all_candidates():
    groups = [group_of(GOOD, Failed("a")), group_of(GOOD, GOOD)]
    assert check_failure_rate(groups, 0.25) == 0.25
    assert check_failure_rate([], 0.0) == 0.0


def test_above_the_limit_names_rate_limit_and_reasons():
    groups = [group_of(GOOD, Failed("malformed JSON"), Failed("empty reply"), Failed("malformed JSON"))]
    with pytest.raises(TeacherError) as caught:
        check_failure_rate(groups, 0.5)
    assert str(caught.value) == (
        "the judge failed on 3 of 4 candidates (75%), more than teacher.max_failure_rate = 0.5 allows; "
        "most frequent: 2 x malformed JSON; 1 x empty reply"
    )


def test_the_package_and_its_interfaces_import_nothing_heavy():
    code = (
        "import sys, megatron_rlpt.teacher.judge, megatron_rlpt.teacher.generative, megatron_rlpt.teacher.rewriter, "
        "megatron_rlpt.teacher.build; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
