"""The robot set asks what can be asked, and its halves stay apart."""

import json
from collections import Counter

import pytest

from benchmarks._tool_cases import Case, robot_cases
from edge_agent.core import ANSWER, ToolCall
from edge_agent.decoding.schemas import validate

CASES = [*robot_cases("dev"), *robot_cases("report")]


def test_there_are_five_robots_with_eight_tools_and_enough_prompts():
    assert len({case.group for case in CASES}) == 5
    assert {len(case.tools) for case in CASES} == {8}
    assert len(CASES) >= 100
    assert sum(case.tool == ANSWER for case in CASES) >= 10


def test_no_prompt_is_in_both_halves_nor_an_example_of_a_tool():
    said = Counter(case.messages[-1].text for case in CASES)
    said.update({each.goal for case in CASES for tool in case.tools for each in tool.examples})
    assert [text for text, count in said.items() if count > 1] == []


@pytest.mark.parametrize("half", ["dev", "report"])
def test_each_half_wants_every_tool_and_answers_from_each_robot(half):
    wanted = {(case.group, case.tool) for case in robot_cases(half)}
    for case in CASES:
        assert {(case.group, tool.name) for tool in case.tools} | {(case.group, ANSWER)} <= wanted


def test_the_examples_satisfy_their_schemas():
    for case in CASES:
        for tool in case.tools:
            for example in tool.examples:
                validate(tool.input_schema_json, example.arguments_json)


def lamp_case() -> Case:
    return next(case for case in CASES if case.messages[-1].text.startswith("Bedroom lamp off"))


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"on": False, "room": " Bedroom"}, True),
        ({"on": True, "room": "bedroom"}, False),
        ({"room": "bedroom"}, False),
    ],
)
def test_arguments_are_compared_without_case_and_order(arguments, right):
    case = lamp_case()
    assert case.right is not None
    assert case.right(ToolCall("", case.tool, json.dumps(arguments))) is right
