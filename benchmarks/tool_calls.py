"""How well and how fast the embedded model chooses tools, by each strategy.

Robots: 70 prompts, the report half of `_tool_robots.yaml`, to five robots with eight tools each.
BFCL: cases of `simple_python`, `multiple` and `live_simple` by a fixed seed (`--all`: all of them),
judged by BFCL's own checker. Greedy, one thread, in this process, as a worker decides a step.

A case counts where the right tool was called (or none, where none fits); beside it, where its
arguments were right as well. An output that was cut or refused is a wrong one. Times are of the
robots' steps, with the tools' prompt cached; strategies take turns robot by robot.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import _tool_bfcl
from benchmarks._shared import REPOSITORY, Arguments, Target, median, report, spread
from benchmarks._tool_cases import Case, robot_cases
from benchmarks._tool_steps import Outcome, decide_all, loaded_decoder
from edge_agent.core import ToolStrategy
from edge_agent.decoding.steps import StepDecoder

ROBOTS = "robots"
BFCL_COUNT = 16
BFCL_STRATEGIES = (ToolStrategy.SCHEMA, ToolStrategy.RANKED)
QUICK_PROMPTS = 2
TARGETS = (
    Target("ranked_vs_schema_accuracy", 1.5, False, "right tools, of schema's, robots"),
    Target("ranked_full_accuracy", 1.9, False, "the same of ranked_full"),
    Target("schema_valid", 1.0, False, "share of completed calls"),
    Target("ranked_time_ratio", 1.1, True, "a step's median, of schema's, robots"),
)

Outcomes = dict[tuple[str, ToolStrategy], list[Outcome]]
"""By data set and strategy."""


def parse() -> tuple[Arguments, bool]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures mean little")
    parser.add_argument("--all", action="store_true", help="all cases of BFCL: takes an hour")
    parser.add_argument("--store", type=Path, default=REPOSITORY / "build" / "engines")
    parsed = parser.parse_args()
    return Arguments(parsed.quick, parsed.store.resolve()), parsed.all


def measure(
    decoder: StepDecoder, robots: Sequence[Case], sets: Mapping[str, list[Case]]
) -> Outcomes:
    """Every strategy on the robots, those of BFCL_STRATEGIES on BFCL."""
    done: Outcomes = {(ROBOTS, strategy): [] for strategy in ToolStrategy}
    for robot in dict.fromkeys(case.group for case in robots):
        cases = [case for case in robots if case.group == robot]
        for strategy in ToolStrategy:
            done[ROBOTS, strategy] += decide_all(decoder, strategy, cases, warm=True)
    for name, cases in sets.items():
        for strategy in BFCL_STRATEGIES:
            done[name, strategy] = decide_all(decoder, strategy, cases, warm=False)
    return done


def accuracy(outcomes: Iterable[Outcome]) -> float:
    """The share of right tools."""
    right = [outcome.right_tool for outcome in outcomes]
    return sum(right) / len(right)


def arguments_accuracy(outcomes: Iterable[Outcome]) -> float:
    """The share of calls that are right with their arguments, where the case says which are."""
    right = [each.right_arguments for each in outcomes if each.right_arguments is not None]
    return sum(right) / len(right) if right else 0.0


def ratio(value: float, base: float) -> float:
    """0 where there is nothing to compare with, as may be in a smoke run."""
    return value / base if base else 0.0


def print_table(done: Outcomes) -> None:
    print(
        f"\n{'':15}{'strategy':13}{'cases':>6}{'tool %':>8}{'arguments %':>13}"
        f"{'repaired':>10}{'none':>6}{'ms':>7}  middle half"
    )
    for (name, strategy), outcomes in done.items():
        times = [outcome.step_ms for outcome in outcomes]
        print(
            f"{name:15}{strategy.value:13}{len(outcomes):>6}{accuracy(outcomes) * 100:>8.1f}"
            f"{arguments_accuracy(outcomes) * 100:>13.1f}"
            f"{sum(outcome.repaired for outcome in outcomes):>10}"
            f"{sum(not outcome.chosen for outcome in outcomes):>6}"
            f"{median(times):>7.0f}  {spread(times)}"
        )


def figures(done: Outcomes) -> tuple[dict[str, float], dict[str, float]]:
    """What has targets, and what is reported beside it."""
    robots = {strategy: done[ROBOTS, strategy] for strategy in ToolStrategy}
    right = {strategy: accuracy(outcomes) for strategy, outcomes in robots.items()}
    took = {key: median(each.step_ms for each in outcomes) for key, outcomes in robots.items()}
    schema, ranked, full = ToolStrategy.SCHEMA, ToolStrategy.RANKED, ToolStrategy.RANKED_FULL
    valid = [each.valid for all_of in done.values() for each in all_of if each.valid is not None]
    measured = {
        "ranked_vs_schema_accuracy": ratio(right[ranked], right[schema]),
        "ranked_full_accuracy": ratio(right[full], right[schema]),
        "schema_valid": sum(valid) / len(valid) if valid else 0.0,
        "ranked_time_ratio": took[ranked] / took[schema],
    }
    more = {"ranked_full_time_ratio": took[full] / took[schema]}
    for (name, strategy), outcomes in done.items():
        more[f"{strategy.value}_{name}"] = accuracy(outcomes)
        more[f"{strategy.value}_{name}_arguments"] = arguments_accuracy(outcomes)
    for name in dict.fromkeys(name for name, _ in done if name != ROBOTS):
        base = accuracy(done[name, schema])
        more[f"ranked_vs_schema_{name}"] = ratio(accuracy(done[name, ranked]), base)
    return measured, more


def main() -> None:
    arguments, everything = parse()
    robots = robot_cases("report")
    if arguments.quick:
        robots = robots[:QUICK_PROMPTS]
    place = None if arguments.quick else _tool_bfcl.fetch()
    count = None if everything else BFCL_COUNT
    sets = {name: _tool_bfcl.cases(place, name, count) for name in _tool_bfcl.CATEGORIES if place}
    with loaded_decoder(arguments) as decoder:
        done = measure(decoder, robots, sets)
    print_table(done)
    measured, more = figures(done)
    report("tool_calls", TARGETS, measured, more=more, spreads={})


if __name__ == "__main__":
    main()
