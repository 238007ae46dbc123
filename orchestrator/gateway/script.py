"""What a scripted model says: a pure function from the conversation that it is shown to one reply.

A script never touches a sandbox. It sees what a model would see (text, offered tools with their schemas, tool results)
and answers in words, with a call of one of the offered tools, with a refusal, or with a provider's failure. The same
script therefore drives any agent over any wire format, and proves the agent's own path to its tools.

>>> script = ShellScript("echo 42 > /app/answer.txt", "Done.")
>>> script(Conversation(user="solve it", tools=(Tool("bash", {"properties": {"command": {"type": "string"}}}),)))
Call(tool='bash', arguments={'command': 'echo 42 > /app/answer.txt'}, kind='function', text='', delay=0.0)
>>> script(Conversation(user="solve it", results=("",)))
Say(text='Done.', delay=0.0, pause=0.0)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs

SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
"""mini-swe-agent ends when a command prints this first, and on nothing else."""

_FENCE = re.compile(r"```(mswea_bash_command|bash)\b")
_SHELL_NAMES = (
    "bash", "shell", "shell_command", "exec_command", "local_shell", "execute", "run_shell_command", "run_command",
    "run_bash", "run_bash_command", "execute_command", "execute_bash", "terminal", "exec", "run", "sh",
)  # fmt: skip
_SHELL_WORDS = frozenset({"bash", "shell", "exec", "execute", "terminal", "command", "run"})
_COMMAND_KEYS = ("command", "cmd", "commands", "bash_command", "shell_command", "script", "code", "input")


# --- what a script sees --------------------------------------------------------------------------------------


@attrs.frozen
class Tool:
    """A tool that a request offers. `kind` is `function`, or the wire format's own word (`custom`, `local_shell`)."""

    name: str
    schema: Mapping[str, Any] = attrs.field(factory=dict)
    kind: str = "function"

    @property
    def properties(self) -> Mapping[str, Any]:
        """The parameters by name, each a JSON schema."""
        found = self.schema.get("properties")
        return found if isinstance(found, Mapping) else {}


@attrs.frozen
class Conversation:
    """A request as a script sees it, whatever its wire format.

    `user` is the last prompt; `results` are the outputs of the tools called since then, oldest first; `prompts` counts
    the user's prompts so far.
    """

    user: str = ""
    tools: tuple[Tool, ...] = ()
    results: tuple[str, ...] = ()
    prompts: int = 1
    system: str = ""
    model: str = ""

    @property
    def fence(self) -> str | None:
        """The code fence in which a text-only agent (mini-swe-agent) wants its commands; None with tools."""
        found = None if self.tools else _FENCE.search(self.system + self.user)
        return found.group(1) if found else None


# --- what it answers -----------------------------------------------------------------------------------------


@attrs.frozen
class Say:
    """Words, and the end of the turn. `delay` seconds pass before the answer, `pause` between streamed pieces.

    `cut`: the request's output limit was reached before all was said.
    """

    text: str
    delay: float = 0.0
    pause: float = 0.0
    cut: bool = attrs.field(default=False, repr=False)


@attrs.frozen
class Call:
    """A call of one of the offered tools. `text` is said before it."""

    tool: str
    arguments: Mapping[str, Any]
    kind: str = "function"
    text: str = ""
    delay: float = 0.0


@attrs.frozen
class Refuse:
    """The model declines."""

    text: str = "I can't help with that."
    delay: float = 0.0


@attrs.frozen
class Fail:
    """The provider answers with an error status; nothing is used. `retry_after` is in seconds."""

    status: int = 500
    message: str = "scripted failure"
    retry_after: float | None = None
    delay: float = 0.0


@attrs.frozen
class Hang:
    """The provider never answers."""

    delay: float = 0.0


@attrs.frozen
class Cut:
    """The provider breaks off in the middle of what it was saying, without a word."""

    text: str = "This will never be said to its end, because the connection is about to go."
    delay: float = 0.0


Reply = Say | Call | Refuse | Fail | Hang | Cut
Script = Callable[[Conversation], Reply]


# --- scripts -------------------------------------------------------------------------------------------------


@attrs.frozen
class Shell:
    """A step: run `command` with whichever offered tool runs shell commands."""

    command: str

    def __call__(self, conversation: Conversation) -> Reply:
        """Call the shell tool, or write the command into the fence that a text-only agent reads."""
        if conversation.fence:
            return Say(f"I run a command.\n\n```{conversation.fence}\n{self.command}\n```")
        tool = shell_tool(conversation.tools)
        if tool is None:
            offered = ", ".join(t.name for t in conversation.tools) or "none"
            return Say(f"No tool here runs a shell command; offered: {offered}.")
        return Call(tool.name, shell_arguments(tool, self.command), tool.kind)


@attrs.frozen
class Use:
    """A step: call the offered tool whose name is, or ends with, `tool`, with these arguments."""

    tool: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict)

    def __call__(self, conversation: Conversation) -> Reply:
        """Call it, or say that it is not offered."""
        for tool in conversation.tools:
            if tool.name == self.tool or _short(tool.name) == self.tool.lower():
                return Call(tool.name, self.arguments, tool.kind)
        return Say(f"The tool {self.tool} is not offered here.")


@attrs.frozen
class Always:
    """A script with one answer, for ever: `Always(Fail(429))`, `Always(Refuse())`, `Always(Hang())`."""

    reply: Reply

    def __call__(self, _conversation: Conversation) -> Reply:
        """The answer."""
        return self.reply


class Steps:
    """A script of steps after each prompt: step n answers once n tool results are there; the last one repeats.

    >>> ask = Use("AskUserQuestion", {"questions": []})
    >>> Steps(ask, Shell("true"), Say("Done."))(Conversation(tools=(Tool("AskUserQuestion"),))).tool
    'AskUserQuestion'
    """

    def __init__(self, *steps: Reply | Script) -> None:
        self.steps = steps

    def __call__(self, conversation: Conversation) -> Reply:
        """The step that is due. Requests that offer no tool (titles, summaries) get the last words at once."""
        due = len(conversation.results)
        if not conversation.tools and not conversation.fence:
            due = len(self.steps)
        step = self.steps[min(due, len(self.steps) - 1)]
        reply = step(conversation) if callable(step) else step
        if isinstance(reply, Say) and step is self.steps[-1] and SUBMIT in conversation.system + conversation.user:
            return Shell(f"echo {SUBMIT}")(conversation)
        return reply


class ShellScript(Steps):
    """The script of a solved task: run one shell command, then say `final_text`."""

    def __init__(self, command: str, final_text: str = "Done.") -> None:
        super().__init__(Shell(command), Say(final_text))


# --- picking the shell among an agent's tools ----------------------------------------------------------------


def shell_tool(tools: tuple[Tool, ...]) -> Tool | None:
    """The tool that runs a shell command, by its name and the shape of its parameters; None when none does."""
    fit = [tool for tool in tools if tool.kind in {"local_shell", "shell"} or _command_key(tool) is not None]
    ranked = [(rank, at, tool) for at, tool in enumerate(fit) if (rank := _rank(tool)) is not None]
    return min(ranked)[2] if ranked else None


def shell_arguments(tool: Tool, command: str) -> dict[str, Any]:
    """Arguments with which `tool` runs `command`: a string or an argv as it wants, required others filled in."""
    if tool.kind == "local_shell":
        return {"command": ["bash", "-lc", command]}
    if tool.kind == "shell":
        return {"commands": [command]}
    key = _command_key(tool)
    assert key is not None
    arguments: dict[str, Any] = {key: ["bash", "-lc", command] if _is_array(tool.properties[key]) else command}
    for name in tool.schema.get("required") or ():
        if name not in arguments:
            arguments[name] = _filler(tool.properties.get(name) or {})
    return arguments


def _rank(tool: Tool) -> int | None:
    """How surely this is a shell: 0 is best, None is not at all."""
    name = _short(tool.name)
    if tool.kind != "function":
        return 0
    if name in _SHELL_NAMES:
        return 1 + _SHELL_NAMES.index(name)
    return 100 if _SHELL_WORDS & set(re.split(r"[^a-z]+", name)) else None


def _short(name: str) -> str:
    """A tool's own name, without the prefix of the server or namespace that offers it."""
    return re.split(r"__|[./:]", name)[-1].lower()


def _command_key(tool: Tool) -> str | None:
    """The parameter that takes the command: a well-known name, or the only text there is."""
    if tool.kind != "function":
        return None
    texts = [key for key, schema in tool.properties.items() if _is_text(schema) or _is_array(schema)]
    for key in _COMMAND_KEYS:
        if key in texts:
            return key
    return texts[0] if len(texts) == 1 and len(tool.properties) == 1 else None


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    found = {kind} if isinstance(kind, str) else set(kind or ())
    for choice in schema.get("anyOf") or schema.get("oneOf") or ():
        found |= _types(choice)
    return found


def _is_text(schema: Any) -> bool:
    return "string" in _types(schema)


def _is_array(schema: Any) -> bool:
    return "array" in _types(schema) and not _is_text(schema)


def _filler(schema: Mapping[str, Any]) -> Any:
    """A value that a schema accepts, for parameters that the script does not care about."""
    if "default" in schema:
        return schema["default"]
    if schema.get("enum"):
        return schema["enum"][0]
    kinds = _types(schema)
    if "string" in kinds:
        return "Run a command"
    if kinds & {"integer", "number"}:
        return schema.get("minimum", 1)
    if "boolean" in kinds:
        return False
    return [] if "array" in kinds else {}
