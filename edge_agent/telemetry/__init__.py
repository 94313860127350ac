"""What the machine says about itself: procfs, sysfs and NVML, each value with where it is from.

Every reader takes the root of the tree that it reads below and keeps nothing. No content of any
file makes one raise: what can't be read or makes no sense is a `Reading` without a value.
"""
