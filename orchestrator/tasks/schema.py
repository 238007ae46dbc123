"""The keys that task files may hold, as typed structs: Harbor's `task.toml` and the front matter of `task.md`.

Every key that either format defines has a field here, also those which nothing here acts on: a key without a field is
a misspelling, and misspelt limits must not pass for limits. The two formats differ only in the names at the top.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from orchestrator.tasks.task import Network

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(gt=0)]
Text = Annotated[str, Meta(min_length=1)]
User = str | int | None


class Section(Struct, forbid_unknown_fields=True):
    """A table of a task file."""


class Package(Section):
    """`[task]`: how the task is called in a registry."""

    name: Text
    version: str | None = None
    description: str = ""
    authors: list[Any] = []
    keywords: list[str] = []


class Hardening(Section):
    """`verifier.hardening`."""

    cleanup_conftests: bool = True


class Verifier(Section):
    """`[verifier]`."""

    timeout_sec: Seconds = 600.0
    env: dict[str, str] = {}
    type: Literal["test-script", "llm-judge"] = "test-script"
    reward_range: tuple[float, float] | None = None
    hardening: Hardening = field(default_factory=Hardening)
    service: str = "main"
    user: User = None
    network_mode: Network | None = None
    allowed_hosts: list[str] | None = None
    environment_mode: Literal["shared", "separate"] | None = None
    environment: dict[str, Any] | None = None
    sandbox_mode: Literal["shared", "separate"] | None = None
    sandbox: dict[str, Any] | None = None
    collect: list[Any] = []
    judge: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    pytest_plugins: list[str] = []


class Agent(Section):
    """`[agent]`."""

    timeout_sec: Seconds | None = None
    user: User = None
    network_mode: Network | None = None
    allowed_hosts: list[str] | None = None
    prompt_prefix: str | None = None


class Environment(Section):
    """`[environment]`, in `task.md` also `sandbox`."""

    build_timeout_sec: Seconds = 600.0
    docker_image: Text | None = None
    image: Text | None = None
    os: str = "linux"
    cpus: Annotated[float, Meta(gt=0)] | None = None
    memory_mb: Size | None = None
    memory: str | None = None
    storage_mb: Size | None = None
    storage: str | None = None
    gpus: Count | None = None
    gpu_types: list[str] | None = None
    tpu: dict[str, Any] | None = None
    network_mode: Network | None = None
    allowed_hosts: list[str] | None = None
    allow_internet: bool | None = None
    env: dict[str, str] = {}
    workdir: Text | None = None
    mcp_servers: list[Any] = []
    skills_dir: str | None = None
    healthcheck: dict[str, Any] | None = None
    setup_commands: list[Any] = []
    bugswarm_image_tag: str | None = None


class Solution(Section):
    """`[solution]`, in `task.md`: `oracle`."""

    env: dict[str, str] = {}
    timeout_sec: Seconds | None = None


class Common(Section):
    """What both formats have at the top."""

    version: str | None = None
    schema_version: str | None = None
    task: Package | None = None
    metadata: dict[str, Any] = {}
    agent: Agent = field(default_factory=Agent)
    source: str | None = None
    reward: dict[str, Any] = {}
    multi_step_reward_strategy: Literal["mean", "final"] | None = None
    steps: list[Any] | None = None
    artifacts: list[Any] = []


class TaskToml(Common):
    """A whole `task.toml`."""

    verifier: Verifier = field(default_factory=Verifier)
    environment: Environment = field(default_factory=Environment)
    solution: Solution = field(default_factory=Solution)


class TaskMd(Common):
    """The front matter of a `task.md`; `verifier` and `oracle` may be a path instead of a table.

    What earlier packages call `environment` and `solution`, later ones call `sandbox` and `oracle`.
    """

    verifier: Verifier | str = field(default_factory=Verifier)
    sandbox: Environment | None = None
    environment: Environment | None = None
    oracle: Solution | str | None = None
    solution: Solution | None = None
    name: Text | None = None
    image: Text | None = None
    profile: str | list[str] | None = None
    profiles: str | list[str] | None = None
    agents: dict[str, Any] = {}
    scenes: list[Any] = []
    user: dict[str, Any] = {}
    benchflow: dict[str, Any] = {}


class Strategy(Struct):
    """One strategy of a `verifier.md`; each kind has further keys of its own."""

    type: Literal["script", "reward-kit", "llm-judge", "agent-judge", "ors-episode"]
    command: str | None = None


class Strategies(Section):
    """The `verifier` table of a `verifier.md`."""

    strategies: dict[str, Strategy]
    default_strategy: str | None = None
    name: str | None = None
    rubric: dict[str, Any] = {}
    outputs: dict[str, Any] = {}


class VerifierMd(Section):
    """The front matter of a `verifier.md`."""

    verifier: Strategies
    document_version: str | None = None
