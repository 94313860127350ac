"""An operator of a ROS 2 robot, who has no tool of its own for anything that the robot does.

It looks around instead: list what there is, ask for a type, look at that interface, then publish,
call or send a goal with an object that fits it. No ROS is needed: the graph is simulated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from examples.robots.robot import CannotDo, Goal, Robot, number, text, tool, tools_of

Known = TypeVar("Known")
Fields = dict[str, str]

INTERFACES: dict[str, Fields] = {
    "base_msgs/msg/Battery": {"percent": "float64"},
    "base_msgs/msg/Odometry": {"x": "float64", "y": "float64", "yaw": "float64"},
    "base_msgs/msg/Velocity": {"forward": "float64", "turn": "float64"},
    "base_msgs/srv/SetLight": {"on": "bool"},
    "map_msgs/srv/SaveMap": {"file": "string"},
    "nav_msgs/action/Navigate": {"x": "float64", "y": "float64"},
    "std_srvs/srv/Empty": {},
}
TOPICS = {
    "/battery": ("base_msgs/msg/Battery", 1),
    "/cmd_vel": ("base_msgs/msg/Velocity", 0),
    "/odom": ("base_msgs/msg/Odometry", 30),
}
SERVICES = {
    "/clear_costmap": "std_srvs/srv/Empty",
    "/save_map": "map_msgs/srv/SaveMap",
    "/set_light": "base_msgs/srv/SetLight",
}
ACTIONS = {"/navigate": "nav_msgs/action/Navigate"}
NODES = {
    "/base": ("/cmd_vel", "/odom", "/set_light"),
    "/mapper": ("/save_map", "/clear_costmap"),
    "/navigator": ("/navigate",),
    "/power": ("/battery",),
}
KINDS = {"bool": (bool,), "float64": (int, float), "string": (str,)}

_NAME, _TYPE, _OBJECT = text(40), text(40), {"type": "object"}
_VALUE = {"type": ["boolean", "integer", "string"]}


@dataclass
class Graph:
    """The simulated nodes, and what they keep."""

    odometry: dict[str, float] = field(default_factory=lambda: {"x": 0.0, "y": 0.0, "yaw": 0.0})
    battery_percent: float = 71.0
    light_is_on: bool = False
    saved_maps: list[str] = field(default_factory=list)
    goal: dict[str, object] | None = None
    parameters: dict[str, dict[str, object]] = field(
        default_factory=lambda: {
            "/base": {"max_speed_cm_s": 50, "publish_odom": True},
            "/mapper": {"resolution_cm": 5},
            "/navigator": {"planner": "grid", "tolerance_cm": 10},
            "/power": {"warn_percent": 20},
        }
    )

    def _check(self, name: str, kind: str, given: str, content: dict[str, object]) -> None:
        """The type is the one of `name`, and the content has its fields."""
        if given != kind:
            raise CannotDo(f"{name} has the type {kind}, not {given}")
        wanted = INTERFACES[kind]
        if set(content) != set(wanted):
            raise CannotDo(f"{kind} has the fields {sorted(wanted)}, not {sorted(content)}")
        for key, value in content.items():
            if type(value) not in KINDS[wanted[key]]:
                raise CannotDo(f"{key}: must be {wanted[key]}, not {value!r}")

    @tool("Which nodes run?")
    def list_nodes(self) -> object:
        """List the running nodes."""
        return sorted(NODES)

    @tool("Tell me about the base node.", {"node": "/base"}, node=_NAME)
    def node_info(self, node: str) -> object:
        """Show the topics, services and actions of a node."""
        return _find(NODES, node, "node")

    @tool("Which topics exist?")
    def list_topics(self) -> object:
        """List the topics."""
        return sorted(TOPICS)

    @tool("Which type has the topic odom?", {"topic": "/odom"}, topic=_NAME)
    def topic_type(self, topic: str) -> object:
        """Look up the message type of a topic."""
        return _find(TOPICS, topic, "topic")[0]

    @tool("How often does odom come?", {"topic": "/odom"}, topic=_NAME)
    def topic_rate(self, topic: str) -> object:
        """Measure how many messages a second a topic has."""
        return {"messages_per_second": _find(TOPICS, topic, "topic")[1]}

    @tool(
        "Read one message of odom.",
        {"topic": "/odom", "timeout_s": 2},
        topic=_NAME,
        timeout_s=number(1, 20),
    )
    def read_topic(self, topic: str, timeout_s: int = 5) -> object:
        """Wait for the next message on a topic."""
        _, rate = _find(TOPICS, topic, "topic")
        if not rate:
            raise CannotDo(f"nothing came on {topic} within {timeout_s} s")
        return {"percent": self.battery_percent} if topic == "/battery" else self.odometry

    @tool(
        "Drive forward on cmd_vel.",
        {
            "topic": "/cmd_vel",
            "type": "base_msgs/msg/Velocity",
            "message": {"forward": 0.2, "turn": 0.0},
        },
        topic=_NAME,
        type=_TYPE,
        message=_OBJECT,
    )
    def publish(self, topic: str, type: str, message: dict[str, object]) -> object:  # noqa: A002
        """Publish one message on a topic."""
        kind, rate = _find(TOPICS, topic, "topic")
        if rate:
            raise CannotDo(f"{topic} belongs to the robot: only /cmd_vel is listened to")
        self._check(topic, kind, type, message)
        self.odometry["x"] += float(str(message["forward"]))
        self.odometry["yaw"] += float(str(message["turn"]))
        return {"published": topic}

    @tool("Which services exist?")
    def list_services(self) -> object:
        """List the services."""
        return sorted(SERVICES)

    @tool("Which type has save_map?", {"service": "/save_map"}, service=_NAME)
    def service_type(self, service: str) -> object:
        """Look up the type of a service."""
        return _find(SERVICES, service, "service")

    @tool(
        "Switch the light on.",
        {"service": "/set_light", "type": "base_msgs/srv/SetLight", "request": {"on": True}},
        service=_NAME,
        type=_TYPE,
        request=_OBJECT,
    )
    def call_service(self, service: str, type: str, request: dict[str, object]) -> object:  # noqa: A002
        """Call a service with a request."""
        self._check(service, _find(SERVICES, service, "service"), type, request)
        if service == "/set_light":
            self.light_is_on = bool(request["on"])
        if service == "/save_map":
            self.saved_maps.append(str(request["file"]))
        return {"done": service}

    @tool("Which actions exist?")
    def list_actions(self) -> object:
        """List the actions."""
        return sorted(ACTIONS)

    @tool("Which type has navigate?", {"action": "/navigate"}, action=_NAME)
    def action_type(self, action: str) -> object:
        """Look up the type of an action."""
        return _find(ACTIONS, action, "action")

    @tool(
        "Navigate to 2, 1.",
        {
            "action": "/navigate",
            "type": "nav_msgs/action/Navigate",
            "goal": {"x": 2.0, "y": 1.0},
        },
        action=_NAME,
        type=_TYPE,
        goal=_OBJECT,
    )
    def send_goal(self, action: str, type: str, goal: dict[str, object]) -> object:  # noqa: A002
        """Send a goal to an action."""
        self._check(action, _find(ACTIONS, action, "action"), type, goal)
        self.goal = goal
        return {"accepted": goal}

    @tool("Give up the navigation.", {"action": "/navigate"}, action=_NAME)
    def cancel_goal(self, action: str) -> object:
        """Cancel the goal of an action."""
        _find(ACTIONS, action, "action")
        if self.goal is None:
            raise CannotDo(f"{action} has no goal")
        self.goal = None
        return {"cancelled": action}

    @tool(
        "Which fields has a velocity?",
        {"type": "base_msgs/msg/Velocity"},
        type=_TYPE,
    )
    def show_interface(self, type: str) -> object:  # noqa: A002 - the word of ROS
        """Show the fields of a message, service or action type."""
        return _find(INTERFACES, type, "type")

    @tool("Which parameters has the mapper?", {"node": "/mapper"}, node=_NAME)
    def list_parameters(self, node: str) -> object:
        """List the parameters of a node."""
        return sorted(_find(self.parameters, node, "node"))

    @tool(
        "How fast may the base go?",
        {"node": "/base", "name": "max_speed_cm_s"},
        node=_NAME,
        name=_NAME,
    )
    def get_parameter(self, node: str, name: str) -> object:
        """Read a parameter of a node."""
        return {name: _find(_find(self.parameters, node, "node"), name, "parameter")}

    @tool(
        "Warn at 15 percent.",
        {"node": "/power", "name": "warn_percent", "value": 15},
        node=_NAME,
        name=_NAME,
        value=_VALUE,
    )
    def set_parameter(self, node: str, name: str, value: object) -> object:
        """Change a parameter of a node."""
        known = _find(self.parameters, node, "node")
        before = _find(known, name, "parameter")
        if type(value) is not type(before):
            raise CannotDo(f"{name} is {before!r}: {value!r} is of another type")
        known[name] = value
        return {name: value}


def _find(known: Mapping[str, Known], name: str, what: str) -> Known:
    """What is known under a name; else the names that there are."""
    if name not in known:
        raise CannotDo(f"no {what} {name}; there are {', '.join(sorted(known))}")
    return known[name]


GOALS = (
    Goal("Which topics are there?", "list_topics"),
    Goal("What is the type of the topic /battery?", "topic_type"),
    Goal("Read the battery topic.", "read_topic"),
    Goal("List the services of this robot.", "list_services"),
    Goal("Show the interface base_msgs/srv/SetLight.", "show_interface"),
    Goal("Switch the light off.", "call_service"),
    Goal("Save the map as hall.", "list_services"),
    Goal("Navigate to 3, 4.", "send_goal"),
    Goal("Which parameters does the navigator have?", "list_parameters"),
    Goal("Set the maximum speed of the base to 30.", "set_parameter"),
)


def robot() -> Robot:
    """A fresh one."""
    return Robot("ros2_operator", tools_of(Graph()), GOALS, max_steps=4, max_output_tokens=96)
