"""`conformance` and `doctor`: what a sandbox, and this machine, can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from orchestrator.cli.base import cli, json_option, pairs, print_json
from states.errors import ConfigError

if TYPE_CHECKING:
    from states.ports import Sandbox


@cli.command(short_help="Whether a sandbox does what rollouts need.")
@click.argument("sandbox")
@click.option("--sandbox-option", "sandbox_options", multiple=True, metavar="K=V", help="A word of that sandbox's own.")
@click.option("--image", metavar="IMAGE", help="What it runs, where it runs images.")
@click.option("-k", "word", default="", metavar="WORD", help="Only clauses whose name has this in it.")
@json_option
def conformance(sandbox: str, *, sandbox_options: tuple[str, ...], image: str | None, word: str, as_json: bool) -> int:
    """Check that SANDBOX (local, docker, daytona, fake, or module:Class) does what rollouts need, clause by clause.

    Real sandboxes are made, used and given back. Exits with 1 when a clause fails.
    """
    import uuid

    import anyio

    from orchestrator.conformance import SANDBOX_CLAUSES, Outcome, run_clauses
    from orchestrator.sandboxes import SandboxSpec, check_made, check_sandbox, lacks, make_sandbox

    options = pairs("--sandbox-option", sandbox_options)
    check_sandbox(sandbox, options)
    check_made(SandboxSpec(sandbox, "conformance", image=image, options=options, note=_say_note))
    clauses = [clause for clause in SANDBOX_CLAUSES if word in clause.name]
    if not clauses:
        raise ConfigError(f"-k {word}: no clause has that in its name")

    def make() -> Sandbox:
        name = f"conformance-{uuid.uuid4().hex[:8]}"
        return make_sandbox(SandboxSpec(sandbox, name, image=image, options=options))

    def tell(outcome: Outcome) -> None:
        if not as_json:
            click.echo(
                f"{click.style('pass', fg='green') if outcome.passed else click.style('FAIL', fg='red')}  ", nl=False
            )
            click.echo(f"{outcome.clause.name}: {outcome.clause.asserts if outcome.passed else outcome.said}")

    async def run_all() -> tuple[Outcome, ...]:
        return await run_clauses(clauses, make, lacks=lacks(sandbox), tell=tell)

    outcomes = anyio.run(run_all)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if as_json:
        rows = [
            {"clause": o.clause.name, "asserts": o.clause.asserts, "passed": o.passed, "said": o.said} for o in outcomes
        ]
        print_json({"sandbox": sandbox, "clauses": rows, "left_out": len(clauses) - len(outcomes)})
    else:
        left_out = len(clauses) - len(outcomes)
        beside = f"; {left_out} left out, which it cannot meet by design" if left_out else ""
        click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} clauses hold{beside}")
    return 1 if failed else 0


def _say_note(text: str) -> None:
    """Where there is no journal for it."""
    click.echo(f"note: {text}", err=True)


@cli.command(short_help="What this machine can and cannot do.")
@json_option
def doctor(*, as_json: bool) -> int:
    """What this machine can and cannot do, found out by trying, and how to fix it.

    Exits with 1 when rollouts in the local sandbox cannot work; what is merely missing costs nothing.
    """
    from orchestrator import doctor as doctoring

    findings = doctoring.examine()
    if as_json:
        import attrs

        print_json({"ok": doctoring.healthy(findings), "findings": [attrs.asdict(finding) for finding in findings]})
    else:
        click.echo(doctoring.report(findings, click.style), nl=False)
    return 0 if doctoring.healthy(findings) else 1
