"""Trials that a host cuts off: read by the tests, and in the hosts' environments."""

LATE_SEC = 20
"""When the hosts' own limits pass in those called `late`. By then their agent is at work, on a busy machine too."""

WORDS = "I think that it is 42, and look once more."
"""What their agent has said by then."""
