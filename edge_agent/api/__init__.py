"""The gRPC edge: proto to core and back, nothing else."""
