import operator
import pickle
from itertools import pairwise
from uuid import UUID

import pytest

from dantegpu.domain.ids import AttemptId, HoldId, InvalidId, JobId, TeamId, TransferId


def test_an_id_reads_back_from_its_text():
    job_id = JobId.new()
    assert JobId.parse(str(job_id)) == job_id
    assert pickle.loads(pickle.dumps(job_id)) == job_id


def test_the_text_form_is_the_one_of_the_typeid_specification():
    text = "prefix_01h455vb4pex5vsknk084sn02q"
    assert str(JobId(UUID("01890a5d-ac96-774b-bcce-b302099a8057"))) == text.replace("prefix", "job")


def test_new_ids_are_version_7_and_rise_strictly_within_a_process():
    ids = [JobId.new() for _ in range(2000)]
    assert all(earlier < later and str(earlier) < str(later) for earlier, later in pairwise(ids))
    assert {job_id.uuid.version for job_id in ids} == {7}


def test_ids_of_different_kinds_are_never_equal():
    job_id = JobId.new()
    assert AttemptId(job_id.uuid) != job_id
    with pytest.raises(TypeError):
        operator.lt(AttemptId(job_id.uuid), job_id)


def test_a_wrong_prefix_is_named_together_with_the_expected_one():
    with pytest.raises(InvalidId, match="prefix is 'team', expected 'job'") as caught:
        JobId.parse(str(TeamId.new()))
    assert caught.value.expected == "job"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "job",
        "job_",
        "01h455vb4pex5vsknk084sn02q",
        "job_01H455VB4PEX5VSKNK084SN02Q",
        "job_81h455vb4pex5vsknk084sn02q",
        "job_01h455vb4pex5vsknk084sn02",
        "job_01h455vb4pex5vsknk084sn02u",
        "job__1h455vb4pex5vsknk084sn02q",
        " job_01h455vb4pex5vsknk084sn02q",
        "job_" + "0" * 100_000,
    ],
)
def test_what_is_not_an_id_is_refused_with_a_short_message(text: str):
    with pytest.raises(InvalidId) as caught:
        JobId.parse(text)
    assert len(str(caught.value)) < 300


def test_a_derived_id_depends_on_kind_order_and_borders_of_its_parts():
    attempt = AttemptId.new()
    assert HoldId.derived(attempt, 1) == HoldId.derived(attempt, 1)
    others = {
        HoldId.derived(attempt, 1).uuid,
        HoldId.derived(attempt, 2).uuid,
        HoldId.derived(attempt, "1").uuid,
        HoldId.derived(1, attempt).uuid,
        TransferId.derived(attempt, 1).uuid,
        HoldId.derived("ab", "c").uuid,
        HoldId.derived("a", "bc").uuid,
    }
    assert len(others) == 7
