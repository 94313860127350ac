"""Agent runs: the loop of steps, their tools and limits, and what is halted."""
