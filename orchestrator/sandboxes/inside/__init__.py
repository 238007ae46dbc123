"""What runs inside a remote sandbox, on the Python that its image has: the standard library of 3.8 and nothing else.

`keeper` is called once for each thing that the host wants done, as root. `init` is PID 1 of a handle's namespace:
it starts what the handle starts, keeps what is said until the host has it, and takes everything along when it is
killed. `files` walks paths that an agent may have turned into traps. `system` is what the kernel has and Python lacks.
"""
