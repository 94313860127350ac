"""The scheduler's production core on simulated devices, beside today's peers and a bound.

Six workloads on four devices, some days each, under four policies on the same traces. Devices and
engines are simulated: no figure here was measured on a device. `_sched_devices`, `_sched_workloads`
and `_sched_world` say what is published and what is assumed, `_sched_policies` what each peer does
as described, `_sched_bound` what the bound is. Only the decision times are measured, in CPU time.

The bound is solved on slices of ten minutes, each against our own policy on the same slice from the
same empty start; `load_s_ratio_vs_bound` is all our seconds of loading there over all the bound's.
A floor violation is: memory below the hard floor while an engine loads, or for longer than two
seconds (a reading, a kill, and its memory back). A step starves if it waits for an hour.

`bound_ratio_at_wanted_waits_*` says whether few loads and short waits can be had together: the
bound's seconds of loading if INTERACTIVE steps waited at most half as long as the best peer's p99
on that device, and all others no longer than it, over the best peer's seconds on the same slices.
Above 0.5, no scheduler meets both aims there.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._sched_bound import Bound, least_load_s
from benchmarks._sched_decisions import decision_times_s
from benchmarks._sched_devices import DEVICES, Device
from benchmarks._sched_figures import (
    OURS,
    SWAPPING,
    Tallies,
    by_class,
    load_ratio,
    outcomes_of,
    starved,
    urgent_misses,
    wait_ratios,
    waits,
)
from benchmarks._sched_plot import Panel, draw
from benchmarks._sched_policies import PEERS, Ours
from benchmarks._sched_records import Policy, Tally
from benchmarks._sched_workloads import DAY_S, WORKLOADS, Trace, make_trace
from benchmarks._sched_world import World
from benchmarks._shared import Target, percentile, report
from edge_agent.core import Priority

TARGETS = (
    Target("floor_violations", 0, True, "memory below the hard floor, ours"),
    Target("urgent_deadline_misses", 0, True, "URGENT steps late where the bound has none"),
    Target("load_s_ratio_vs_bound", 1.3, True, "seconds of loading, ours / clairvoyant"),
    Target("load_s_ratio_vs_best_peer", 0.5, True, "the same / best peer's, ping-pong and bursts"),
    Target("p99_wait_ratio_vs_best_peer", 0.5, True, "INTERACTIVE wait, ours / best peer's"),
    Target("p99_wait_ratio_worst_class", 1.0, True, "the same of the class with the worst ratio"),
    Target("starved", 0, True, "steps that waited for an hour or for ever, ours"),
    Target("decision_us_p99", 100, True, "1,000 waiting steps, 32 engines, 8 in memory"),
    Target("weeks_per_minute", 1, False, "simulated weeks of ours in a minute"),
)
_SLICE_S = 600.0
_SLICES_AT_S = (3600.0, 14_400.0)
_WEEK_S = 7 * DAY_S


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is simulated. `branch_s` is for each slice of the bound."""

    days: float
    devices: Sequence[Device]
    slices_at_s: Sequence[float]
    branch_s: float
    decisions: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Ours and the bound on the same slice."""

    workload: str
    device: str
    ours_load_s: float
    bound: Bound


def simulate(trace: Trace, policy: Policy) -> Tally:
    return World(trace, policy).run()


def longest_waits(tally: Tally) -> dict[Priority, float]:
    """How long each class waited at most."""
    return {
        priority: max(outcome.wait_s for outcome in outcomes)
        for priority, outcomes in by_class(tally.outcomes).items()
    }


def bound_of(trace: Trace, tally: Tally, branch_s: float) -> Bound:
    """With the waits that ours needed."""
    return bound_at(trace, longest_waits(tally), branch_s)


def bound_at(trace: Trace, waits_s: Mapping[Priority, float], branch_s: float) -> Bound:
    """With these waits, in steps of a third of the shortest load."""
    shortest_s = min(trace.device.engine(name).load_s for name in trace.engines())
    dt_s = max(1.0, shortest_s / 3)
    return least_load_s(trace, waits_s, dt_s=dt_s, seconds=branch_s)


def run_suite(plan: Plan, seed: int) -> tuple[dict[tuple[str, str], dict[str, Tally]], float]:
    """Every workload on every device under every policy; and how long ours took, in seconds."""
    tallies = {}
    ours_s = 0.0
    for workload in WORKLOADS:
        for device in plan.devices:
            trace = make_trace(workload, device, plan.days, seed)
            started = time.perf_counter()
            cell = {OURS: simulate(trace, Ours(trace))}
            ours_s += time.perf_counter() - started
            cell |= {name: simulate(trace, peer(trace)) for name, peer in PEERS.items()}
            tallies[workload, device.name] = cell
            show_cell(workload, device.name, len(trace.tasks), cell)
    return tallies, ours_s


def run_slices(plan: Plan, seed: int) -> list[Slice]:
    """The bound beside ours, slice by slice."""
    slices = []
    for workload in WORKLOADS:
        for device in plan.devices:
            whole = make_trace(workload, device, plan.days, seed)
            for start_s in plan.slices_at_s:
                trace = whole.cut(start_s, _SLICE_S)
                if not trace.tasks:
                    continue
                tally = simulate(trace, Ours(trace))
                bound = bound_of(trace, tally, plan.branch_s)
                slices.append(Slice(workload, device.name, tally.load_s, bound))
    return slices


def wanted_waits(cell: Mapping[str, Tally]) -> dict[Priority, float]:
    """What the aims ask for: the best peer's p99 of each class, half of it for INTERACTIVE."""
    classes = [by_class(cell[name].outcomes) for name in PEERS]
    return {
        priority: min(waits(found[priority]).p99_s for found in classes)
        * (0.5 if priority is Priority.INTERACTIVE else 1.0)
        for priority in classes[0]
    }


def ratio_at_wanted_waits(plan: Plan, seed: int, tallies: Tallies, workload: str) -> float:
    """The bound at those waits against the best peer, on the slices of one workload."""
    bound_s = best_s = 0.0
    for device in plan.devices:
        wanted = wanted_waits(tallies[workload, device.name])
        whole = make_trace(workload, device, plan.days, seed)
        for start_s in plan.slices_at_s:
            trace = whole.cut(start_s, _SLICE_S)
            bound = bound_at(trace, wanted, 0.0) if trace.tasks else None
            if bound is not None and bound.feasible:
                bound_s += bound.relaxed_load_s
                best_s += min(simulate(trace, peer(trace)).load_s for peer in PEERS.values())
    return bound_s / best_s if best_s else math.nan


def show_cell(workload: str, device: str, steps: int, cell: dict[str, Tally]) -> None:
    print(f"\n{workload} on {device}: {steps} steps")
    print(
        f"  {'':20}{'loads':>7}{'load s':>9}{'floor':>7}{'OOM':>5}{'busy':>7}{'lost':>6}"
        "   wait p50/p99/longest, latency p99 by class, s"
    )
    for name, tally in cell.items():
        lost = sum(outcome.ended_s is None for outcome in tally.outcomes)
        classes = []
        for priority, outcomes in by_class(tally.outcomes).items():
            found = waits(outcomes)
            missed = sum(outcome.missed for outcome in outcomes)
            late = f" ({missed} late)" if priority is Priority.URGENT else ""
            classes.append(
                f"{priority.value.lower()} {found.p50_s:.1f}/{found.p99_s:.1f}/"
                f"{found.longest_s:.0f}, {found.latency_p99_s:.1f}{late}"
            )
        print(
            f"  {name:20}{tally.loads:>7}{tally.load_s:>9.0f}{tally.floor_violations:>7}"
            f"{tally.oom_kills:>5}{tally.busy_evictions:>7}{lost:>6}   {'; '.join(classes)}"
        )


def show_slices(slices: Sequence[Slice]) -> None:
    print(f"\nload s on slices of {_SLICE_S:g} s: ours, bound (relaxation alone)")
    for each in slices:
        bound = each.bound
        said = f"{bound.proven_load_s:.0f} ({bound.relaxed_load_s:.0f})" if bound.feasible else "-"
        print(f"  {each.workload:10} {each.device:16}{each.ours_load_s:>8.0f}  {said}")


def figures(
    tallies: Tallies, slices: Sequence[Slice], decisions_s: Sequence[float], weeks: float
) -> dict[str, float]:
    """The keys of TARGETS."""
    ours = outcomes_of(tallies, OURS)
    peers = list(PEERS)
    ratios = wait_ratios(tallies, peers)
    solved = [each for each in slices if each.bound.feasible]
    bound_s = sum(each.bound.proven_load_s for each in solved)
    return {
        "floor_violations": float(sum(cell[OURS].floor_violations for cell in tallies.values())),
        "urgent_deadline_misses": float(urgent_misses(ours)),
        "load_s_ratio_vs_bound": sum(each.ours_load_s for each in solved) / bound_s,
        "load_s_ratio_vs_best_peer": max(load_ratio(tallies, name, peers) for name in SWAPPING),
        "p99_wait_ratio_vs_best_peer": ratios[Priority.INTERACTIVE],
        "p99_wait_ratio_worst_class": max(ratios.values()),
        "starved": float(starved(ours)),
        "decision_us_p99": percentile(decisions_s, 0.99) * 1e6,
        "weeks_per_minute": weeks,
    }


def panels(tallies: Tallies) -> list[Panel]:
    """The whole suite, policy by policy."""
    names = [OURS, *PEERS]
    classes = {name: by_class(outcomes_of(tallies, name)) for name in names}
    found = [priority for priority in Priority if priority in classes[OURS]]

    def total(count: str) -> dict[str, float | None]:
        return {
            name: float(sum(getattr(cell[name], count) for cell in tallies.values()))
            for name in names
        }

    def of_classes(figure: str) -> dict[str, dict[str, float | None]]:
        return {
            priority.value: {
                name: getattr(waits(classes[name][priority]), figure) for name in names
            }
            for priority in found
        }

    loads: dict[str, dict[str, float | None]] = {
        workload: {
            name: sum(cell[name].load_s for (key, _), cell in tallies.items() if key == workload)
            for name in names
        }
        for workload in WORKLOADS
    }
    late: dict[str, float | None] = {
        name: float(urgent_misses(outcomes_of(tallies, name))) for name in names
    }
    return [
        Panel("step latency, p99, s", of_classes("latency_p99_s")),
        Panel("wait, p99, s", of_classes("p99_s")),
        Panel("longest wait, s", of_classes("longest_s")),
        Panel("seconds of loading", loads),
        Panel("URGENT deadlines missed", {"all": late}),
        Panel("floor violations", {"all": total("floor_violations")}),
        Panel("evictions of busy engines", {"all": total("busy_evictions")}),
    ]


def plan_for(arguments: argparse.Namespace) -> Plan:
    if arguments.quick:
        return Plan(0.06, DEVICES[:1], _SLICES_AT_S[:1], 0.0, 2000)
    return Plan(arguments.days, DEVICES, _SLICES_AT_S, arguments.branch_s, 20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures mean little")
    parser.add_argument("--days", type=float, default=1.0, help="simulated, of each combination")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--branch-s", type=float, default=1.0, help="seconds to tighten each bound")
    parser.add_argument("--plot", type=Path, help="an SVG of the suite")
    parser.add_argument("--store", type=Path, help="not looked at: engines are simulated")
    arguments = parser.parse_args()
    plan = plan_for(arguments)
    tallies, ours_s = run_suite(plan, arguments.seed)
    slices = run_slices(plan, arguments.seed)
    show_slices(slices)
    weeks = len(tallies) * plan.days * DAY_S / _WEEK_S
    decisions_s = decision_times_s(plan.decisions)
    measured = figures(tallies, slices, decisions_s, weeks / ours_s * 60)
    ratios = wait_ratios(tallies, list(PEERS))
    more = {f"p99_wait_ratio_{key.value.lower()}": value for key, value in ratios.items()}
    # The one that has the kernel kill the fewest engines: short waits paid for so are none.
    gentlest = min(PEERS, key=lambda name: sum(cell[name].oom_kills for cell in tallies.values()))
    for key, value in wait_ratios(tallies, [gentlest]).items():
        more[f"p99_wait_ratio_vs_gentlest_peer_{key.value.lower()}"] = value
    more |= {f"load_s_ratio_{name}": load_ratio(tallies, name, list(PEERS)) for name in WORKLOADS}
    for name in SWAPPING:
        ratio = ratio_at_wanted_waits(plan, arguments.seed, tallies, name)
        more[f"bound_ratio_at_wanted_waits_{name}"] = ratio
    more |= {"decision_us_p50": percentile(decisions_s, 0.5) * 1e6, "simulated_weeks": weeks}
    finite = {key: value for key, value in more.items() if math.isfinite(value)}
    if arguments.plot:
        note = f"{weeks:.1f} simulated weeks of each policy; nothing was measured on a device"
        svg = draw("edge-agent: scheduler", [note], [OURS, *PEERS], panels(tallies))
        arguments.plot.write_text(svg)
    report("scheduler", TARGETS, measured, more=finite, spreads={}, engine="simulated")


if __name__ == "__main__":
    main()
