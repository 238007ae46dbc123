"""When the hosts' own limits pass in the trials called `late`: read by the tests, and in the hosts' environments."""

LATE_SEC = 20
"""By then their agent is at work, on a busy machine too."""
