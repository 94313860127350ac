"""Engines on disk, and the worker processes that host loaded ones."""
