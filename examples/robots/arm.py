"""A seven-joint arm with a gripper above a table with a few things on it.

Most movements take optional numbers that may be null, which leaves the choice to the arm. Nothing
moves while a fault is latched, and pressing too hard latches one. What moves the arm or its gripper
is never repeated, has the arm to itself, and must begin soon: the table may change.
"""

from dataclasses import dataclass, field
from typing import Any

from edge_agent.core import SideEffect
from examples.robots.robot import (
    CannotDo,
    Goal,
    Robot,
    looks,
    maybe_number,
    number,
    one_of,
    rules,
    sets,
    text,
    tool,
    tools_of,
)

JOINTS = ("j1", "j2", "j3", "j4", "j5", "j6", "j7")
HOME = (0, -30, 0, 90, 0, 60, 0)
REACH_MM = 700
MOST_FORCE_N = 40
THINGS = ("blue_cube", "cup", "red_cube", "screw_box")
DIRECTIONS = {"away": (1, 0), "left": (0, 1), "right": (0, -1), "towards": (-1, 0)}
ABOVE_MM = 120
_JOINT = number(-170, 170)
_ACROSS, _UP = number(-REACH_MM, REACH_MM), number(0, REACH_MM)

ONCE: dict[str, Any] = {
    "side_effect": SideEffect.NON_IDEMPOTENT,
    "resources": ("arm",),
    "valid_for_s": 5.0,
}

acts = rules(**ONCE)


@dataclass
class Arm:
    """The simulated machine and its table; positions are millimetres from the arm's foot."""

    joints: dict[str, int] = field(default_factory=lambda: dict(zip(JOINTS, HOME, strict=True)))
    position: tuple[int, int, int] = (300, 0, 400)
    speed_percent: int = 50
    payload_g: int = 0
    gripper_mm: int = 80
    holding: str | None = None
    faults: list[str] = field(default_factory=list)
    poses: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    things: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {
            "blue_cube": (400, 150, 0),
            "cup": (350, -200, 0),
            "red_cube": (450, 0, 0),
            "screw_box": (250, 250, 0),
        }
    )

    def _go(self, x: int, y: int, z: int) -> dict[str, object]:
        if self.faults:
            raise CannotDo(f"a fault is latched: {self.faults[0]}")
        if x * x + y * y + z * z > REACH_MM * REACH_MM:
            raise CannotDo(f"{x}, {y}, {z} is out of reach ({REACH_MM} mm)")
        if z < 0:
            raise CannotDo("that is below the table")
        self.position = (x, y, z)
        return {"position_mm": [x, y, z]}

    def _let_go(self, x: int, y: int, z: int) -> object:
        if not self.holding:
            raise CannotDo("the gripper is empty")
        self._go(x, y, z)
        thing, self.holding, self.gripper_mm = self.holding, None, 80
        self.things[thing] = (x, y, z)
        return {"released": thing, "at_mm": [x, y, z]}

    @looks
    @tool("Tell me your joint angles.")
    def get_joints(self) -> object:
        """Read the angles of all seven joints in degrees."""
        return self.joints

    @looks
    @tool("Where is your hand?")
    def get_position(self) -> object:
        """Read where the gripper is, in millimetres."""
        return {"position_mm": self.position}

    @looks
    @tool("What lies on the table?")
    def list_things(self) -> object:
        """List the things that the camera sees."""
        return sorted(self.things)

    @looks
    @tool("Where is the cup?", {"thing": "cup"}, thing=one_of(*THINGS))
    def find_thing(self, thing: str, approach_mm: int | None = None) -> object:
        """Look up where a thing lies, in millimetres."""
        # The daemon asks this, with the arguments of a `pick` without a result, whether that acted.
        del approach_mm
        if thing == self.holding:
            return {"thing": thing, "held": True, "acted": True}
        return {"thing": thing, "at_mm": self.things[thing], "acted": False}

    @acts
    @tool(
        "Straighten every joint.",
        dict.fromkeys(JOINTS, 0),
        j1=_JOINT, j2=_JOINT, j3=_JOINT, j4=_JOINT, j5=_JOINT, j6=_JOINT, j7=_JOINT,
    )  # fmt: skip
    def move_joints(self, **degrees: int) -> object:
        """Move the seven joints to these angles in degrees."""
        if self.faults:
            raise CannotDo(f"a fault is latched: {self.faults[0]}")
        self.joints.update(degrees)
        return self.joints

    @acts
    @tool(
        "Bring your hand to 300, 100, 200.",
        {"x": 300, "y": 100, "z": 200},
        x=_ACROSS,
        y=_ACROSS,
        z=_UP,
        speed_percent=maybe_number(1, 100),
    )
    def move_to(self, x: int, y: int, z: int, speed_percent: int | None = None) -> object:
        """Move the gripper to a point, in millimetres."""
        return {**self._go(x, y, z), "speed_percent": speed_percent or self.speed_percent}

    @acts
    @tool(
        "A little higher.",
        {"dx": 0, "dy": 0, "dz": 30},
        dx=number(-200, 200),
        dy=number(-200, 200),
        dz=number(-200, 200),
    )
    def nudge(self, dx: int, dy: int, dz: int) -> object:
        """Move the gripper by some millimetres from where it is."""
        x, y, z = self.position
        return self._go(x + dx, y + dy, z + dz)

    @acts
    @tool("Back to the start.", {"speed_percent": None}, speed_percent=maybe_number(1, 100))
    def go_home(self, speed_percent: int | None = None) -> object:
        """Move all joints to the home position."""
        moved = self._go(300, 0, 400)
        self.joints = dict(zip(JOINTS, HOME, strict=True))
        return {**moved, "speed_percent": speed_percent or self.speed_percent}

    @acts
    @tool("Turn your wrist a quarter.", {"degrees": 90}, degrees=number(-170, 170))
    def rotate_wrist(self, degrees: int) -> object:
        """Turn the last joint by some degrees."""
        turned = self.joints["j7"] + degrees
        if abs(turned) > 170:
            raise CannotDo(f"j7 would be at {turned} degrees, at most 170")
        self.joints["j7"] = turned
        return {"j7": turned}

    @acts
    @tool("Release it.", {"width_mm": None}, width_mm=maybe_number(0, 80))
    def open_gripper(self, width_mm: int | None = None) -> object:
        """Open the fingers; what was held drops to the table."""
        self.gripper_mm = 80 if width_mm is None else width_mm
        dropped, self.holding = self.holding, None
        if dropped:
            self.things[dropped] = (*self.position[:2], 0)
        return {"width_mm": self.gripper_mm, "dropped": dropped}

    @acts
    @tool("Clench gently.", {"force_n": 5}, force_n=maybe_number(1, 80))
    def close_gripper(self, force_n: int | None = None) -> object:
        """Close the fingers with some force in newtons."""
        if force_n and force_n > MOST_FORCE_N:
            self.faults.append("gripper overload")
            raise CannotDo(f"{force_n} N is too much: fault latched")
        self.gripper_mm = 0
        return {"width_mm": 0, "force_n": force_n or 10}

    @rules(**ONCE, verify="find_thing")
    @tool(
        "Fetch the cup.",
        {"thing": "cup", "approach_mm": None},
        thing=one_of(*THINGS),
        approach_mm=maybe_number(20, 200),
    )
    def pick(self, thing: str, approach_mm: int | None = None) -> object:
        """Grasp a thing on the table and lift it."""
        if self.holding:
            raise CannotDo(f"the gripper already holds the {self.holding}")
        x, y, _ = self.things[thing]
        moved = self._go(x, y, approach_mm or ABOVE_MM)
        self.holding, self.gripper_mm = thing, 40
        return {"holding": thing, **moved}

    @acts
    @tool(
        "Set it at 400, 0.",
        {"x": 400, "y": 0},
        x=_ACROSS,
        y=_ACROSS,
        z=maybe_number(0, REACH_MM),
    )
    def place(self, x: int, y: int, z: int | None = None) -> object:
        """Put the held thing down at a point, in millimetres."""
        return self._let_go(x, y, z or 0)

    @acts
    @tool("Put it on top of the red cube.", {"onto": "red_cube"}, onto=one_of(*THINGS))
    def stack(self, onto: str) -> object:
        """Put the held thing on top of another one."""
        if onto == self.holding:
            raise CannotDo(f"the {onto} can't stand on itself")
        x, y, z = self.things[onto]
        return self._let_go(x, y, z + 50)

    @acts
    @tool(
        "Slide the box to the left.",
        {"thing": "screw_box", "direction": "left", "distance_mm": 50},
        thing=one_of(*THINGS),
        direction=one_of(*DIRECTIONS),
        distance_mm=number(1, 200),
    )
    def push(self, thing: str, direction: str, distance_mm: int) -> object:
        """Slide a thing over the table."""
        if self.holding:
            raise CannotDo("put down what is held first")
        (x, y, z), (to_x, to_y) = self.things[thing], DIRECTIONS[direction]
        self._go(x + to_x * distance_mm, y + to_y * distance_mm, z)
        self.things[thing] = self.position
        return {"thing": thing, "at_mm": self.things[thing]}

    @sets
    @tool("Move more slowly.", {"percent": 20}, percent=number(1, 100))
    def set_speed(self, percent: int) -> object:
        """Set how fast the arm moves unless told otherwise."""
        self.speed_percent = percent
        return {"speed_percent": percent}

    @sets
    @tool("The load weighs 300 grams.", {"grams": 300}, grams=number(0, 3000))
    def set_payload(self, grams: int) -> object:
        """Tell the arm how heavy its load is."""
        self.payload_g = grams
        return {"payload_g": grams}

    @looks
    @tool("How hard are you pressing?")
    def read_force(self) -> object:
        """Read the force at the wrist in newtons."""
        return {"force_n": round((self.payload_g if self.holding else 0) * 0.00981, 2)}

    @sets
    @tool("Remember this pose as inspect.", {"name": "inspect"}, name=text(20))
    def save_pose(self, name: str) -> object:
        """Remember where the gripper is under a name."""
        self.poses[name] = self.position
        return {"saved": name, "position_mm": self.position}

    @acts
    @tool("Take the pose inspect.", {"name": "inspect"}, name=text(20))
    def recall_pose(self, name: str) -> object:
        """Move the gripper to a remembered pose."""
        if name not in self.poses:
            raise CannotDo(f"no pose {name!r}; known: {', '.join(sorted(self.poses)) or 'none'}")
        return self._go(*self.poses[name])

    @looks
    @tool("Is anything wrong?")
    def get_faults(self) -> object:
        """List the faults that keep the arm from moving."""
        return self.faults

    @sets
    @tool("Reset the error.")
    def clear_faults(self) -> object:
        """Clear the latched faults."""
        cleared, self.faults = self.faults, []
        return {"cleared": cleared}


GOALS = (
    Goal("What things are on the table?", "list_things"),
    Goal("Find the blue cube.", "find_thing"),
    Goal("Pick up the red cube.", "pick"),
    Goal("Stack it on the blue cube.", "stack"),
    Goal("Push the cup to the right by 40 mm.", "push"),
    Goal("Set the speed to 30 percent.", "set_speed"),
    Goal("Open the gripper.", "open_gripper"),
    Goal("Rotate the wrist by 45 degrees.", "rotate_wrist"),
    Goal("Show the joint angles.", "get_joints"),
    Goal("Go home.", "go_home"),
)


def robot() -> Robot:
    """A fresh one."""
    return Robot("arm", tools_of(Arm()), GOALS)
