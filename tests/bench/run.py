"""`make bench`: every figure that the README quotes, measured in one run, held against its limit.

Prints the table and writes it to `tests/bench/results.md`; exits 1 on a miss. Limits are absolute where users feel
them and ratios to a peer measured in the same run where machines differ.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import docker_images  # noqa: E402 - what tests make their images with, beside this folder

HELP = "import contextlib, sys; sys.argv = ['rollout', '--help']; from orchestrator.cli import main"
RUN_HELP = f"{HELP}\nwith contextlib.suppress(SystemExit): main()"


@attrs.frozen
class Row:
    """One figure and its limit; `at_least` turns the comparison round."""

    what: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the figure keeps its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        """As a row of a Markdown table."""
        bound = "at least" if self.at_least else "at most"
        verdict = "pass" if self.passed else "**miss**"
        return f"| {self.what} | {_number(self.value)} {self.unit} | {bound} {_number(self.limit)} | {verdict} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def measured(function: str, module: str = "bench_kernel") -> float:
    """Call a function of a bench module in a process of its own, so that no figure carries another's leftovers."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {module}; print({module}.{function})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def best_of(runs: int, measure: Callable[[], float]) -> float:
    """The best of several runs: what the code costs, without what else the machine was doing."""
    return min(measure() for _ in range(runs))


def docker_rows() -> list[Row]:
    """What Docker costs; nothing where no engine answers, which is said."""
    try:
        docker_images.require_engine()
    except docker_images.NoEngine as why:
        sys.stderr.write(f"the rows of Docker are left out: {why}\n")
        return []

    def times_bare(count: int, agent: str, what: str, limit: float) -> Row:
        what = f"{count} docker rollout(s) at once, {what}, wall, times their engine calls replayed bare"
        return Row(what, measured(f"times_bare({count}, {agent!r})", "bench_docker"), limit, "x")

    return [
        *(times_bare(count, "scripted", "the agent in our process", 1.5) for count in (1, 8, 32)),
        *(times_bare(count, "scripted-acp", "the agent a Python in the container", 2) for count in (1, 8, 32)),
        Row("a further docker rollout among 32, CPU", measured("cpu_of_a_further_one()", "bench_docker"), 0.06, "s"),
        Row("engine calls of a docker rollout", measured("calls_of_one()", "bench_docker"), 6, ""),
        Row(
            "an ACP line there and back over a docker channel, median",
            measured("docker_round_trip_ms()", "bench_docker"),
            1,
            "ms",
        ),
    ]


def rows() -> list[Row]:
    """Measure everything."""
    sdk, ours = measured("sdk_client()", "bench_acp"), measured("read_and_typed()", "bench_acp")
    few = best_of(3, lambda: measured("seconds_of_one_message(5_000)", "bench_acp"))
    many = best_of(3, lambda: measured("seconds_of_one_message(50_000)", "bench_acp"))
    reply = best_of(3, lambda: measured("reply_to_turn_ended()", "bench_acp"))
    return [
        Row("a no-op rollout, CPU", best_of(3, lambda: measured("noop_cpu_ms()")), 3, "ms"),
        Row(
            "longest hold of the loop (CPU), 500 rollouts at once", best_of(3, lambda: measured("stall_ms()")), 50, "ms"
        ),
        Row("1,000 rollouts in `executing`, memory", measured("waiting_mb()"), 100, "MB"),
        Row("ACP updates read and typed, times the SDK's client", ours / sdk, 4, "x", at_least=True),
        Row(
            "ACP updates read and captured to disk, a second",
            measured("captured()", "bench_acp"),
            50_000,
            "",
            at_least=True,
        ),
        Row("one message of 50,000 chunks, times the CPU of 5,000", many / few, 12, "x"),
        Row("one message of 50,000 chunks, CPU", many, 2, "s"),
        Row("from an agent's reply to `TurnEnded`, longest of 200", reply * 1000, 10, "ms"),
        Row("gateway passthrough, CPU a call", measured("bench_gateway()['plain']", "gateway"), 1, "ms"),
        Row("gateway passthrough streamed, CPU a call", measured("bench_gateway()['streamed']", "gateway"), 1, "ms"),
        Row(
            "local sandbox: open, a command, end; times a bare bwrap with its view and PID 1",
            best_of(3, lambda: measured("local_times_bare()", "bench_sandboxes")),
            1.5,
            "x",
        ),
        Row(
            "the same, times a bare bwrap of /bin/true, which has no PID 1 of ours",
            best_of(3, lambda: measured("local_times_bare('/bin/true')", "bench_sandboxes")),
            5,
            "x",
        ),
        Row(
            "local sandbox: a command, times a bare bwrap spawn of it",
            best_of(3, lambda: measured("command_times_bare()", "bench_sandboxes")),
            1.5,
            "x",
        ),
        *docker_rows(),
        Row(
            "an ACP line there and back over a local channel, median",
            measured("local_round_trip_ms()", "bench_sandboxes"),
            1,
            "ms",
        ),
        *(
            Row(
                f"the same over a Daytona {channel}, its real SDK, a service on loopback",
                measured(f"daytona_round_trip_ms({channel!r})", "bench_sandboxes"),
                limit,
                "ms",
            )
            for channel, limit in (("session", 60), ("pty", 10))
        ),
        Row(
            "an ACP line there and back where the sandbox can only exec, median",
            measured("exec_only_round_trip_ms()", "bench_relay"),
            150,
            "ms",
        ),
        Row(
            "a request there and back by the relay, above the direct path, median",
            best_of(3, lambda: measured("local_added_ms()", "bench_relay")),
            1,
            "ms",
        ),
        Row("`rollout --help`, CPU above a bare interpreter", measured(f"start_cpu({RUN_HELP!r})"), 0.25, "s"),
        Row("`import orchestrator`, CPU above it", measured("start_cpu('import orchestrator')"), 0.15, "s"),
        Row("heavy libraries that `import orchestrator` loads", measured("heavy_count('import orchestrator')"), 0, ""),
        Row("heavy libraries that `rollout --help` loads", measured(f"heavy_count({RUN_HELP!r})"), 0, ""),
    ]


def main() -> int:
    """Print and write the table."""
    measured_rows = rows()
    cores = len([line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")])
    head = f"Python {platform.python_version()}, {cores} cores"
    lines = [f"| {head} | measured | limit | |", "|---|---:|---:|---|", *(row.line() for row in measured_rows)]
    table = "\n".join(lines) + "\n"
    (HERE / "results.md").write_text(table)
    sys.stdout.write(table)
    return 0 if all(row.passed for row in measured_rows) else 1


if __name__ == "__main__":
    sys.exit(main())
