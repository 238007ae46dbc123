"""Agent rollouts driven by one explicit finite-state machine.

    from orchestrator import Rollout, RolloutConfig

    result = await Rollout(RolloutConfig(task="tasks/hello", agent="codex-acp", model="openai/gpt-5")).run()

Importing this opens no file, starts no thread and touches no logger, signal handler, environment variable or loop.
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
