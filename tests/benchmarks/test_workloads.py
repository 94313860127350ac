"""The benchmarks' workloads have the sizes that their names say, in the engine's own tokens."""

import re

import pytest

from benchmarks import _workloads
from benchmarks._workloads import WORKLOADS, workload
from edge_agent.decoding.schemas import check_schemas
from tests.conftest import ENGINE
from tests.support.in_process import loaded_engine


@pytest.fixture(scope="module")
def engine(engine_store):
    with loaded_engine(engine_store / ENGINE) as loaded:
        yield loaded


def test_there_are_the_four_sizes():
    sizes = {name: each.nominal_tokens for name, each in WORKLOADS.items()}
    assert sizes == {"0.3k": 300, "2.5k": 2500, "5k": 5000, "11k": 11_000}


@pytest.mark.parametrize("name", WORKLOADS)
def test_its_tokens_are_within_a_tenth_of_its_name_and_as_its_table_says(name, engine):
    messages, tools = workload(name)
    tokens = len(engine.renderer.render(messages, tools))
    nominal = WORKLOADS[name].nominal_tokens
    assert 0.9 * nominal <= tokens <= 1.1 * nominal
    (stated,) = re.findall(
        rf"^ +{re.escape(name)} +(\d+) +(\d+)\b", _workloads.__doc__ or "", re.MULTILINE
    )
    assert (len(tools), tokens) == tuple(map(int, stated))


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_engine_takes_its_tools_and_every_name_is_there_once(name, engine):
    _, tools = workload(name)
    check_schemas(tools, "", engine.backend.check_schema)
    assert len({tool.name for tool in tools}) == len(tools)
    assert all(tool.examples for tool in tools)


def test_it_is_the_same_at_every_call():
    assert workload("5k") == workload("5k")
