"""Engines and waiting steps on the wire: there and back again."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import core
from edge_agent.api import convert_engine, convert_request
from edge_agent.errors import InvalidRequest
from edge_agent.status import StepWait, WaitReason
from edge_agent.v1 import engine_service_pb2 as pb

UNKNOWN: Any = 77
"""A value that an enum does not have."""

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(0, 2**31)
sizes = st.integers(0, 2**63)
spans = st.floats(0, 1e6).map(lambda s: round(s, 3))
engines = st.builds(
    core.EngineInfo,
    name=names,
    digest=names,
    backend=names,
    state=st.sampled_from(core.EngineState),
    context_tokens=counts,
    max_output_tokens=counts,
    load_peak_bytes=sizes,
    steady_bytes=sizes,
    capabilities=st.lists(names, max_size=2).map(tuple),
    licence=names,
    worker=st.none()
    | st.builds(core.WorkerInfo, counts, counts, counts, counts, st.none() | spans),
    error=st.none()
    | st.builds(core.RunError, names, names, st.booleans(), st.dictionaries(names, names)),
    load_progress=st.none() | st.just(0.5),
    pinned=st.booleans(),
    quarantined=st.booleans(),
    leaked_bytes=sizes,
    measurements=st.lists(st.builds(core.MeasuredLoad, sizes, sizes, names, spans), max_size=3).map(
        tuple
    ),
    estimated_load_peak_bytes=sizes,
    estimated_steady_bytes=sizes,
)
waits = st.builds(
    StepWait,
    run_id=names,
    client=names,
    engine=names,
    priority=st.sampled_from(core.Priority),
    waited_s=spans,
    reason=st.sampled_from(WaitReason),
    text=names,
    engines=st.lists(names, max_size=2).map(tuple),
    position=counts,
    missing_bytes=sizes,
    starts_in_s=st.none() | spans,
    deadline_in_s=st.none() | spans,
)


@given(info=engines)
def test_an_engine_arrives_as_it_was_sent(info):
    raw = convert_engine.engine(info).SerializeToString()
    assert convert_engine.engine_info(pb.Engine.FromString(raw)) == info


@given(wait=waits)
def test_a_wait_arrives_as_it_was_sent(wait):
    raw = convert_engine.wait(wait).SerializeToString()
    assert convert_engine.step_wait(pb.StepWait.FromString(raw)) == wait


@given(wait=waits)
def test_what_is_overdue_is_due_now(wait):
    late = dataclasses.replace(wait, deadline_in_s=-0.25)
    assert convert_engine.step_wait(convert_engine.wait(late)).deadline_in_s == 0


def test_what_only_a_newer_daemon_knows_is_unspecified():
    assert convert_engine.engine_info(pb.Engine(state=UNKNOWN)).state is (
        core.EngineState.UNSPECIFIED
    )
    told = convert_engine.step_wait(pb.StepWait(reason=UNKNOWN, priority=UNKNOWN))
    assert (told.reason, told.priority) == (WaitReason.UNSPECIFIED, core.Priority.NORMAL)


def test_waits_of_a_run_or_of_all_are_asked_for():
    for run_id in ("", "run-1"):
        assert convert_request.explained_run(convert_engine.explain_request(run_id)) == run_id


@pytest.mark.parametrize("run_id", ["", "x" * 65, "a\0b"])
def test_a_run_id_that_can_be_none_is_refused(run_id):
    with pytest.raises(InvalidRequest) as refused:
        convert_request.explained_run(pb.ExplainRequest(run_id=run_id))
    assert [each.field for each in refused.value.violations] == ["run_id"]
