"""How long properties are looked for: EDGE_AGENT_CHAOS times as many examples as in `make test`."""

import os

from hypothesis import settings

TIMES = int(os.environ.get("EDGE_AGENT_CHAOS", "1"))


def examples(count: int) -> settings:
    """So many of a property that takes no notice of time."""
    return settings(max_examples=count * TIMES, deadline=None)


def histories(count: int, steps: int) -> settings:
    """So many of a stateful model, each of at most so many steps."""
    return settings(max_examples=count * TIMES, stateful_step_count=steps, deadline=None)
