"""Rollouts in Inspect: real evaluations in an environment of its own, with its model, its sandbox and its scorer."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import attrs
import pytest
from hosts import host_python, host_run, once
from late import WORDS
from requirements import missing
from trials import HERE, KEY, TRIAL_SEC, alive, counted, left_in, run_counted

from orchestrator.install import ensure_installed
from orchestrator.registry import default_registry
from states.errors import ConfigError
from states.events import Usage

pytestmark = [pytest.mark.hosts, pytest.mark.sandbox]


@attrs.frozen
class Evaluated:
    """The one sample of an evaluation as Inspect's own reader gives it, and what the provider counted."""

    sample: dict
    provider: Usage

    @property
    def score(self) -> float | None:
        scores = self.sample["scores"] or {}
        return next((score["value"] for name, score in scores.items() if name.startswith("by_the_")), None)

    @property
    def rollout(self) -> dict:
        return self.sample["store"]["rollout"]

    def events(self, kind: str) -> list[dict]:
        return [event for event in self.sample["events"] if event["event"] == kind]

    @property
    def spans(self) -> dict[str, str]:
        """The states that were passed, by the id of their span."""
        return {event["id"]: event["name"] for event in self.events("span_begin") if event["type"] == "rollout"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every evaluation, in one process: the import of Inspect is most of what they cost."""
    python = host_python("inspect")

    return once(tmp_path_factory, "inspect", lambda folder: run(folder, python))


def run(folder: Path, python: Path, *names: str) -> None:
    """Run the evaluations of these names, or all that need no real agent."""
    checks = (str(HERE / "inspect_checks.py"), str(folder / "logs"), *names)
    models = lambda url: {"SCRIPTED_BASE_URL": url, "SCRIPTED_API_KEY": KEY}  # noqa: E731
    run_counted(folder, python, "python", *checks, env=models)


def read(folder: Path) -> dict[str, Evaluated]:
    """What was evaluated, by name."""
    found = {}
    for file in (folder / "logs").glob("*.read.json"):
        name = file.name.partition(".")[0]
        models = ("coder", "reviewer") if name == "scene" else (name,)
        found[name] = Evaluated(json.loads(file.read_text())["samples"][0], counted(folder, *models))
    assert found, (folder / "output.txt").read_text()
    return found


@pytest.fixture(scope="module")
def evaluated(folder) -> dict[str, Evaluated]:
    return read(folder)


@pytest.mark.parametrize("name", ["factory", "acp", "scene"])
def test_a_sample_is_scored_by_inspect_and_counted_to_the_token(name, evaluated):
    """An agent in our process, one over ACP, and two roles; usage is in Inspect's log, and ours says the same."""
    assert_scored_and_counted(evaluated[name])


@pytest.mark.agents
@pytest.mark.parametrize(("name", "agent"), [("codex", "codex-acp"), ("claude", "claude-agent-acp")])
def test_real_agents_call_inspects_model_in_their_own_formats(name, agent, tmp_path):
    """OpenAI responses and Anthropic messages, both streamed, to a model that speaks neither: its bridge translates."""
    try:
        anyio.run(ensure_installed, default_registry().resolve(agent))
    except ConfigError as error:
        missing("agents", str(error))
    run(tmp_path, host_python("inspect"), name)
    assert_scored_and_counted(read(tmp_path)[name])


def assert_scored_and_counted(one: Evaluated) -> None:
    """Scored 1.0, and the provider, Inspect's log and the rollout have counted the same."""
    assert (one.score, one.sample["error"]) == (1.0, None)
    logged = one.sample["model_usage"].values()
    assert (
        sum(used["input_tokens"] + (used["input_tokens_cache_read"] or 0) for used in logged)
        == one.provider.input_tokens
    )
    assert sum(used["output_tokens"] for used in logged) == one.provider.output_tokens
    assert one.rollout["usage"]["total"]["input_tokens"] == one.provider.input_tokens
    assert one.rollout["usage"]["total"]["calls"] == one.provider.calls > 0
    assert one.rollout["state"] == "closed/unverified"


@pytest.mark.parametrize("name", ["local-acp", "local-scene", "local-scripted"])
def test_rollouts_run_in_the_sandbox_that_inspect_ships(name, evaluated):
    """A folder of this machine, where nobody buries orphans: what an agent left behind is found and ended there too."""
    one = evaluated[name]
    assert (one.score, one.sample["error"], one.rollout["state"]) == (1.0, None, "closed/unverified")
    assert one.rollout["usage"]["total"]["calls"] == one.provider.calls
    assert alive(name) == []


def test_each_role_has_a_model_of_inspects_own(evaluated):
    """A role that names one is served by that, and is counted under it."""
    assert {name.rpartition("/")[2] for name in evaluated["scene"].sample["model_usage"]} == {"coder", "reviewer"}
    assert set(evaluated["scene"].rollout["usage"]["by_role"]) == {"coder", "reviewer"}


@pytest.mark.parametrize("name", ["factory", "acp"])
def test_each_state_is_a_span_and_what_happened_in_it_is_inside(name, evaluated):
    """Model calls and tool calls belong to the state in which they were made."""
    one = evaluated[name]
    session = "session/acp" if name == "acp" else "session/factory"
    assert list(one.spans.values()) == [
        *("provisioning", "disconnected", "connecting", session, "executing", "capturing/whole", session),
        *("quiescing", "disconnected", "releasing"),
    ]
    assert {one.spans[event["span_id"]] for event in one.events("model")} == {"executing"}
    (tool,) = one.events("tool")
    assert one.spans[tool["span_id"]] == "executing"
    assert "numbers.txt" in tool["arguments"]["command"]


def test_what_was_said_and_done_are_messages_of_the_sample(evaluated):
    """The instruction stands there once; a tool's answer belongs to its call; a role's prompt is a user's message."""
    roles = [message["role"] for message in evaluated["factory"].sample["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    _, called, answered, last = evaluated["factory"].sample["messages"]
    assert answered["tool_call_id"] == called["tool_calls"][0]["id"]
    assert [part["text"] for part in last["content"]] == ["Done."]
    prompts = [one["content"] for one in evaluated["scene"].sample["messages"] if one["role"] == "user"]
    assert prompts[1] == "Review what was done, and mend it."
    assert len(prompts) == 2


SAID = """
import json
from orchestrator.capture import RecordedSegment, RecordedStep
from orchestrator.embed.inspect import messages_of
edit = {"type": "tool_call", "tool_call_id": "t", "kind": "edit", "status": "completed",
        "content": [{"type": "diff", "path": "/a", "newText": "b"}]}
steps = [RecordedStep(edit), RecordedStep({"type": "agent_message", "text": "too late"}, late=True)]
print(json.dumps([[m.role, m.text] for m in messages_of(RecordedSegment(1, {"role": "coder"}, steps))]))
"""


def test_an_edit_is_told_by_what_it_wrote_and_what_came_late_is_not_told(tmp_path):
    """As in the export of the same rollout."""
    done = host_run(host_python("inspect"), "python", "-c", SAID, env={}, cwd=tmp_path, timeout=TRIAL_SEC)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["assistant", ""], ["tool", "/a\nb"]]


def test_a_time_limit_of_inspect_ends_the_rollout_and_its_agent(evaluated):
    """Captured, released and closed before the sample is scored, with what it got done by then: nothing."""
    one = evaluated["late"]
    assert one.sample["limit"]["type"] == "time"
    assert one.rollout["state"] == "closed/cancelled"
    assert one.rollout["usage"]["total"]["calls"] == one.provider.calls == 1
    assert one.score == 0.0


def test_a_token_limit_of_inspect_ends_the_rollout(evaluated):
    """It is Inspect's error that is raised, so the sample ends by its limit, not by an error."""
    one = evaluated["tokens"]
    assert (one.sample["limit"]["type"], one.sample["error"]) == ("token", None)
    assert one.rollout["state"] == "closed/cancelled"
    assert one.provider.calls == 1


CUT_OFF = {
    "late": "time",
    "second-call": "token",
    "third-message": "message",
    "working": "working",
    "score": "operator",
    "error": None,
    "cancel": None,
    "cancelled": None,
}
"""Samples that were cut off after their agent had said something, and the limit that Inspect says it was."""


@pytest.mark.parametrize("name", CUT_OFF)
def test_what_was_said_before_a_sample_was_cut_off_is_in_it_and_is_what_is_scored(name, evaluated):
    """By each limit, by an operator of Inspect's and by one of ours: words, the tool call, and the output."""
    sample = evaluated[name].sample
    assert (sample["limit"] or {}).get("type") == CUT_OFF[name]
    asked, said, answered, *_ = sample["messages"]
    assert [asked["role"], said["role"], answered["role"]] == ["user", "assistant", "tool"]
    assert said["content"][0]["text"] == WORDS
    assert sample["output"]["choices"][0]["message"]["content"][0]["text"] == WORDS


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_sample_that_was_cut_off_has_a_span_for_each_state_and_its_tool_calls(name, evaluated):
    """To the very close: capturing what was said is a state like any other, and nothing is told twice."""
    one = evaluated[name]
    assert list(one.spans.values()) == [
        *("provisioning", "disconnected", "connecting", "session/factory", "executing", "cancelling"),
        *("capturing/whole", "quiescing", "releasing"),
    ]
    (tool,) = one.events("tool")
    assert one.spans[tool["span_id"]] == "executing"


def test_what_must_not_be_graded_has_no_score_in_inspect_either(evaluated):
    """The provider refused every call: an error of the sample, with the owner of the failure by name."""
    one = evaluated["refused"]
    assert one.score is None
    assert "ProviderError" in one.sample["error"]["message"]
    assert one.rollout["state"] == "closed/void"


def test_a_rollout_that_somebody_cancels_is_an_error_of_the_sample(evaluated):
    """Cancelled on our side: Inspect neither hangs nor scores it."""
    one = evaluated["cancelled"]
    assert one.score is None
    assert "closed/cancelled" in one.sample["error"]["message"]


def test_no_key_is_in_inspects_log(folder):
    """Neither the provider's nor the one of the endpoint is in any file."""
    held = [path for path in (folder / "logs").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert held == []


def test_nothing_is_left_when_inspect_has_ended(folder, evaluated):
    """No sandbox of a sample, no journal that nobody asked for, no socket of a gateway."""
    assert left_in(folder, "inspect-local") == []
    assert all(one.rollout["leaked"] == [] for one in evaluated.values())
