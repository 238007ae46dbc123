"""Rules of the design that no type checker knows, read off the source and off a fresh interpreter."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from states import events as ev
from states import machine as m
from states.deadlines import EXPIRY, Deadline, crashed
from states.errors import IllegalTransition

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("states", "orchestrator") for path in (ROOT / folder).rglob("*.py"))
STATES = [path for path in SOURCES if path.parent.name == "states"]
MACHINE = ROOT / "states" / "machine.py"


def name_of(path: Path) -> str:
    """A source's path for a reader."""
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    """A source as a tree."""
    return ast.parse(path.read_text(), filename=str(path))


# --- only the machine moves ------------------------------------------------------------------------------------

NOT_A_ROLLOUTS = {"states/errors.py: self.state": "IllegalTransition says in which state it happened"}
"""Attributes of this name that are no rollout's state, with the reason."""

SETTERS = {"setattr", "__setattr__", "delattr", "__delattr__"}


def state_writes(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything in a tree that assigns an attribute `state`, by whatever means, or makes up a position."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="state" | "_state", ctx=ast.Store() | ast.Del()):
                yield node
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args, keywords=keywords):
                constants = {arg.value for arg in args if isinstance(arg, ast.Constant)}
                by_name = {keyword.arg for keyword in keywords}
                if (
                    (name in SETTERS and constants & {"state", "_state"})
                    or (name in {"evolve", "replace", "assoc"} and "state" in by_name)
                    or (name == "Position" and (args or keywords))
                ):
                    yield node
            case ast.Subscript(
                value=ast.Attribute(attr="__dict__") | ast.Call(func=ast.Name(id="vars")),
                slice=ast.Constant(value="state"),
                ctx=ast.Store() | ast.Del(),
            ):
                yield node


@pytest.mark.parametrize("path", [path for path in SOURCES if path != MACHINE], ids=name_of)
def test_nothing_outside_the_machine_assigns_a_state(path):
    """By assignment, setattr, object.__setattr__, evolve, `__dict__`, or a position of one's own."""
    found = [f"{name_of(path)}: {ast.unparse(node)}" for node in state_writes(parse(path))]
    assert [where for where in found if where not in NOT_A_ROLLOUTS] == []


@pytest.mark.parametrize(
    "code",
    [
        "x.state = 'closed/void'",
        "self.state: str = 'closed/void'",
        "x.state += 'd'",
        "a, x.state = 1, 2",
        "for x.state in y: pass",
        "with y as x.state: pass",
        "del x.state",
        "setattr(x, 'state', 1)",
        "object.__setattr__(x, 'state', 1)",
        "attrs.evolve(position, state='executing')",
        "evolve(position, state='executing')",
        "copy.replace(position, state='executing')",
        "x.__dict__['state'] = 1",
        "vars(x)['state'] = 1",
        "Position('executing')",
        "machine.Position(state='executing')",
    ],
)
def test_every_way_to_assign_a_state_would_be_seen(code):
    """The rule above is not blind."""
    assert list(state_writes(ast.parse(code)))


def test_reading_a_state_is_free():
    assert not list(state_writes(ast.parse("y = x.state\nif x.state == 'paused': f(state=x.state)\np = Position()")))


# --- no flags ----------------------------------------------------------------------------------------------------

ACTORS = [
    path
    for path in SOURCES
    if path == ROOT / "orchestrator" / "rollout.py" or path.parent.name in {"states", "transports"}
]


def flags(tree: ast.AST) -> Iterator[ast.AST]:
    """Assignments of None, True or False to an attribute, outside of constructors."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if function.name in {"__init__", "__attrs_post_init__"}:
            continue
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=targets, value=ast.Constant(value=None | True | False)):
                    if any(isinstance(target, ast.Attribute) for target in targets):
                        yield node
                case ast.AnnAssign(target=ast.Attribute(), value=ast.Constant(value=None | True | False)):
                    yield node


@pytest.mark.parametrize("path", ACTORS, ids=name_of)
def test_no_attribute_of_rollout_kernel_or_transport_is_a_flag(path):
    """What means a state is a state: nothing assigns None, True or False to an attribute after construction."""
    assert [f"{name_of(path)}:{node.lineno}" for node in flags(parse(path))] == []


@pytest.mark.parametrize(
    "line", ["self.client = None", "self._closed = True", "self.a = self.b = False", "x.y: bool = True"]
)
def test_a_flag_would_be_seen(line):
    assert list(flags(ast.parse(f"class A:\n  def close(self):\n    {line}")))
    assert not list(flags(ast.parse(f"class A:\n  def __init__(self):\n    {line}")))


# --- states/ is without a world ------------------------------------------------------------------------------------

ALLOWED = {
    "__future__": "",
    "attrs": "values",
    "transitions": "the machine",
    "collections": "",
    "collections.abc": "",
    "contextlib": "",
    "functools": "",
    "itertools": "",
    "math": "",
    "types": "",
    "typing": "",
    "anyio": "cancel scopes only, see below",
    "anyio.lowlevel": "whether the scope is cancelled",
}
"""All that states/ may import, with the reason where there is one."""

EXCEPTIONS = {("states/ports.py", "pathlib"): "Path, in signatures"}
SCOPES = {
    "CancelScope",
    "fail_after",
    "move_on_after",
    "current_time",
    "current_effective_deadline",
    "get_cancelled_exc_class",
    "checkpoint_if_cancelled",
}
BUILTIN_IO = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a source imports, wherever in it."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, level=level):
                assert level == 0, "imports are absolute"
                yield module or ""


@pytest.mark.parametrize("path", STATES, ids=name_of)
def test_states_import_no_file_socket_process_or_client_library(path):
    """And never the orchestrator: handlers reach the world through ports."""
    foreign = [
        module
        for module in imports(parse(path))
        if module.split(".")[0] != "states" and module not in ALLOWED and (name_of(path), module) not in EXCEPTIONS
    ]
    assert foreign == []


@pytest.mark.parametrize("path", STATES, ids=name_of)
def test_states_use_nothing_of_anyio_but_its_cancel_scopes(path):
    tree = parse(path)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "anyio"
    }
    used |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anyio")
        for alias in node.names
    }
    assert used <= SCOPES


@pytest.mark.parametrize("path", STATES, ids=name_of)
def test_states_call_no_builtin_that_does_io(path):
    called = {
        node.func.id for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & BUILTIN_IO


HOSTS = {"harbor": "harbor", "inspect": "inspect_ai", "verifiers": "verifiers"}
"""The modules that live in a host, and the package of that host."""
HOSTED = [ROOT / "orchestrator" / "embed" / f"{name}.py" for name in HOSTS]


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in HOSTED], ids=name_of)
def test_a_host_is_imported_by_its_own_module_only(path):
    """And nothing of ours imports that: who embeds in one host has not installed the others."""
    named = set(imports(parse(path)))
    assert not {name for name in named if name.partition(".")[0] in HOSTS.values()}
    assert not {name for name in named if name in {f"orchestrator.embed.{host}" for host in HOSTS}}


def test_states_can_be_imported_without_the_orchestrator():
    """The machine, the handlers and the fold run on a machine that has nothing else of ours."""
    names = sorted(f"states.{path.stem}" for path in STATES if path.stem != "__init__")
    code = f"import importlib, sys\nfor n in {names!r}: importlib.import_module(n)\n"
    code += "print(sorted(m for m in sys.modules if m.split('.')[0] == 'orchestrator'))"
    assert fresh(code) == []


# --- handlers say what they may return -----------------------------------------------------------------------------

HANDLERS = {
    **dict.fromkeys(m.SESSION, "session"),
    **dict.fromkeys(m.CAPTURING, "capturing"),
    **{state: state for state in m.LIVE if "/" not in state},
}

BY_ITSELF_TOO = {
    "checking": ev.Checked,
    "capturing/whole": ev.Captured,
    "capturing/partial": ev.Captured,
    "releasing": ev.Released,
}
"""Where a deadline fires, for want of another word, the event that the handler returns when all is well."""

FIRED_BY_THE_KERNEL = {
    "provisioning": {ev.SandboxFailed},
    "disconnected": {ev.Failed},
    "connecting": {ev.ConnectFailed},
    "session/acp": {ev.Failed},
    "session/factory": {ev.Failed},
    "executing": {ev.DeadlinePassed, ev.Failed},
    "paused": {ev.Failed},
    "checking": {ev.Checked},
    "cancelling": {ev.Unresponsive},
    "capturing/whole": {ev.Captured},
    "capturing/partial": {ev.Captured},
    "quiescing": {ev.Unquiet},
    "verifying": {ev.VerifierFailed},
    "releasing": {ev.Released},
}
"""What an expired deadline and a handler that raises fire."""


def returned(state: str) -> set[type]:
    """The events in the return annotation of a state's handler."""
    run = importlib.import_module(f"states.{HANDLERS[state]}").run
    annotation = typing.get_type_hints(run)["return"]
    return set(typing.get_args(annotation)) or {annotation}


@pytest.mark.parametrize("state", m.LIVE)
def test_a_handler_returns_exactly_the_events_of_its_rows(state):
    """Less what comes from outside and what its deadline or its crash fires."""
    rows = set(m.legal(state)) - set(ev.OUTSIDE) - FIRED_BY_THE_KERNEL[state]
    if state in BY_ITSELF_TOO:
        rows.add(BY_ITSELF_TOO[state])
    assert returned(state) == rows


@pytest.mark.parametrize("state", m.LIVE)
def test_deadlines_and_crashes_fire_what_the_test_of_handlers_takes_away(state):
    failure = ev.Failure("harness", "E", "e")
    assert {
        type(EXPIRY[state](failure, Deadline(1.0))),
        type(crashed(state, failure, Deadline(1.0))),
    } == FIRED_BY_THE_KERNEL[state]


def test_each_live_state_has_one_file_and_each_file_is_used():
    """Beside the files that are not states."""
    others = {"__init__", "counting", "deadlines", "errors", "events", "journal", "machine", "ports"}
    assert {path.stem for path in STATES} - others == set(HANDLERS.values())
    assert set(HANDLERS) == set(m.LIVE)


def test_the_kernel_runs_those_handlers():
    rollout = importlib.import_module("orchestrator.rollout")
    assert {state: run.__module__ for state, run in rollout.HANDLERS.items()} == {
        state: f"states.{module}" for state, module in HANDLERS.items()
    }


# --- importing is free -------------------------------------------------------------------------------------------

HEAVY = ["litellm", "daytona", "aiohttp", "rich", "yaml", "aiodocker", "pydantic_ai", "minisweagent", "acp", "pydantic"]


def fresh(code: str):
    """The last line that a new interpreter prints for this code, read as JSON."""
    code = code.replace("print(", "import json; print(json.dumps(", 1).rstrip() + ")"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_orchestrator_loads_nothing_heavy():
    code = f"import orchestrator, sys\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert fresh(code) == []


WORLD = """
import asyncio, json, logging, os, signal, sys, threading, warnings

def settings(logger):
    return [logger.name, logger.level, logger.propagate, logger.disabled, list(logger.handlers), list(logger.filters)]

NEW = settings(logging.Logger("?"))[1:]  # one that was only asked for

def world():
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return {
        "loggers": sorted(repr(settings(logger)) for logger in known if settings(logger)[1:] != NEW),
        "root": [repr(settings(logging.root)), logging.root.manager.disable, logging.getLoggerClass()],
        "loop": [asyncio._get_running_loop(), asyncio.events._event_loop_policy],
        "signals": {s.name: repr(signal.getsignal(s)) for s in signal.valid_signals() if isinstance(s, signal.Signals)},
        "environment": dict(os.environ),
        "threads": sorted(t.name for t in threading.enumerate()),
        "files": sorted(os.listdir("/proc/self/fd")),
        "folder": os.getcwd(),
        "filters": [repr(f) for f in warnings.filters],
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(threading.excepthook)],
        "umask": (lambda u: (os.umask(u), u)[1])(os.umask(0o22)),
    }

import transitions  # brings a NullHandler for its own logger and a filter for its own warning; both are silent
before = world()
"""


@pytest.mark.parametrize(
    ("mischief", "seen"),
    [
        ("logging.getLogger('x').propagate = False", "loggers"),
        ("logging.basicConfig()", "root"),
        ("asyncio.events._event_loop_policy = object()", "loop"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "signals"),
        ("os.environ['MINE'] = '1'", "environment"),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", "threads"),
        ("os.open('/', os.O_RDONLY)", "files"),
        ("warnings.simplefilter('ignore')", "filters"),
        ("sys.excepthook = print", "hooks"),
    ],
)
def test_what_an_import_may_not_do_would_be_seen(mischief, seen):
    """Each of these, done to a process, is found by the comparison of the next two tests."""
    code = WORLD + f"{mischief}\nafter = world()\n"
    assert fresh(code + "print([k for k in before if before[k] != after[k]])") == [seen]


def test_importing_the_orchestrator_does_not_load_what_only_a_rollout_needs():
    """`rollout --help`, and a host that imports us, do not wait for it: the first `Rollout` that is made loads it."""
    needed = ("asyncio", "msgspec", "orchestrator.world", "orchestrator.journal")
    code = f"import orchestrator, sys\nprint(sorted(set({needed!r}) & set(sys.modules)))"
    assert fresh(code) == []
    made = "orchestrator.Rollout(orchestrator.RolloutConfig(prompt='x', agent='noop', sandbox='fake', out=None))"
    code = f"import orchestrator, sys\n{made}\nprint(sorted(set({needed!r}) & set(sys.modules)))"
    assert {"msgspec", "orchestrator.world", "orchestrator.journal"} <= set(fresh(code))


def test_the_bench_measures_a_start_with_bytecode_whatever_the_environment_says(monkeypatch):
    """As an installed program starts: containers often set the variable, and every import would be compiled anew."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    bench = importlib.import_module("bench_kernel")
    code = "import colorsys, pathlib; assert pathlib.Path(colorsys.__cached__).exists(), colorsys.__cached__"
    assert bench.start_cpu(code, runs=1) < 1


def test_importing_the_orchestrator_changes_nothing_in_the_process():
    """No logger, signal handler, environment variable, thread, loop policy, open file, warning filter or hook."""
    code = WORLD + "import orchestrator\nafter = world()\n"
    assert fresh(code + "print([k for k in before if before[k] != after[k]])") == []


def test_importing_every_module_changes_nothing_either():
    """Each one by itself is a library: only calling something does something."""
    modules = [
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in SOURCES
        if "adapters" not in path.parts and path.stem != "__main__" and path not in HOSTED
    ]
    code = WORLD.replace("before = ", "import aiohttp.web  # a filter for its own warning\nbefore = ")
    code += f"import importlib\nfor n in {modules!r}:\n    try:\n        importlib.import_module(n)\n"
    code += "    except ModuleNotFoundError as missing:\n        if missing.name not in ('aiodocker', 'daytona'):\n"
    code += "            raise  # these two are extras\nafter = world()\n"
    assert fresh(code + "print([k for k in before if before[k] != after[k]])") == []


def test_an_illegal_transition_is_one_of_our_errors_and_says_both_names():
    error = IllegalTransition("paused", "Prompted")
    assert (error.state, error.event, str(error)) == ("paused", "Prompted", "Prompted is not legal in paused")


# --- what embedders build on; tests/test_public_api.py pins the names ------------------------------------------------


def test_every_error_of_the_tree_is_public_and_documented():
    """And says what to do, or who raises it: one exception tree, all of it exported."""
    errors = importlib.import_module("states.errors")
    tree = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {name for name, kind in tree.items() if issubclass(kind, errors.OrchestratorError)} == set(tree)
    assert set(tree) <= set(importlib.import_module("orchestrator").__all__)
    assert [name for name, kind in tree.items() if not kind.__doc__] == []
    assert [name for name in tree if name not in (errors.__doc__ or "")] == []


def test_the_packages_say_that_they_are_typed():
    assert (ROOT / "states" / "py.typed").is_file()
    assert (ROOT / "orchestrator" / "py.typed").is_file()
    assert (ROOT / "rollout_orchestrator" / "py.typed").is_file()
