import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem
from megatron_rlpt.teacher.judge import check_failure_rate, first_cause
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source


def group_of(*rewards):
    candidates = tuple(Candidate(Source.ROLLOUT, (index,)) for index in range(len(rewards)))
    return Group(Episode("e", (1,), (2,), "c", "d", 0), candidates, rewards)


GOOD = Reward(1.0, "j", "p")


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


def rewritten(failure=None):
    rewrite = (Candidate(Source.REWRITE, (7,)),) if failure is None else ()
    return Group(Episode("e", (1,), (2,), "c", "d", 0), rewrite, rewrite_failure=failure)


def test_failed_rewrites_count_against_the_rate_however_many_candidates_were_judged():
    failed = Failed("request rejected", {"status": 400, "message": "unsupported parameter\n max_tokens"})
    beside = replace(group_of(*[GOOD] * 16), rewrite_failure=failed)
    with pytest.raises(TeacherError) as caught:
        check_failure_rate([beside, rewritten(), rewritten(Failed("rewrite too short"))], 0.5)
    assert str(caught.value) == (
        "the rewriter failed on 2 of 3 suffixes (67%), more than teacher.max_failure_rate = 0.5 allows; most frequent: "
        '1 x request rejected; 1 x rewrite too short; the first: "unsupported parameter max_tokens"'
    )
    assert check_failure_rate([beside, rewritten()], 0.5) == 0.0
    assert check_failure_rate([group_of(GOOD)] * 3, 0.0) == 0.0, "where no rewrite is asked for none fails"


def test_above_the_limit_names_the_first_cause_in_the_servers_own_words():
    first = ServerProblem(Fault.REJECTED, {"status": 400, "message": "unsupported parameter\n max_tokens"}).failed()
    undecided = Failed("no comparison decided").because_of(first)
    later = Failed("no comparison decided").because_of(ServerProblem(Fault.SERVER, {"message": "gone"}).failed())
    with pytest.raises(TeacherError) as caught:
        check_failure_rate([group_of(GOOD, Failed("empty reply"), undecided, later)], 0.5)
    assert str(caught.value) == (
        "the judge failed on 3 of 4 candidates (75%), more than teacher.max_failure_rate = 0.5 allows; most frequent: "
        "1 x empty reply; 1 x no comparison decided: request rejected; 1 x no comparison decided: server error; "
        'the first: "400: unsupported parameter max_tokens"'
    )


def test_what_no_judge_was_asked_is_no_failure_of_the_judge():
    groups = [group_of(GOOD, GOOD, Failed("empty candidate"), Failed("stale rollout"), Failed("stale rollout"))]
    assert check_failure_rate(groups, 0.0) == 0.0
    assert check_failure_rate([group_of(Failed("empty candidate"))], 0.0) == 0.0


def test_the_first_cause_is_found_in_the_votes_of_a_judge_too():
    votes = [{"verdict": 1, "reply": " "}, {"verdict": {"failed": "request rejected", "message": "no such field"}}]
    failed = Failed("no votes", {"axes": {"quality": {"value": None, "votes": votes}}})
    assert first_cause([Failed("a"), failed]) == '"no such field"'
    assert first_cause([Failed("a")], "; the first: ") == ""


def test_the_package_and_its_interfaces_import_nothing_heavy():
    code = (
        "import sys, megatron_rlpt.teacher.judge, megatron_rlpt.teacher.generative, megatron_rlpt.teacher.rewriter, "
        "megatron_rlpt.teacher.build; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
