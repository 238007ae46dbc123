"""Something to start from: an agent's manifest or a scene, with comments, which validates as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from states.errors import ConfigError

_ACP = """\
# An agent that speaks the Agent Client Protocol (ACP) on its stdin and stdout.
#   rollout validate {file}
#   rollout run demo --agent {file} --model openai/gpt-5
description = "{name}, over ACP"
protocol = "acp"

# The command, as it is seen inside the sandbox. ${{adapters}} holds the programs that ship with rollout: this one is a
# small agent with one shell tool, written with the standard library alone. Put your own command here.
launch = ["${{python}}", "${{adapters}}/minimal_acp.py"]
# in_image = true      # when the program is part of the sandbox's image, so this machine need not have it

# Wire formats in which it calls a model: openai-chat, openai-responses, anthropic-messages. They let the gateway meter
# it. Leave it out when the agent cannot be pointed at another server; say calls_model = false when it has no model.
api = ["openai-chat"]

# mode = "bypass"      # an ACP session mode to set after session/new
# [config_options]     # ACP configuration options to set after session/new
# model = "${{model}}"

# Packages of its own, installed on first use into a cache outside your project.
# [install]
# kind = "npm"                       # or "python"
# packages = ["your-agent@1.2.3"]
# node = "22"                        # for kind = "python": python = "3.12"

# What it finds in its environment. The key is this rollout's own, good for nothing but the gateway.
[env]
OPENAI_BASE_URL = "${{base_url}}/v1"
OPENAI_API_KEY = "${{api_key}}"

# Files to write before it starts, by path in the sandbox.
# [files]
# "${{home}}/.your-agent/config.json" = '{{"model": "${{model}}"}}'
"""

_FACTORY = """\
# An agent in our own process: a callable that builds an object with `connect` and `capabilities`.
#   rollout validate {file}
#   rollout run demo --agent {file}
# The module may lie beside this file, or be installed where rollout is.
description = "{name}, as a session factory"
protocol = "session-factory"
session_factory = "{module}:build"
calls_model = false    # with a model: true, and api = ["openai-chat"], and env as below
calls_from = "host"    # its model calls come from this process, not from the sandbox

# [env]
# OPENAI_BASE_URL = "${{base_url}}/v1"
# OPENAI_API_KEY = "${{api_key}}"
"""

_MODULE = '''\
"""{name}: an agent as a session factory. As it is, it solves the demo task, without a model."""


class Session:
    """One conversation. `on_change` is assigned after connect: call it after each change of `steps`."""

    on_change = None

    def __init__(self, sandbox):
        self._sandbox = sandbox
        self._steps = []

    @property
    def steps(self):
        """Everything that happened so far, oldest first."""
        return self._steps

    def _say(self, step):
        self._steps.append(step)
        if self.on_change:
            self.on_change(self)

    async def prompt(self, text):
        """Do what is asked; returns why the turn ended (end_turn, refusal, max_tokens, cancelled ...)."""
        self._say({{"type": "user_message", "text": text}})
        command = "printf '%s\\\\n' \\"$(($(paste -sd+ numbers.txt)))\\" > answer.txt"
        done = await self._sandbox.exec(command, cwd="/app", timeout_sec=60)
        self._say({{"type": "tool_call", "tool_call_id": "1", "kind": "execute", "title": command,
                   "status": "completed" if done.return_code == 0 else "failed", "content": done.stdout}})
        self._say({{"type": "agent_message", "text": "The sum is in answer.txt."}})
        return "end_turn"

    async def cancel(self):
        """Ask the turn in flight to end; `prompt` then returns "cancelled"."""

    def on_ask_user(self, handler):
        """Who answers questions; this agent asks none."""

    async def close(self):
        """Optional: give back what the session holds."""


class Agent:
    """What `build` returns."""

    async def connect(self, sandbox, role):
        """Open a session for `role` in `sandbox`; take a keyword `agent_env` to get the variables of the manifest."""
        return Session(sandbox)

    def capabilities(self):
        """What this agent can do."""
        from orchestrator import AgentCapabilities

        return AgentCapabilities(protocol="session-factory")


def build():
    """Named in the manifest."""
    return Agent()
'''


_SCENE = """\
# Roles that take turns in one sandbox, each with its own agent, model and limits.
#   rollout validate {file}
#   rollout run demo --scene {file}
# Settings of the rollout go above the tables; what the command line says goes before them. Paths are relative to here.
# task = "tasks/sum"               # then: rollout run --scene {file}
timeout = 3600                     # seconds for everything up to verification
# budgets = {{ tokens = 200000, cost = 1.5 }}
# policy = "deny"                  # what answers requests for permission, by default allow
# usage_tracking = "required"      # refuse to run what cannot be metered
# env = {{ TOKEN = "${{TOKEN}}" }}     # for every role: a variable of whoever runs it

[[roles]]
name = "coder"
agent = "scripted"                 # one of `rollout agents`, or a manifest (.toml); this one needs no model
# model = "openai/gpt-5"
# turn_sec = 600                   # the longest turn; idle_sec: the longest silence in one

[[roles]]
name = "reviewer"
agent = "scripted"
budgets = {{ turns = 2 }}            # also tokens, cost, tool_calls, wall_sec, idle_sec
# env = {{ STYLE = "strict" }}

# The turns, in order. They are left out where a [director] decides them.
[[turns]]
role = "coder"                     # without a prompt it is asked the task's instruction

[[turns]]
role = "reviewer"
prompt = "Review what the coder did, and write what you find to review.md."   # or: prompt_file = "review.md"

[[turns]]
role = "coder"
prompt = "Mend what review.md finds."

# [director]                       # a role that takes no turns and says what comes next
# role = "user"                    # then there is a [[roles]] of that name; without an agent it is model-user
# persona = "You are impatient."   # of a simulated user; any other director has a brief = "..."
# facts = {{ order_id = "BF-1042" }} # what it alone knows
# limit = 6                        # turns at most
"""


def scaffold_scene(path: Path) -> Path:
    """Write a `rollout.toml` of two roles to `path`; returns it. As it is, it runs without a model.

    Raises:
        ConfigError: it exists, is not named .toml, or cannot be written.
    """
    file = path.expanduser()
    if file.suffix != ".toml":
        raise ConfigError(f"{file}: a scene's file ends in .toml; nothing was written")
    _write({file: _SCENE.format(file=file)})
    return file


def scaffold_agent(path: Path, protocol: str = "acp") -> tuple[Path, ...]:
    """Write a manifest to `path` (its suffix becomes `.toml`), and for a session factory a module beside it.

    Returns the files, the manifest first.

    Raises:
        ConfigError: one of them exists, or cannot be written.
    """
    manifest = path.expanduser().with_suffix(".toml")
    name = manifest.stem
    module = "".join(letter if letter.isalnum() else "_" for letter in name)
    words = {"name": name, "file": manifest, "module": module}
    files = {manifest: (_ACP if protocol == "acp" else _FACTORY).format(**words)}
    if protocol != "acp":
        files[manifest.parent / f"{module}.py"] = _MODULE.format(**words)
    _write(files)
    return tuple(files)


def _write(files: Mapping[Path, str]) -> None:
    """Write all of them, or none where one is there."""
    for file in files:
        if file.exists():
            raise ConfigError(f"{file} exists; nothing was written")
    for file, text in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
