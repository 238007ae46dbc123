"""Agent rollouts driven by one explicit finite-state machine.

    from orchestrator import Rollout, RolloutConfig

    result = await Rollout(RolloutConfig(task="tasks/hello", agent="codex-acp", model="openai/gpt-5")).run()

Importing this opens no file, starts no thread and touches no logger, signal handler, environment variable or loop.

An agent that lives in your process is an `Agent`, whose `connect` gives a `Session`:

    >>> class Echo:
    ...     def __init__(self):
    ...         self.steps, self.on_change, self.ask = [], None, None
    ...     async def connect(self, sandbox: SandboxHandle, role: str) -> Session:
    ...         return self
    ...     def capabilities(self) -> AgentCapabilities:
    ...         return AgentCapabilities(ask_user=True)
    ...     async def prompt(self, text: str) -> StopReason:
    ...         self.steps.append({"type": "agent_message", "text": text})
    ...         return "end_turn"
    ...     async def cancel(self) -> None: ...
    ...     def on_ask_user(self, handler) -> None:
    ...         self.ask = handler
    >>> agent: Agent = Echo()
    >>> isinstance(agent, Session)
    True

A host brings a `Sandbox` (or an `ExecSandbox`), is told of each `Transition`, and answers each `AskUserRequest`:

    >>> moves = []
    >>> def told(moved: Transition) -> None:
    ...     moves.append((moved.event.name, moved.dest))
    >>> def answer(asked: AskUserRequest) -> str:
    ...     return asked.options[0]
    >>> async def host(sandbox: Sandbox | ExecSandbox) -> RolloutResult:
    ...     parts = {"sandbox": sandbox, "hooks": (told,), "on_ask_user": answer, "out": None}
    ...     return await Rollout(RolloutConfig(prompt="Do it.", agent="scripted", **parts)).run()

    >>> import anyio
    >>> from orchestrator.sandboxes.fake import FakeSandbox
    >>> anyio.run(host, FakeSandbox()).verdict
    Verdict(owner='agent', reason='not verified: there is no verifier, or its host has one of its own')
    >>> moves[-1]
    ('Released', 'closed/unverified')
"""

from orchestrator.budgets import Budgets
from orchestrator.config import DirectorRole, Role, RolloutConfig, Scene, Turn
from orchestrator.registry import AgentConfig, Registry, register_agent
from orchestrator.result import RolloutResult, TrackedUsage, Verdict
from orchestrator.rollout import Rollout, run_sync
from states.errors import (
    AgentError,
    AgentLost,
    ConfigError,
    ConnectError,
    DirectorError,
    ExecTimeout,
    HandleRevoked,
    IllegalTransition,
    JournalError,
    MissingExtra,
    OrchestratorError,
    PathEscape,
    ProviderError,
    QuietError,
    SandboxError,
    TaskError,
    VerifierError,
)
from states.events import Usage
from states.journal import Transition
from states.ports import (
    Agent,
    AgentCapabilities,
    AskUserRequest,
    ExecResult,
    ExecSandbox,
    Sandbox,
    SandboxHandle,
    Session,
    StopReason,
)

__all__ = [
    "Agent",
    "AgentCapabilities",
    "AgentConfig",
    "AgentError",
    "AgentLost",
    "AskUserRequest",
    "Budgets",
    "ConfigError",
    "ConnectError",
    "DirectorError",
    "DirectorRole",
    "ExecResult",
    "ExecSandbox",
    "ExecTimeout",
    "HandleRevoked",
    "IllegalTransition",
    "JournalError",
    "MissingExtra",
    "OrchestratorError",
    "PathEscape",
    "ProviderError",
    "QuietError",
    "Registry",
    "Role",
    "Rollout",
    "RolloutConfig",
    "RolloutResult",
    "Sandbox",
    "SandboxError",
    "SandboxHandle",
    "Scene",
    "Session",
    "StopReason",
    "TaskError",
    "TrackedUsage",
    "Transition",
    "Turn",
    "Usage",
    "Verdict",
    "VerifierError",
    "register_agent",
    "run_sync",
]
