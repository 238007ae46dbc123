"""An agent in a package of its own: a value, a function that makes one, and one that cannot be made."""

from __future__ import annotations

from orchestrator import AgentCapabilities, AgentConfig

SUM = "s=0; while read -r n; do s=$((s + n)); done < numbers.txt; echo $s > answer.txt"
TINY = AgentConfig(
    "tiny", "session-factory", session_factory="tiny_agent:Adder", calls_model=False, description="adds numbers up"
)


def make() -> AgentConfig:
    """An entry point may be a function."""
    return AgentConfig("tiny-made", "session-factory", session_factory="tiny_agent:Adder", calls_model=False)


def broken() -> AgentConfig:
    """One that is broken is an error only for whoever asks for it."""
    raise RuntimeError("tiny-broken needs a thing that is not there")


class Adder:
    """Builds sessions."""

    async def connect(self, sandbox, role):
        return Conversation(sandbox)

    def capabilities(self):
        return AgentCapabilities()


class Conversation:
    """Adds the numbers up, once a prompt."""

    def __init__(self, sandbox):
        self.sandbox, self.steps, self.on_change = sandbox, [], None

    async def prompt(self, text):
        await self.sandbox.exec(SUM)
        self.steps.append({"type": "tool_call", "tool_call_id": "1", "kind": "execute", "title": SUM, "content": []})
        self.on_change(self)
        return "end_turn"

    async def cancel(self): ...

    def on_ask_user(self, handler): ...
