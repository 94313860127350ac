"""The simulated robots: their tools are good ones, their worlds behave, their demos run."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.api import convert_client
from edge_agent.api.convert_request import run_request
from edge_agent.config import Config
from edge_agent.core import Lifecycle, SideEffect
from edge_agent.decoding.schemas import check_schemas
from edge_agent.settings import request_limits
from edge_agent.v1 import run_service_pb2 as run_pb
from examples.robots.robot import CannotDo
from examples.robots.show import ENGINE, ROBOTS, make_robot
from tests.support.in_process import loaded_engine

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_TIMEOUT_S = 600
"""Of one, where other work shares the cores. All four take 70 s of CPU, most of it prefill."""
SHOWN_CALL = re.compile(r"^  tool call    (\w+)\((.*)\)$", re.MULTILINE)
NON_IDEMPOTENT = SideEffect.NON_IDEMPOTENT
TOOLS = {"warehouse": (7, 4), "quadruped": (21, 12), "arm": (22, 6), "ros2_operator": (18, 4)}
"""How many tools each robot has, and how many of them take no arguments."""


@pytest.fixture(scope="module")
def engine(engine_store):
    with loaded_engine(engine_store / ENGINE) as loaded:
        yield loaded


def tools_of(robot):
    return tuple(tool for tool, _ in make_robot(robot).tools.values())


def schema_of(tool):
    return json.loads(tool.input_schema_json)


class No(str):
    """What a refusal says, as a pattern."""

    __slots__ = ()


def called(service, kind, request):
    return {"service": service, "type": kind or "map_msgs/srv/SaveMap", "request": request}


def velocity(**message):
    return {"topic": "/cmd_vel", "type": "base_msgs/msg/Velocity", "message": message}


def parameter(name, value):
    return {"node": "/base", "name": name, "value": value}


STORIES = [
    (
        "warehouse",
        [
            ("put_down", {}, No("the gripper is empty")),
            ("pick_up", {"item": "crate"}, {"holding": "crate"}),
            ("pick_up", {"item": "box"}, No("already holds the crate")),
            ("drive_to", {"place": "packing"}, {"arrived_at": "packing", "distance_m": 15}),
            ("battery_level", {}, {"battery_percent": 79.0}),
            ("locate", {}, {"place": "packing", "x_m": 12, "y_m": 3}),
            ("put_down", {}, {"put_down": "crate", "at": "packing"}),
            *[("drive_to", {"place": place}, {}) for place in ("dock", "packing") * 13],
            ("drive_to", {"place": "dock"}, No("3.0 % battery needed, 1.0 left")),
        ],
    ),
    (
        "quadruped",
        [
            ("walk_to", {"waypoint": "gate"}, No("stand up first")),
            ("stand_up", {}, {"posture": "standing"}),
            ("stand_up", {}, No("standing already")),
            ("stop_following", {}, No("not following")),
            ("start_following", {}, {"started": "following"}),
            ("stop_patrol", {}, No("not patrol")),
            ("walk_to", {"waypoint": "gate"}, No("busy with following: stop that first")),
            ("stop_following", {}, {"stopped": "following"}),
            ("read_gauge", {"gauge": "boiler_pressure"}, No("is at boiler, the robot is at dock")),
            ("measure_heat", {"part": "pipe"}, No("no pipe in sight at dock")),
            ("walk_to", {"waypoint": "boiler"}, {"arrived_at": "boiler", "distance_m": 17}),
            ("read_gauge", {"gauge": "boiler_pressure"}, {"value": 6.2, "unit": "bar"}),
            ("start_patrol", {"route": "fence"}, {"started": "patrol fence"}),
            ("stop_moving", {}, {"stopped": "patrol fence"}),
            ("locate", {}, {"near": "gate", "heading_degrees": 90}),
            ("turn_by", {"degrees": -180}, {"heading_degrees": 270}),
            ("stop_video", {}, No("nothing is being recorded")),
            ("start_video", {}, {"recording": True}),
            ("start_video", {}, No("recording already")),
            ("take_photo", {}, {"saved": "photo_1.jpg"}),
            ("take_photo", {}, {"saved": "photo_2.jpg"}),
        ],
    ),
    (
        "arm",
        [
            ("stack", {"onto": "cup"}, No("the gripper is empty")),
            ("pick", {"thing": "cup"}, {"holding": "cup", "position_mm": [350, -200, 120]}),
            ("pick", {"thing": "red_cube"}, No("already holds the cup")),
            ("find_thing", {"thing": "cup"}, {"held": True}),
            ("push", {"thing": "red_cube", "direction": "left", "distance_mm": 9}, No("put down")),
            ("stack", {"onto": "cup"}, No("can't stand on itself")),
            ("stack", {"onto": "red_cube"}, {"released": "cup", "at_mm": [450, 0, 50]}),
            ("move_to", {"x": 700, "y": 1, "z": 0}, No("out of reach")),
            ("move_to", {"x": 1, "y": 2, "z": 3, "speed_percent": None}, {"speed_percent": 50}),
            ("nudge", {"dx": 0, "dy": 0, "dz": -4}, No("below the table")),
            ("save_pose", {"name": "low"}, {"saved": "low"}),
            ("recall_pose", {"name": "high"}, No("no pose 'high'; known: low")),
            ("close_gripper", {"force_n": 41}, No("too much: fault latched")),
            ("go_home", {}, No("a fault is latched: gripper overload")),
            ("clear_faults", {}, {"cleared": ["gripper overload"]}),
            ("get_faults", {}, []),
            ("go_home", {"speed_percent": 10}, {"position_mm": [300, 0, 400], "speed_percent": 10}),
            ("rotate_wrist", {"degrees": 170}, {"j7": 170}),
            ("rotate_wrist", {"degrees": 1}, No("at most 170")),
            ("push", {"thing": "cup", "direction": "right", "distance_mm": 9}, {"thing": "cup"}),
            ("find_thing", {"thing": "cup"}, {"at_mm": (450, -9, 50)}),
        ],
    ),
    (
        "ros2_operator",
        [
            ("list_services", {}, ["/clear_costmap", "/save_map", "/set_light"]),
            (
                "service_type",
                {"service": "/light"},
                No("no service /light; there are /clear_costmap"),
            ),
            ("service_type", {"service": "/save_map"}, "map_msgs/srv/SaveMap"),
            ("show_interface", {"type": "map_msgs/srv/SaveMap"}, {"file": "string"}),
            (
                "call_service",
                called("/save_map", "SaveMap", {}),
                No("has the type map_msgs/srv/Save"),
            ),
            (
                "call_service",
                called("/save_map", None, {"name": "a"}),
                No("has the fields .'file'"),
            ),
            ("call_service", called("/save_map", None, {"file": 7}), No("must be string, not 7")),
            ("call_service", called("/save_map", None, {"file": "a"}), {"done": "/save_map"}),
            ("cancel_goal", {"action": "/navigate"}, No("has no goal")),
            ("read_topic", {"topic": "/cmd_vel", "timeout_s": 1}, No("nothing came on /cmd_vel")),
            ("read_topic", {"topic": "/battery"}, {"percent": 71.0}),
            ("publish", velocity(forward=True, turn=0), No("forward: must be float64, not True")),
            ("publish", velocity(forward=0.5, turn=0), {"published": "/cmd_vel"}),
            ("read_topic", {"topic": "/odom"}, {"x": 0.5, "yaw": 0.0}),
            ("set_parameter", parameter("max_speed_cm_s", "fast"), No("is of another type")),
            ("set_parameter", parameter("max_speed_cm_s", 30), {"max_speed_cm_s": 30}),
            ("get_parameter", {"node": "/base", "name": "max_speed_cm_s"}, {"max_speed_cm_s": 30}),
            (
                "get_parameter",
                {"node": "/base", "name": "size"},
                No("no parameter size; there are max"),
            ),
        ],
    ),
]


class TestTools:
    @pytest.mark.parametrize("robot", ROBOTS)
    def test_there_are_as_many_as_the_readers_are_told(self, robot):
        schemas = [schema_of(tool) for tool in tools_of(robot)]
        assert (len(schemas), sum(not each["properties"] for each in schemas)) == TOOLS[robot]

    @pytest.mark.parametrize("robot", ROBOTS)
    def test_the_daemon_and_its_engine_take_them_as_they_are(self, robot, engine):
        tools = tools_of(robot)
        spec = convert_client.run_spec("Go.", tools, {"engine": ENGINE})
        read = run_request(
            run_pb.CreateRunRequest(spec=spec), request_limits(Config(), lambda: ENGINE, {})
        )
        assert read.tools == tools
        check_schemas(tools, "", engine.backend.check_schema)

    @pytest.mark.parametrize("robot", ROBOTS)
    def test_each_says_what_it_does_and_has_one_example_that_its_schema_allows(self, robot):
        for tool in tools_of(robot):
            assert tool.description.endswith(".")
            (example,) = tool.examples
            jsonschema_rs.validate(schema_of(tool), json.loads(example.arguments_json))

    @pytest.mark.parametrize("robot", ROBOTS)
    def test_what_goes_on_can_always_be_stopped(self, robot):
        made = make_robot(robot)
        going_on = {t.name for t in tools_of(robot) if t.lifecycle is Lifecycle.BACKGROUND}
        assert going_on == {name for names in made.stops.values() for name in names}
        for stop in made.stops:
            tool = made.tools[stop][0]
            assert (tool.resources, tool.lifecycle) == ((), Lifecycle.INSTANT)

    def test_what_moves_the_arm_acts_once_expires_and_has_the_arm_to_itself(self):
        moving = [tool for tool in tools_of("arm") if tool.side_effect is NON_IDEMPOTENT]
        assert len(moving) == 12
        assert {(tool.resources, tool.valid_for_s) for tool in moving} == {(("arm",), 5.0)}

    @pytest.mark.parametrize("robot", ROBOTS)
    def test_there_are_eight_to_ten_goals_for_tools_that_exist(self, robot):
        made = make_robot(robot)
        assert 8 <= len(made.goals) <= 10
        assert {goal.first_tool for goal in made.goals} <= set(made.tools)
        examples = {example.goal for tool in tools_of(robot) for example in tool.examples}
        assert not examples & {goal.text for goal in made.goals}  # nothing is given away

    @pytest.mark.parametrize("robot", ROBOTS)
    def test_prompt_and_output_of_a_whole_run_fit_the_engines_context(self, robot, engine):
        made = make_robot(robot)
        tokens = len(engine.renderer.render((), tools_of(robot)))
        for_results = 256 * (made.max_steps - 1)
        assert tokens + for_results + made.max_output_tokens < engine.manifest.context_tokens


def values(schema):
    """Values that a schema of the examples allows."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of(
        [
            {
                "boolean": st.booleans(),
                "integer": st.integers(schema.get("minimum", -9), schema.get("maximum", 9)),
                "null": st.none(),
                "object": st.dictionaries(st.sampled_from(["x", "y", "on", "file"]), st.integers()),
                "string": st.text("abc/_", min_size=1, max_size=schema.get("maxLength", 8)),
            }[kind]
            for kind in kinds
        ]
    )


def calls(tool):
    schema = schema_of(tool)
    properties = {name: values(each) for name, each in schema["properties"].items()}
    required = {name: properties.pop(name) for name in schema["required"]}
    arguments = st.fixed_dictionaries(required, optional=properties)
    examples = st.just(json.loads(tool.examples[0].arguments_json))
    return st.tuples(st.just(tool.name), arguments | examples)


class TestWorlds:
    @pytest.mark.parametrize("robot", ROBOTS)
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_any_calls_that_the_schemas_allow_give_json_or_a_reason(self, robot, data):
        made = make_robot(robot)
        anything = st.one_of([calls(tool) for tool, _ in made.tools.values()])
        for name, arguments in data.draw(st.lists(anything, min_size=1, max_size=12)):
            jsonschema_rs.validate(schema_of(made.tools[name][0]), arguments)
            try:
                assert json.dumps(made.tools[name][1](**arguments))
            except CannotDo as reason:
                assert len(str(reason)) > 5  # noqa: PT017 - the words are what is left of it

    @pytest.mark.parametrize(("robot", "story"), STORIES, ids=ROBOTS)
    def test_its_state_changes_and_what_makes_no_sense_in_it_is_refused(self, robot, story):
        """Each line of a story: a call, and what it returns (of an object, some fields)."""
        tools = make_robot(robot).tools
        for name, arguments, expected in story:
            if isinstance(expected, No):
                with pytest.raises(CannotDo, match=expected):
                    tools[name][1](**arguments)
            else:
                said: Any = tools[name][1](**arguments)
                known = said if not isinstance(expected, dict) else {k: said[k] for k in expected}
                assert known == expected, name

    def test_every_robot_starts_afresh(self):
        make_robot("warehouse").tools["pick_up"][1](item="box")
        with pytest.raises(CannotDo, match="empty"):
            make_robot("warehouse").tools["put_down"][1]()


def demo(robot, engine_store):
    """A robot's first three goals, given to a daemon of its own."""
    command = [
        "timeout", str(DEMO_TIMEOUT_S),  # ends the daemon too
        sys.executable, "examples/robots/show.py", "--robot", robot, "--goals", "3",
        "--start-daemon", "--engines-dir", str(engine_store),
    ]  # fmt: skip
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="class")
def demos(engine_store):
    """The demos of all robots, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {robot: pool.submit(demo, robot, engine_store) for robot in ROBOTS}


class TestDemos:
    @pytest.mark.timeout(DEMO_TIMEOUT_S + 10)
    @pytest.mark.parametrize("robot", ROBOTS)
    def test_it_runs_to_its_end_and_every_call_satisfies_its_schema(self, robot, demos):
        done = demos[robot].result()
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\d of 3 goals reached the right tool first", done.stdout, re.MULTILINE)
        assert len(re.findall(r"^\[\d/3\] goal: ", done.stdout, re.MULTILINE)) == 3
        schemas = {tool.name: schema_of(tool) for tool in tools_of(robot)}
        for name, arguments in SHOWN_CALL.findall(done.stdout):
            jsonschema_rs.validate(schemas[name], json.loads(arguments))

    def test_without_a_daemon_it_says_so_in_one_line(self, tmp_path):
        command = [sys.executable, "examples/warehouse_robot.py", "--socket", str(tmp_path / "no")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
