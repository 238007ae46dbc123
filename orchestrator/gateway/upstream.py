"""Which model a role talks to, where it is served, in which wire formats, and what it costs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

import attrs

from orchestrator.gateway.formats import FORMATS, Api
from orchestrator.gateway.prices import Prices, most_output
from states.errors import ConfigError, MissingExtra

OPENAI: frozenset[Api] = frozenset({"openai-chat", "openai-responses"})
CHAT: frozenset[Api] = frozenset({"openai-chat"})
MESSAGES: frozenset[Api] = frozenset({"anthropic-messages"})


@attrs.frozen
class Provider:
    """What is known of a provider by its name.

    `keys` are the variables that may hold its key; `<NAME>_BASE_URL` replaces its `base_url`. One without `apis` is
    called by LiteLLM, and `settings` are the variables that this needs, by LiteLLM's own names for them.
    """

    keys: tuple[str, ...]
    base_url: str = ""
    apis: frozenset[Api] = frozenset()
    settings: Mapping[str, str] = attrs.field(factory=dict)


PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider(("OPENAI_API_KEY",), "https://api.openai.com/v1", OPENAI),
    "anthropic": Provider(("ANTHROPIC_API_KEY",), "https://api.anthropic.com", MESSAGES),
    "openrouter": Provider(("OPENROUTER_API_KEY",), "https://openrouter.ai/api/v1", CHAT),
    "deepseek": Provider(("DEEPSEEK_API_KEY",), "https://api.deepseek.com/v1", CHAT),
    "groq": Provider(("GROQ_API_KEY",), "https://api.groq.com/openai/v1", CHAT),
    "mistral": Provider(("MISTRAL_API_KEY",), "https://api.mistral.ai/v1", CHAT),
    "xai": Provider(("XAI_API_KEY",), "https://api.x.ai/v1", CHAT),
    "gemini": Provider(("GEMINI_API_KEY", "GOOGLE_API_KEY")),
    "azure": Provider(("AZURE_API_KEY",), settings={"api_base": "AZURE_API_BASE", "api_version": "AZURE_API_VERSION"}),
    "bedrock": Provider(
        (),
        settings={
            "aws_access_key_id": "AWS_ACCESS_KEY_ID",
            "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
            "aws_session_token": "AWS_SESSION_TOKEN",
            "aws_region_name": "AWS_REGION",
        },
    ),
    "vertex_ai": Provider(
        (),
        settings={
            "vertex_project": "VERTEXAI_PROJECT",
            "vertex_location": "VERTEXAI_LOCATION",
            "vertex_credentials": "GOOGLE_APPLICATION_CREDENTIALS",
        },
    ),
    "ollama": Provider((), settings={"api_base": "OLLAMA_API_BASE"}),
}
"""Providers by the prefix of a model's name. Others go through LiteLLM with `<PREFIX>_API_KEY`."""

_ROUTES: Mapping[Api, str] = {
    "openai-chat": "hosted_vllm/",
    "anthropic-messages": "anthropic/",
    "openai-responses": "openai/responses/",
}
"""LiteLLM's prefix for a server that speaks this format, the preferred one first. `openai/` would send messages on to
`/responses`, which servers of chat completions do not have; `hosted_vllm/` sends them to chat."""


_SECRET_SETTINGS = frozenset({"aws_secret_access_key", "aws_session_token"})


def require_litellm() -> None:
    """Raise `MissingExtra` unless litellm is installed. Imports nothing."""
    for module in ("litellm", "mcp"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(
                f"{module} is not installed, and this agent's wire format is not its model's: "
                "pip install 'rollout-orchestrator[litellm]'"
            )


def _apis(given: Iterable[Api]) -> frozenset[Api]:
    return frozenset(given)


def _pairs(given: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(dict(given).items()))


@attrs.frozen
class Upstream:
    """A model as its provider serves it.

    `base_url` follows the provider's own custom: OpenAI's ends in `/v1`, Anthropic's does not (either is understood).
    Calls in a format among `apis` pass through; others, and all when `apis` is empty, are made by LiteLLM under
    `litellm_model`, which is derived where it is not given, with `litellm_settings` (a mapping, such as
    `{"aws_region_name": "eu-west-1"}`) as further arguments. `prices` are for budgets of cost; `max_output` is how many
    tokens the model can write in one reply, None where nobody knows.

    >>> Upstream("m", "http://127.0.0.1:8000", ["openai-chat"], api_key="secret").url("openai-chat")
    'http://127.0.0.1:8000/v1/chat/completions'
    """

    model: str
    base_url: str = ""
    apis: frozenset[Api] = attrs.field(default=frozenset(), converter=_apis)
    api_key: str = attrs.field(default="", repr=False)
    litellm_model: str = ""
    litellm_settings: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=_pairs, repr=False)
    prices: Prices | None = attrs.field(default=None, kw_only=True)
    max_output: int | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if unknown := self.apis - set(FORMATS):
            raise ConfigError(f"unknown wire format {', '.join(sorted(unknown))}; known: {', '.join(FORMATS)}")
        if self.apis and urlsplit(self.base_url).scheme not in {"http", "https"}:
            raise ConfigError(f"the base URL of model {self.model} is {self.base_url!r}; expected http:// or https://")
        if not self.apis and not self.litellm_model:
            raise ConfigError(f"model {self.model} has neither a wire format (`apis`) nor a route (`litellm_model`)")

    @classmethod
    def for_model(cls, model: str, env: Mapping[str, str], *, apis: Collection[Api] | None = None) -> Self:
        """Find a model by its name, `provider/name`, and its key in `env`.

        Args:
            model: For example `anthropic/claude-sonnet-4-5`, `openai/gpt-5`, `gemini/gemini-2.5-pro`.
            env: Variables such as `OPENAI_API_KEY` and `OPENAI_BASE_URL`.
            apis: The wire formats of the server behind the base URL, where they differ from the provider's own.

        Raises:
            ConfigError: the name has no provider, or `env` lacks its key; the message names the variable.
        """
        prefix, slash, name = model.partition("/")
        if not slash or not prefix or not name:
            raise ConfigError(
                f"model {model!r} names no provider; write for example openai/{name or prefix or 'gpt-5'}"
            )
        provider = PROVIDERS.get(prefix) or Provider((f"{_variable(prefix)}_API_KEY",))
        key = next((env[name] for name in provider.keys if env.get(name)), "")
        if provider.keys and not key:
            raise ConfigError(f"model {model} needs {' or '.join(provider.keys)}, which is not set")
        base_url = env.get(f"{_variable(prefix)}_BASE_URL") or provider.base_url
        spoken = provider.apis if apis is None else frozenset(apis)
        known: dict[str, Any] = {"prices": Prices.known(model), "max_output": most_output(model)}
        if not spoken:
            settings = {ours: env[theirs] for ours, theirs in provider.settings.items() if env.get(theirs)}
            return cls(name, base_url, api_key=key, litellm_model=model, litellm_settings=settings, **known)
        return cls(name, base_url, spoken, key, **known)

    def check(self, apis: Collection[Api]) -> None:
        """Raise `MissingExtra` when an agent that speaks only `apis` cannot call this model for want of litellm."""
        if not self.apis.intersection(apis):
            require_litellm()

    def check_direct(self, apis: Collection[Api]) -> None:
        """Raise `ConfigError` when an agent that speaks only `apis` cannot call this model without our gateway."""
        spoken = self.apis.intersection(apis)
        if not spoken:
            raise ConfigError(
                f"model {self.model} speaks {', '.join(sorted(self.apis)) or 'no wire format that is known'}, an agent "
                f"{', '.join(apis)}; only the gateway translates, and usage_tracking is off"
            )
        if not any(self.url(api) == self.root + FORMATS[api].path for api in spoken):
            raise ConfigError(f"the base URL of model {self.model}, {self.base_url!r}, must end in /v1: agents add it")

    @property
    def root(self) -> str:
        """The base URL without `/v1`: what a manifest's `${base_url}` is, when an agent calls this directly."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def url(self, api: Api, path: str = "") -> str:
        """Where calls of this format go; `path` replaces the format's own, both beginning with `/v1`."""
        base, path = self.base_url.rstrip("/"), path or FORMATS[api].path
        versioned = base.endswith("/v1") if api == "anthropic-messages" else bool(urlsplit(base).path)
        return base + (path.removeprefix("/v1") if versioned else path)

    @property
    def chat_limit(self) -> str:
        """What this server calls the output limit of a chat completion: OpenAI's own has dropped the older word."""
        host = urlsplit(self.base_url).hostname or ""
        return "max_completion_tokens" if host.endswith("openai.com") else "max_tokens"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not reach an artifact."""
        return (self.api_key, *(value for name, value in self.litellm_settings if name in _SECRET_SETTINGS))

    @property
    def spoken(self) -> Api | None:
        """The format in which LiteLLM calls the server behind `base_url`; None when it has a route of its own."""
        return None if self.litellm_model else next(api for api in _ROUTES if api in self.apis)

    def route(self, client: Api) -> dict[str, Any]:
        """LiteLLM's arguments for a call that came in the format `client`: the model's name there, and by what way."""
        spoken = self.spoken
        if spoken is None:
            return {"model": self.litellm_model, **dict(self.litellm_settings)}
        if client == "openai-responses" and spoken == "openai-chat":
            return {"model": f"{_ROUTES[spoken]}{self.model}", "use_chat_completions_api": True}
        if client == "anthropic-messages" and spoken == "openai-responses":
            return {"model": f"openai/{self.model}"}
        return {"model": f"{_ROUTES[spoken]}{self.model}"}


def _variable(prefix: str) -> str:
    return re.sub("[^A-Z0-9]", "_", prefix.upper())
