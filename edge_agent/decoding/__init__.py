"""From a step to token ids and back to text or tool calls; runs inside a worker."""
