"""What verifiers finds under our name: it takes a harness's id for the name of a top-level module.

    vf-eval TASKSET --env.agent.harness.id rollout-orchestrator

Everybody else imports `orchestrator`.
"""

from orchestrator.embed.verifiers import RolloutHarness

__all__ = ["RolloutHarness"]
