"""Measuring installed engines through a running daemon, as a caller meets them.

`results`, `statistics`, `prompts`, `table` and `chart` are pure. `machine` reads the machine,
`bench` calls the daemon. Nothing here computes a token or changes how the machine is set.
"""
