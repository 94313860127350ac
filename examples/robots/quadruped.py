"""A four-legged robot that inspects a plant: gaits, gauges, a camera, and jobs that go on.

What it starts (a patrol, following somebody, a video) goes on until it is stopped, and one job that
moves the legs excludes another. It must stand before it walks, and be at a gauge to read it.
Whatever moves the legs uses the resource `movement`; what stops them uses none, so that to stop is
always possible.
"""

from dataclasses import dataclass

from edge_agent.core import Lifecycle, SideEffect
from examples.robots.robot import (
    CannotDo,
    Goal,
    Robot,
    looks,
    number,
    one_of,
    rules,
    sets,
    text,
    tool,
    tools_of,
)

WAYPOINTS = {"boiler": (14, 3), "dock": (0, 0), "gate": (3, 18), "pump_hall": (8, 9)}
GAUGES = {
    "boiler_pressure": ("boiler", 6.2, "bar"),
    "pump_flow": ("pump_hall", 41.0, "l/min"),
    "tank_level": ("pump_hall", 73.0, "percent"),
}
PARTS_CELSIUS = {"bearing": 64, "motor": 58, "pipe": 35}
ROUTES = {"fence": ("gate", "dock"), "plant": ("pump_hall", "boiler", "dock")}
GAITS = ("crawl", "stairs", "trot", "walk")

STOPS = {
    "stop_patrol": ("start_patrol",),
    "stop_following": ("start_following",),
    "stop_moving": ("start_patrol", "start_following"),
    "stop_video": ("start_video",),
}

goes = rules(side_effect=SideEffect.IDEMPOTENT, resources=("movement",))
moves = rules(resources=("movement",))
goes_on = rules(lifecycle=Lifecycle.BACKGROUND, resources=("movement",))


@dataclass
class Quadruped:
    """The simulated machine. `job` is what its legs are busy with until that is stopped."""

    battery_percent: float = 64.0
    waypoint: str = "dock"
    heading_degrees: int = 90
    is_standing: bool = False
    job: str | None = None
    gait: str = "walk"
    height_cm: int = 50
    is_filming: bool = False
    photos: int = 0

    def _must_be_free(self) -> None:
        """The legs carry it, and no job has them."""
        if not self.is_standing:
            raise CannotDo("lying down: stand up first")
        if self.job:
            raise CannotDo(f"busy with {self.job}: stop that first")

    def _begin(self, job: str) -> object:
        self._must_be_free()
        self.job = job
        return {"started": job}

    def _end(self, kind: str) -> object:
        if not self.job or not self.job.startswith(kind):
            raise CannotDo(f"not {kind}")
        ended, self.job = self.job, None
        return {"stopped": ended, "at": self.waypoint}

    @looks
    @tool("How long will your charge last?")
    def battery_status(self) -> object:
        """Read the battery's charge and the minutes left."""
        minutes = round(self.battery_percent * 1.4)
        return {"battery_percent": round(self.battery_percent, 1), "minutes_left": minutes}

    @looks
    @tool("What is your position?")
    def locate(self) -> object:
        """Read where the robot is and where it looks."""
        x, y = WAYPOINTS[self.waypoint]
        return {"near": self.waypoint, "x_m": x, "y_m": y, "heading_degrees": self.heading_degrees}

    @goes
    @tool("Get on your feet.")
    def stand_up(self) -> object:
        """Rise from the ground."""
        if self.is_standing:
            raise CannotDo("standing already")
        self.is_standing = True
        return {"posture": "standing"}

    @goes
    @tool("Rest on the ground.")
    def lie_down(self) -> object:
        """Lower the body to the ground."""
        self._must_be_free()
        self.is_standing = False
        return {"posture": "lying"}

    @sets
    @tool("Halt!")
    def stop_moving(self) -> object:
        """End every movement at once and stay standing."""
        ended, self.job = self.job, None
        return {"stopped": ended or "nothing moved"}

    @goes
    @tool("Walk over to the boiler.", {"waypoint": "boiler"}, waypoint=one_of(*WAYPOINTS))
    def walk_to(self, waypoint: str) -> object:
        """Walk to a waypoint of the plant."""
        self._must_be_free()
        (x, y), (to_x, to_y) = WAYPOINTS[self.waypoint], WAYPOINTS[waypoint]
        distance_m = abs(x - to_x) + abs(y - to_y)
        self.battery_percent -= 0.4 * distance_m
        self.waypoint = waypoint
        return {"arrived_at": waypoint, "distance_m": distance_m}

    @moves
    @tool("Face the other way.", {"degrees": 180}, degrees=number(-180, 180))
    def turn_by(self, degrees: int) -> object:
        """Turn on the spot; positive is to the left."""
        self._must_be_free()
        self.heading_degrees = (self.heading_degrees + degrees) % 360
        return {"heading_degrees": self.heading_degrees}

    @moves
    @tool(
        "A step back, please.",
        {"forward_cm": -40, "left_cm": 0},
        forward_cm=number(-100, 100),
        left_cm=number(-100, 100),
    )
    def shift(self, forward_cm: int, left_cm: int) -> object:
        """Move a little without turning."""
        self._must_be_free()
        return {"moved_cm": [forward_cm, left_cm], "near": self.waypoint}

    @sets
    @tool("There are stairs ahead.", {"gait": "stairs"}, gait=one_of(*GAITS))
    def set_gait(self, gait: str) -> object:
        """Choose how the legs move."""
        self.gait = gait
        return {"gait": gait}

    @goes
    @tool("Duck under the pipe.", {"centimetres": 30}, centimetres=number(25, 60))
    def set_body_height(self, centimetres: int) -> object:
        """Raise or lower the body while standing."""
        self._must_be_free()
        self.height_cm = centimetres
        return {"height_cm": centimetres}

    @goes_on
    @tool("Walk the rounds along the fence.", {"route": "fence"}, route=one_of(*ROUTES))
    def start_patrol(self, route: str) -> object:
        """Walk a route again and again until told to stop."""
        started = self._begin(f"patrol {route}")
        self.waypoint = ROUTES[route][0]
        return started

    @sets
    @tool("Break off your rounds.")
    def stop_patrol(self) -> object:
        """End the patrol."""
        return self._end("patrol")

    @goes_on
    @tool("Come along behind me.")
    def start_following(self) -> object:
        """Follow the person in front until told to stop."""
        return self._begin("following")

    @sets
    @tool("You need not come along any more.")
    def stop_following(self) -> object:
        """Follow nobody any more."""
        return self._end("following")

    @rules(lifecycle=Lifecycle.BACKGROUND, resources=("video",))
    @tool("Begin filming.")
    def start_video(self) -> object:
        """Record the camera until told to stop."""
        if self.is_filming:
            raise CannotDo("recording already")
        self.is_filming = True
        return {"recording": True}

    @sets
    @tool("That is enough filming.")
    def stop_video(self) -> object:
        """End the recording and save it."""
        if not self.is_filming:
            raise CannotDo("nothing is being recorded")
        self.is_filming = False
        return {"recording": False, "saved": "video_1.mp4"}

    @tool("Snap a picture of this.")
    def take_photo(self) -> object:
        """Take one picture with the camera."""
        self.photos += 1
        return {"saved": f"photo_{self.photos}.jpg", "near": self.waypoint}

    @looks
    @tool("What does the tank say?", {"gauge": "tank_level"}, gauge=one_of(*GAUGES))
    def read_gauge(self, gauge: str) -> object:
        """Read a gauge with the camera, standing in front of it."""
        place, value, unit = GAUGES[gauge]
        if place != self.waypoint:
            raise CannotDo(f"{gauge} is at {place}, the robot is at {self.waypoint}")
        return {"gauge": gauge, "value": value, "unit": unit}

    @looks
    @tool("How hot is the motor?", {"part": "motor"}, part=one_of(*PARTS_CELSIUS))
    def measure_heat(self, part: str) -> object:
        """Measure how hot a part is with the thermal camera."""
        if self.waypoint not in {"boiler", "pump_hall"}:
            raise CannotDo(f"no {part} in sight at {self.waypoint}")
        return {"part": part, "celsius": PARTS_CELSIUS[part]}

    @tool("Warn the people here.", {"words": "Please step back."}, words=text(80))
    def say(self, words: str) -> object:
        """Speak through the loudspeaker."""
        return {"said": words}

    @looks
    @tool("Which waypoints are there?")
    def list_waypoints(self) -> object:
        """List the waypoints of the plant."""
        return sorted(WAYPOINTS)


GOALS = (
    Goal("How full is the battery?", "battery_status"),
    Goal("Stand up.", "stand_up"),
    Goal("Walk to the pump hall.", "walk_to"),
    Goal("Read the flow of the pump.", "read_gauge"),
    Goal("Measure the temperature of the bearing.", "measure_heat"),
    Goal("Take a photo.", "take_photo"),
    Goal("Start patrolling the plant.", "start_patrol"),
    Goal("Stop the patrol.", "stop_patrol"),
    Goal("Record a video.", "start_video"),
    Goal("Turn left by 90 degrees.", "turn_by"),
)


def robot() -> Robot:
    """A fresh one."""
    return Robot("quadruped", tools_of(Quadruped()), GOALS, stops=STOPS)
