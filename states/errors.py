"""One tree of errors, each with the owner that a verdict names.

    OrchestratorError            the root; catch this to catch everything we raise on purpose
    |- ConfigError               what the user wrote cannot work; raised before anything is started
    |  |- TaskError              a task folder is malformed: file, key, what was expected
    |  `- MissingExtra           an optional dependency is not installed; the message names the extra
    |- IllegalTransition         an event that the state does not know; nothing has changed
    |- JournalError              the journal cannot be written or does not fold
    |- SandboxError              the sandbox failed (not: a command in it failed)
    |  |- ExecTimeout            a command outlasted its own limit and was ended
    |  |- HandleRevoked          somebody used a sandbox handle that is closed to them
    |  `- PathEscape             a path or a link leads out of where it may lead
    |- ConnectError              no session came up; `retryable` says whether a second try may help
    |- AgentError                the agent answered a prompt with an error, or raised
    |  `- AgentLost              the agent is gone: exit code and tail of its stderr
    |- DirectorError             whoever decides the next turn raised, or gave no decision
    |- ProviderError             the model's provider refused or failed
    |- VerifierError             the verifier did not produce a reward that can be trusted
    `- QuietError                it could not be proven that an agent is dead

Foreign exceptions are translated at the seam where they arrive, with `raise ... from`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

Owner = Literal["agent", "provider", "sandbox", "verifier", "harness", "operator"]
"""Who owns a failure: the word a verdict uses."""


def said(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing. Foreign errors may fail at that, or never stop."""
    try:
        return str(error)[:20_000] or type(error).__name__
    except Exception:
        return type(error).__name__


class OrchestratorError(Exception):
    """Root of every error that this project raises on purpose. `owner` is who a verdict blames."""

    owner: ClassVar[Owner] = "harness"


class ConfigError(OrchestratorError):
    """What was asked for cannot work. Raised before a sandbox exists; fix the setting that it names."""


class TaskError(ConfigError):
    """A task is malformed. The message says which file, which key and what was expected."""


class MissingExtra(ConfigError):
    """An optional dependency is not installed. Install the extra that the message names."""


class IllegalTransition(OrchestratorError):
    """The machine was given an event which the state does not know. Nothing has changed.

    A bug in whoever fired it: a handler, or a caller of `states.machine.fire`.
    """

    def __init__(self, state: str, event: str, why: str = "") -> None:
        self.state, self.event = state, event
        super().__init__(f"{event} is not legal in {state}{': ' + why if why else ''}")


class JournalError(OrchestratorError):
    """The journal cannot be written (disk full), or what was read does not fold."""


class SandboxError(OrchestratorError):
    """The sandbox itself failed. A command that merely returned non-zero raises nothing."""

    owner: ClassVar[Owner] = "sandbox"


class ExecTimeout(SandboxError):
    """A command outlasted `timeout_sec`; it was ended. What it had printed is in `stdout` and `stderr`."""

    def __init__(self, message: str, *, stdout: str = "", stderr: str = "") -> None:
        super().__init__(message)
        self.stdout, self.stderr = stdout, stderr


class HandleRevoked(SandboxError):
    """A sandbox handle was used while it is closed to its holder: between turns, or after its end."""

    owner: ClassVar[Owner] = "agent"


class PathEscape(SandboxError):
    """A path, or a link on it, leads out of the folder in which it has to stay."""

    owner: ClassVar[Owner] = "agent"


class ConnectError(OrchestratorError):
    """No session came up. `retryable=False` when a second try must fail in the same way."""

    owner: ClassVar[Owner] = "agent"

    def __init__(self, message: str, *, retryable: bool = True, stderr: str = "") -> None:
        super().__init__(message)
        self.retryable, self.stderr = retryable, stderr


class AgentError(OrchestratorError):
    """The agent answered a prompt with an error, or its `prompt` raised."""

    owner: ClassVar[Owner] = "agent"

    def __init__(self, message: str, *, code: int | None = None, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.data = code, data


class AgentLost(AgentError):
    """The agent is gone: its stream ended. `exit_code` is None when it could not be read."""

    def __init__(self, message: str, *, exit_code: int | None = None, stderr: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.stderr = exit_code, stderr


class DirectorError(OrchestratorError):
    """A director raised; or, where it is an agent, gave no answer that can be followed, twice.

    The harness owns it: who directs a scene is an instrument of the run, not the agent that is looked at.
    """


class ProviderError(OrchestratorError):
    """The model's provider refused or failed. `status` is its HTTP status, None without an answer."""

    owner: ClassVar[Owner] = "provider"

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class VerifierError(OrchestratorError):
    """The verifier did not leave a reward that can be trusted. The message says what was found."""

    owner: ClassVar[Owner] = "verifier"


class QuietError(OrchestratorError):
    """It could not be proven that every process of an agent is dead, so nothing may be graded."""

    owner: ClassVar[Owner] = "sandbox"
