"""A warehouse robot: a battery, a position on a map of named places, a gripper and two lamps."""

from dataclasses import dataclass, field

from examples.robots.robot import CannotDo, Goal, Robot, one_of, switch, tool, tools_of

PLACES = {
    "dock": (0, 0),
    "office": (4, 9),
    "packing": (12, 3),
    "shelf_a": (6, 2),
    "shelf_b": (6, 7),
}
ITEMS = ("bottle", "box", "crate")
LAMPS = ("front", "rear")
BATTERY_PERCENT_PER_M = 0.2


@dataclass
class Warehouse:
    """The simulated machine: what its sensors would say, and what its drives would do."""

    battery_percent: float = 82.0
    place: str = "dock"
    holding: str | None = None
    lamps: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(LAMPS, False))

    @tool("How much power is left?")
    def battery_level(self) -> object:
        """Read the battery level in percent."""
        return {"battery_percent": round(self.battery_percent, 1)}

    @tool("Where are you now?")
    def locate(self) -> object:
        """Read where the robot is on the map."""
        x, y = PLACES[self.place]
        return {"place": self.place, "x_m": x, "y_m": y}

    @tool("Go over to the office.", {"place": "office"}, place=one_of(*sorted(PLACES)))
    def drive_to(self, place: str) -> object:
        """Drive the robot to a named place."""
        (x, y), (to_x, to_y) = PLACES[self.place], PLACES[place]
        distance_m = abs(x - to_x) + abs(y - to_y)
        needed_percent = BATTERY_PERCENT_PER_M * distance_m
        if needed_percent > self.battery_percent:
            raise CannotDo(
                f"{needed_percent:.1f} % battery needed, {self.battery_percent:.1f} left"
            )
        self.battery_percent -= needed_percent
        self.place = place
        return {"arrived_at": place, "distance_m": distance_m}

    @tool("Grab the bottle.", {"item": "bottle"}, item=one_of(*ITEMS))
    def pick_up(self, item: str) -> object:
        """Close the gripper around an item and lift it."""
        if self.holding:
            raise CannotDo(f"the gripper already holds the {self.holding}")
        self.holding = item
        return {"holding": item}

    @tool("Set down what you hold.")
    def put_down(self) -> object:
        """Lower the held item and open the gripper."""
        if not self.holding:
            raise CannotDo("the gripper is empty")
        item, self.holding = self.holding, None
        return {"put_down": item, "at": self.place}

    @tool(
        "Turn on the front light.",
        {"lamp": "front", "on": True},
        lamp=one_of(*LAMPS),
        on=switch(),
    )
    def set_lamp(self, lamp: str, *, on: bool) -> object:
        """Switch a lamp on the robot."""
        self.lamps[lamp] = on
        return {"lamp": lamp, "on": on}

    @tool("Which places do you know?")
    def list_places(self) -> object:
        """List the places on the map."""
        return sorted(PLACES)


GOALS = (
    Goal("How full is your battery?", "battery_level"),
    Goal("Where are you right now?", "locate"),
    Goal("Pick up the crate.", "pick_up"),
    Goal("Drive to the packing station.", "drive_to"),
    Goal("Put down the crate.", "put_down"),
    Goal("Switch on the rear lamp.", "set_lamp"),
    Goal("Please go to shelf A.", "drive_to"),
    Goal("Take the box.", "pick_up"),
    Goal("Return to the dock.", "drive_to"),
    Goal("Turn the front lamp off.", "set_lamp"),
)


def robot() -> Robot:
    """A fresh one."""
    return Robot("warehouse", tools_of(Warehouse()), GOALS)
