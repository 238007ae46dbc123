"""Budgets: values, arithmetic, attribution, and what they do to a rollout over both transports and on both loops."""

from __future__ import annotations

import json

import anyio
import attrs
import pytest
import trio
import trio.testing
from harness import TRANSPORTS, FakeMeter, FakeVerifier, Stand, assert_sound, build, drive, on
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import segments
from test_ways_out import hooked

from orchestrator import Budgets, ConfigError, RolloutConfig, Scene, Turn
from orchestrator.budgets import KINDS, METERED, Limit, Limits, brought_up, limits_of
from orchestrator.directors import Story
from states import events as ev
from states import machine as m
from states.counting import total, uncounted
from states.events import Next, Share, Usage
from states.journal import Transition
from states.machine import Facts, Position, Rules

EASY = settings(derandomize=True, deadline=None, database=None)
NAMES = ("coder", "reviewer", "user")
LIMITS = {
    "tokens": st.integers(1, 10_000),
    "cost": st.floats(1e-6, 100.0),
    "tool_calls": st.integers(1, 50),
    "turns": st.integers(1, 50),
    "wall_sec": st.floats(0.001, 1e6),
    "idle_sec": st.floats(0.001, 1e6),
}
BUDGETS = st.builds(Budgets, **{kind: st.none() | limit for kind, limit in LIMITS.items()})
USAGES = st.builds(
    Usage,
    calls=st.just(1),
    failed_calls=st.integers(0, 1),
    input_tokens=st.integers(0, 5_000),
    output_tokens=st.integers(0, 5_000),
    cost=st.sampled_from([0.0, 0.25, 1.5]),
)
SHARES = st.lists(
    st.builds(
        Share,
        st.sampled_from(NAMES),
        st.integers(0, 4),
        USAGES,
        st.integers(0, 9),
        st.sampled_from([0.0, 1.5, 60.0]),
    ),
    max_size=12,
)


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


# --- values -----------------------------------------------------------------------------------------------------


@EASY
@given(BUDGETS)
def test_budgets_are_what_is_given_and_come_back_from_a_journal(budgets):
    """JSON knows no whole numbers: 10.0 tokens are 10."""
    assert Budgets.of(budgets.given()) == budgets
    assert (
        Budgets.of(json.loads(json.dumps({kind: float(limit) for kind, limit in budgets.given().items()}))) == budgets
    )
    assert set(budgets.given()) <= set(KINDS) == set(LIMITS) == {field.name for field in attrs.fields(Budgets)}
    assert len(limits_of("scene", budgets)) == len(budgets.given())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0, -1, "10", True, float("nan"), float("inf")])
def test_a_budget_that_lets_nothing_begin_or_is_no_number_is_refused(kind, limit):
    with pytest.raises(ConfigError, match=f"{kind} must be a (whole )?number > 0 or None"):
        Budgets(**{kind: limit})


@pytest.mark.parametrize("kind", ["tokens", "tool_calls", "turns"])
def test_what_is_counted_is_not_halved(kind):
    with pytest.raises(ConfigError, match=f"{kind} must be a whole number"):
        Budgets.of({kind: 1.5})


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda: Budgets.of({"tokenz": 1}), "no budget is called 'tokenz'; did you mean tokens?"),
        (lambda: Budgets.of({"money": 1}), "no budget is called 'money'; there are tokens, cost"),
        (lambda: Turn("coder", budgets=Budgets(turns=1)), "a turn has no budget of turns: it is one"),
        (
            lambda: RolloutConfig(prompt="x", agent="noop", timeout=5, budgets=Budgets(wall_sec=6)),
            "give one of the two",
        ),
        (lambda: Limits(directors={"lead": Budgets(turns=1)}), "the director 'lead' takes no turns, so no turns"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(what, says):
    with pytest.raises(ConfigError) as refused:
        what()
    assert says in str(refused.value)


def test_the_short_words_are_the_same_limits():
    """`timeout` is the rollout's wall clock; a director is bounded by `max_turns` unless a budget says otherwise."""
    scene = Scene.single("noop", name="coder", budgets=Budgets(tokens=5))
    limits = RolloutConfig(prompt="x", scene=scene, timeout=60, director=lambda _story: None, max_turns=7).limits()
    assert limits == Limits(Budgets(wall_sec=60, turns=7), Budgets(), {"coder": Budgets(tokens=5)})
    given = RolloutConfig(prompt="x", scene=scene, director=lambda _story: None, budgets=Budgets(turns=9)).limits()
    assert given.rollout == Budgets(turns=9)
    assert RolloutConfig(prompt="x", scene=scene).limits().rollout == Budgets()


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (Limit("rollout", "tokens", 1_500_000), "the rollout's budget of 1,500,000 tokens"),
        (Limit("scene", "cost", 0.5), "the scene's budget of $0.5"),
        (Limit("role", "tool_calls", 3, "coder"), "coder's budget of 3 tool calls"),
        (Limit("turn", "wall_sec", 0.25, "4"), "turn 4's budget of 0.25 s"),
        (Limit("role", "idle_sec", 5, "coder"), "coder's budget of 5 s of silence"),
        (Limit("scene", "turns", 2), "the scene's budget of 2 turns"),
    ],
)
def test_a_limit_says_whose_it_is(limit, says):
    assert str(limit) == says


# --- arithmetic -------------------------------------------------------------------------------------------------


@EASY
@given(SHARES, BUDGETS)
def test_a_budget_is_gone_when_what_was_spent_of_it_reaches_it(shares, budgets):
    """And nothing else is said to be gone; what cannot be added up is never gone."""
    limits = Limits(budgets, budgets, {"coder": budgets, "reviewer": Budgets()})
    gone = {one.limit: one.spent for one in limits.gone(limits.all(), shares)}
    for limit in limits.all():
        spent = limits.amount(limit, shares)
        assert (limit in gone) == (spent is not None and spent >= limit.limit)
        assert gone.get(limit, spent) == spent
        assert (spent is None) == (limit.kind == "idle_sec")
    for one in limits.gone(limits.all(), shares):
        event = one.event()
        assert (event.scope, event.kind, event.limit, event.spent) == (
            one.limit.scope,
            one.limit.kind,
            one.limit.limit,
            one.spent,
        )


@EASY
@given(SHARES)
def test_what_roles_spend_is_what_the_scene_spends_and_a_director_spends_of_the_rollout(shares):
    """Every share is in the account of one role and one turn."""
    limits = Limits(roles={"coder": Budgets(), "reviewer": Budgets()})

    def amount(kind, scope, of=""):
        return limits.amount(Limit(scope, kind, 1, of), shares)

    for kind in ("tokens", "tool_calls", "turns"):
        roles = {name: amount(kind, "role", name) for name in NAMES}
        assert roles["coder"] + roles["reviewer"] == amount(kind, "scene")
        assert sum(roles.values()) == amount(kind, "rollout")
        assert sum(amount(kind, "turn", str(turn)) for turn in range(5)) == amount(kind, "rollout")


def test_an_unknown_price_makes_the_cost_unknown_and_is_never_over_a_limit():
    """A model of no known price is refused beforehand; here a provider did not say what a call used."""
    shares = [Share("coder", 1, Usage(cost=9.0)), Share("coder", 2, Usage(cost=None))]
    limits = Limits(Budgets(cost=1.0), roles={"coder": Budgets()})
    assert list(limits.gone(limits.all(), shares)) == []


def test_who_decides_the_turns_spends_of_the_rollouts_budgets_and_its_own():
    limits = Limits(
        Budgets(tokens=1), Budgets(tokens=2), {"coder": Budgets(tokens=3), "b": Budgets()}, {"user": Budgets(cost=4.0)}
    )
    assert [limit.limit for limit in limits.holding("coder")] == [1, 2, 3]
    assert [limit.limit for limit in limits.holding("b")] == [1, 2]
    assert [limit.limit for limit in limits.holding("user")] == [1, 4.0]
    assert [limit.limit for limit in limits.holding("")] == [1]
    assert [limit.limit for limit in limits.holding()] == [1, 2]


# --- attribution ------------------------------------------------------------------------------------------------


class Counting:
    """A meter to which calls are told in the order in which they end."""

    def __init__(self):
        self.used = {}

    def ended(self, role, turn, usage):
        self.used[role, turn] = self.used.get((role, turn), Usage()) + usage

    def shares(self):
        return [Share(role, turn, usage) for (role, turn), usage in self.used.items()]

    def usage(self):
        return total(self.shares())


PLAYED = st.lists(
    st.tuples(
        st.sampled_from(["coder", "reviewer"]),
        st.lists(st.tuples(st.sampled_from(NAMES), st.integers(-2, 0), USAGES), max_size=4),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


def play(turns):
    """A journal's events for turns during which calls end: of their own role, of earlier turns, of a director."""
    meter, position = Counting(), Position()

    def fire(event):
        nonlocal position
        position = m.fire(position, event, Rules())

    def count():
        usage, shares = uncounted(position.facts, meter)
        return {"usage": usage, "shares": shares}

    fire(ev.Provisioned())
    for number, (role, calls, tools) in enumerate(turns, 1):
        fire(ev.RoleAssigned(role, Next("turn", role)))
        fire(ev.AcpOpened("s"))
        fire(ev.Prompted(number - 1, role, "do"))
        for who, back, usage in calls:
            meter.ended(who, max(0, number + back) if who != "user" else 0, usage)
        fire(ev.TurnEnded("end_turn"))
        fire(ev.Captured(number, tool_calls=tools, seconds=1.5, **count()))
        fire(ev.RoleSwapped(Next("turn", role)))
        meter.ended("user", 0, Usage(calls=1, input_tokens=1))
        fire(ev.Quiet(**count()))
    fire(ev.PlanDone())
    fire(ev.Verified(1.0))
    meter.ended("user", 0, Usage(calls=1, output_tokens=1))
    fire(ev.Released(**count()))
    return meter, position.facts


@EASY
@given(PLAYED)
def test_the_journal_has_everything_that_was_counted_in_the_account_of_who_used_it(turns):
    """However late a call ends, and whoever works then: nothing twice, nothing lost, nothing for a neighbour."""
    meter, facts = play(turns)
    assert facts.usage == meter.usage() == total(facts.ledger)
    ours = {(share.role, share.turn): share.usage for share in facts.ledger if share.usage != Usage()}
    assert ours == {key: usage for key, usage in meter.used.items() if usage != Usage()}
    assert uncounted(facts, meter) == (Usage(), ())
    own = {
        share.turn: share
        for share in facts.ledger
        if (share.role, share.turn) in {(role, number) for number, (role, *_) in enumerate(turns, 1)}
    }
    assert [own[number].tool_calls for number in range(1, len(turns) + 1)] == [tools for *_, tools in turns]
    assert {share.seconds for share in own.values()} == {1.5}
    assert sum(share.tool_calls for share in facts.ledger) == facts.tool_calls


@EASY
@given(PLAYED)
def test_what_decides_the_turns_is_no_work_of_an_agents(turns):
    """A user that a model plays uses tokens; an agent that uses none is silent all the same."""
    _, facts = play([(role, [], 0) for role, *_ in turns])
    assert facts.usage.calls == len(turns) + 1
    assert not facts.active
    assert facts.worked == Usage()


def test_a_journal_from_before_shares_gives_all_to_the_last_turn():
    """What an older version wrote folds as it did then."""
    position = Position()
    for event in (
        ev.Provisioned(),
        ev.RoleAssigned("coder", Next("turn", "coder")),
        ev.AcpOpened("s"),
        ev.Prompted(0, "coder", "do"),
        ev.TurnEnded("end_turn"),
        ev.Captured(1, tool_calls=2, usage=Usage(calls=1, input_tokens=5)),
        ev.PlanDone(),
        ev.Quiet(usage=Usage(calls=1, output_tokens=3)),
    ):
        position = m.fire(position, event, Rules())
    assert position.facts.ledger == (Share("coder", 1, Usage(calls=2, input_tokens=5, output_tokens=3), 2),)
    assert position.facts.active


@EASY
@given(SHARES, SHARES)
def test_the_meter_knows_usage_and_the_journal_the_rest(ledger, counted):
    """Brought up to date, a share has the meter's usage and the journal's tool calls and seconds."""
    ledger = {(share.role, share.turn): share for share in ledger}
    counted = {(share.role, share.turn): Share(share.role, share.turn, share.usage) for share in counted}
    shares = brought_up(ledger.values(), counted.values())
    for key, share in shares.items():
        assert share.usage == (counted.get(key) or ledger[key]).usage
        assert share.tool_calls == (ledger[key].tool_calls if key in ledger else 0)
    assert set(shares) == set(ledger) | set(counted)


# --- a rollout: in a turn ---------------------------------------------------------------------------------------

TOOLS = {"turns": [[{"tool": "one"}, {"tool": "two"}, {"wait_cancel": True}]]}
WAITS = {"turns": [[{"say": "working"}, {"wait_cancel": True}]]}


def scoped(transport, script, scope, budgets, **config) -> Stand:
    """A scene of one role and two turns, with these budgets of `scope`."""
    own = budgets if scope == "turn" else Budgets()
    stand = build(transport, script, turns=(Turn("agent", budgets=own), Turn("agent", "Go on.", budgets=own)), **config)
    config = stand.rollout.config
    role = attrs.evolve(config.scene.roles[0], budgets=budgets if scope == "role" else Budgets())
    scene = attrs.evolve(config.scene, roles=(role,), budgets=budgets if scope == "scene" else Budgets())
    config = attrs.evolve(config, scene=scene, budgets=budgets if scope == "rollout" else Budgets())
    again = type(stand.rollout)(config)
    return attrs.evolve(stand, rollout=again)


def events(stand):
    return [record.event for record in stand.rollout.journal if isinstance(record, Transition)]


def use(stand, scope):
    """What the result says of the budgets of this scope."""
    return [one for one in stand.rollout.result().budgets if one.scope == scope]


@pytest.mark.anyio
@pytest.mark.parametrize("scope", ["turn", "role", "scene", "rollout"])
async def test_tool_calls_of_every_scope_end_the_turn_that_spends_them(transport, scope):
    """The event names the scope, the plan ends, the work is verified, and the result says what was spent."""
    stand = await drive(scoped(transport, TOOLS, scope, Budgets(tool_calls=2)))
    assert [event for event in events(stand) if isinstance(event, ev.BudgetSpent)] == [
        ev.BudgetSpent(scope, "tool_calls", 2, 2)
    ]
    result = stand.rollout.result()
    assert (result.state, result.ended_by, result.turns) == ("closed/rewarded", "budget:tool_calls", 1)
    spent = use(stand, scope)[0]
    assert (spent.kind, spent.limit, spent.spent, spent.overshoot) == ("tool_calls", 2, 2, 0)
    assert spent.of == {"turn": "1", "role": "agent"}.get(scope, "")


@pytest.mark.anyio
@pytest.mark.parametrize("scope", ["turn", "role", "scene", "rollout"])
async def test_silence_of_every_scope_ends_the_turn(transport, scope):
    """Silences are not added up: the shortest limit holds, and the event names whose it is."""
    stand = await drive(scoped(transport, WAITS, scope, Budgets(idle_sec=0.05), idle_sec=60.0))
    assert [e for e in events(stand) if isinstance(e, ev.IdlePassed)] == [ev.IdlePassed(0.05, scope)]
    assert stand.rollout.result().ended_by == "idle"
    assert [one.spent for one in use(stand, scope)][:1] == [None]


@pytest.mark.anyio
async def test_the_silence_of_a_turn_goes_before_the_usual_one(transport):
    """`idle_sec` of role and rollout is what a turn has that sets none."""
    stand = await drive(scoped(transport, WAITS, "turn", Budgets(idle_sec=0.05), idle_sec=0.001))
    assert [e.seconds for e in events(stand) if isinstance(e, ev.IdlePassed)] == [0.05]


@pytest.mark.parametrize("by", ["handler", "terminal"])
def test_an_agent_that_waits_for_an_answer_is_not_silent(transport, by):
    """A person may take longer than the idle limit; from the answer on silence is the agent's own again."""

    async def person(_request):
        await anyio.sleep(200)
        return "allow"

    asks = {"on_ask_user": person} if by == "handler" else {"policy": "ask", "terminal": person}
    script = {"turns": [[{"permission": {"title": "May I?"}}, {"say": "went on"}, {"wait_cancel": True}]]}
    stand = build(transport, script, idle_sec=30.0, turn_sec=800.0, **asks)
    trio.run(stand.rollout.run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert_sound(stand)
    assert [e.seconds for e in events(stand) if isinstance(e, ev.IdlePassed)] == [30.0]
    assert stand.rollout.result().usage.by_turn[0].seconds == pytest.approx(230, abs=1)
    (segment,) = segments(stand)
    assert [step.data["by"] for step in segment.steps if step.data["type"] == "question"] == [by]
    assert segment.steps[-1].data["text"] == "went on"


@pytest.mark.anyio
async def test_what_a_role_spends_to_connect_is_of_no_turn(transport):
    """Also when it was connected before: its last turn is over, and that turn's budget holds for it no longer."""
    stand = build(transport, SAYS, roles=("coder", "reviewer"), turns=tuple(map(Turn, ("coder", "reviewer", "coder"))))
    counted(stand, state="connecting", usage=Usage(calls=1, input_tokens=7), nth=3)
    await drive(stand)
    spent = {(share.role, share.turn): share.usage.tokens for share in stand.rollout.result().usage.by_turn}
    assert spent == {("coder", 1): 0, ("reviewer", 2): 0, ("coder", 0): 7, ("coder", 3): 0}


@pytest.mark.anyio
@pytest.mark.parametrize("scope", ["turn", "role", "scene", "rollout"])
async def test_wall_clock_of_every_scope_ends_the_turn(transport, scope):
    """It is the state's own deadline, and the event names whose limit that was."""
    stand = await drive(scoped(transport, WAITS, scope, Budgets(wall_sec=0.3)))
    passed = [e for e in events(stand) if isinstance(e, ev.DeadlinePassed)]
    assert [event.scope for event in passed] == [scope]
    result = stand.rollout.result()
    assert (result.ended_by, result.turns, result.state) == ("deadline", 1, "closed/rewarded")
    spent = use(stand, scope)[0]
    assert spent.spent >= 0.3
    assert spent.overshoot == pytest.approx(spent.spent - 0.3) or scope == "rollout"


@pytest.mark.anyio
async def test_the_time_of_a_role_is_that_of_its_turns(transport):
    """Two turns share it: the second has what the first left."""
    script = {"turns": [[{"sleep": 0.2}, {"say": "one"}], [{"say": "two"}, {"wait_cancel": True}]]}
    stand = await drive(scoped(transport, script, "role", Budgets(wall_sec=1.0)))
    [passed] = [e for e in events(stand) if isinstance(e, ev.DeadlinePassed)]
    assert passed.scope == "role"
    assert 0 < passed.seconds <= 0.8
    first, second = stand.rollout.result().usage.by_turn
    assert first.seconds >= 0.2
    assert first.seconds + second.seconds >= 1.0


# --- a rollout: between turns -----------------------------------------------------------------------------------

SAYS = {"turns": [[{"say": "hello"}], [{"say": "again"}], [{"say": "and again"}]]}


@pytest.mark.anyio
@pytest.mark.parametrize("scope", ["role", "scene", "rollout"])
async def test_turns_that_are_spent_end_the_list_before_the_next_prompt(transport, scope):
    """No prompt is sent, and the plan's end says why."""
    stand = await drive(scoped(transport, SAYS, scope, Budgets(turns=1)))
    result = stand.rollout.result()
    assert (result.turns, result.ended_by, result.state) == (1, "end_turn", "closed/rewarded")
    whose = {"role": "agent's"}.get(scope, f"the {scope}'s")
    assert {e.why for e in events(stand) if isinstance(e, ev.PlanDone)} == {f"{whose} budget of 1 turn is spent (1)"}
    assert [one.spent for one in use(stand, scope)] == [1]


def counted(stand, *, state, usage, nth=1):
    """The gateway counted this much when `state` is entered."""
    meter = stand.rollout._world.models._meters
    if not meter:
        meter.append(FakeMeter())
    return hooked(stand, on(state, lambda: setattr(meter[0], "counted", usage), nth=nth))


@pytest.mark.anyio
async def test_a_role_whose_tokens_are_spent_by_a_late_call_gets_no_prompt(transport):
    """The call ended between its turns; the next turn is refused at the decision, and nobody is connected for it."""
    script = {"coder": SAYS, "reviewer": SAYS}
    stand = build(
        transport, script, roles=("coder", "reviewer"), turns=tuple(map(Turn, ("coder", "reviewer", "coder")))
    )
    object.__setattr__(
        stand.rollout._world, "limits", Limits(roles={"coder": Budgets(tokens=100), "reviewer": Budgets()})
    )
    counted(stand, state="quiescing", usage=Usage(calls=1, input_tokens=150))
    await drive(stand)
    result = stand.rollout.result()
    assert result.turns == 2
    assert {e.why for e in events(stand) if isinstance(e, ev.PlanDone)} == {
        "coder's budget of 100 tokens is spent (150)"
    }
    assert {role: usage.tokens for role, usage in result.usage.by_role.items()} == {"coder": 150, "reviewer": 0}
    assert [event.role for event in events(stand) if isinstance(event, ev.RoleAssigned)] == ["coder", "reviewer"]


@pytest.mark.anyio
async def test_what_connecting_spends_is_spent_before_the_first_prompt(transport):
    """No prompt is sent, and as none ever was, there is nothing to grade."""
    stand = build(transport)
    object.__setattr__(stand.rollout._world, "limits", Limits(Budgets(tokens=100), roles={"agent": Budgets()}))
    counted(stand, state="connecting", usage=Usage(calls=1, input_tokens=150))
    await drive(stand)
    result = stand.rollout.result()
    assert (result.turns, result.state, result.reward) == (0, "closed/failed", None)
    assert "the rollout's budget of 100 tokens is spent (150)" in result.verdict.reason


@pytest.mark.anyio
async def test_a_director_goes_on_with_others_after_a_turn_that_spent_a_budget(transport):
    """It sees how the turn ended and who can take no further one."""
    seen = []

    def lead(story: Story):
        seen.append((story.spent("coder"), story.turns[-1].ended_by if story.turns else ""))
        return {0: Turn("coder", budgets=Budgets(idle_sec=60.0)), 1: Turn("reviewer", "Look.")}.get(len(story.turns))

    stand = directed(transport, lead, Budgets(tool_calls=2))
    await drive(stand)
    spent = "coder's budget of 2 tool calls is spent (2)"
    assert seen == [("", ""), (spent, "budget:tool_calls"), (spent, "end_turn")]
    result = stand.rollout.result()
    assert (result.turns, result.ended_by, result.reward) == (2, "end_turn", 1.0)
    assert [use.of for use in result.budgets if use.scope == "turn"] == ["1"]


@pytest.mark.anyio
async def test_a_turn_that_a_director_gives_to_a_spent_role_is_not_taken(transport):
    """The rollout ends and says why; what was done until then is verified."""
    stand = directed(transport, lambda story: Turn("coder"), Budgets(turns=1))
    await drive(stand)
    assert stand.rollout.result().turns == 1
    assert {e.why for e in events(stand) if isinstance(e, ev.PlanDone)} == {"coder's budget of 1 turn is spent (1)"}


def directed(transport, director, budgets):
    """A directed scene of a coder with these budgets and a reviewer with none."""
    script = {"coder": TOOLS if budgets.tool_calls else SAYS, "reviewer": SAYS}
    stand = build(transport, script, roles=("coder", "reviewer"), turns=(Turn("coder"),), director=director)
    config = stand.rollout.config
    coder, reviewer = config.scene.roles
    scene = attrs.evolve(config.scene, roles=(attrs.evolve(coder, budgets=budgets), reviewer))
    return attrs.evolve(stand, rollout=type(stand.rollout)(attrs.evolve(config, scene=scene)))


@pytest.mark.anyio
async def test_a_turns_own_tokens_need_the_gateway(transport):
    """A plan of a host's own may ask for what nobody can keep: it is told so, before the prompt."""

    class Plan:
        async def next(self, facts: Facts) -> Next:
            return Next("done") if facts.prompted else Next("turn", "agent", "Do it.", budgets={"tokens": 5})

    stand = build(transport, plan=Plan(), verifier=FakeVerifier())
    await drive(stand)
    result = stand.rollout.result()
    assert result.state == "closed/failed"
    assert "a turn has a budget of tokens or cost, which the gateway keeps, but no role calls a model" in (
        result.verdict.reason
    )
    assert {"tokens", "cost"} == METERED


@pytest.mark.anyio
async def test_the_result_adds_up_by_role_and_by_turn(transport):
    """Usage, tool calls and time of each turn, in order; the sums are those of the rollout."""
    script = {"coder": {"turns": [[{"tool": "one"}, {"say": "done"}]]}, "reviewer": SAYS}
    stand = build(transport, script, roles=("coder", "reviewer"))
    counted(stand, state="executing", usage=Usage(calls=1, input_tokens=10))
    counted(stand, state="executing", usage=Usage(calls=3, input_tokens=15, output_tokens=4), nth=2)
    await drive(stand)
    result = stand.rollout.result()
    assert [(share.role, share.turn, share.usage.tokens, share.tool_calls) for share in result.usage.by_turn] == [
        ("coder", 1, 10, 1),
        ("reviewer", 2, 9, 0),
    ]
    assert sum((share.usage for share in result.usage.by_turn), Usage()) == result.usage.total
    assert sum(result.usage.by_role.values(), Usage()) == result.usage.total
    assert all(share.seconds > 0 for share in result.usage.by_turn)


def test_a_deadline_table_is_no_way_around_a_turns_own_clock():
    """`deadlines` sets what a turn usually has; a budget of the turn's own goes before it."""
    stand = scoped("acp", WAITS, "turn", Budgets(wall_sec=0.3), deadlines={"executing": 100.0})
    anyio.run(drive, stand)
    assert [e.seconds for e in events(stand) if isinstance(e, ev.DeadlinePassed)] == [0.3]


# --- a director that is an agent --------------------------------------------------------------------------------


class Director:
    """A director whose model was called twice when it was asked: once answered, once refused."""

    def __init__(self, meter, spend):
        self.meter, self.spend, self.asked = meter, spend, 0

    def __call__(self, story):
        self.asked += 1
        self.meter.turn_began("user", 0, Budgets())
        self.meter.counted += Usage(calls=1, input_tokens=self.spend)
        return Turn("agent", "Go on.")


@pytest.mark.anyio
async def test_what_a_director_spends_is_its_own_and_the_rollouts(transport):
    """It is counted for no role that takes turns, and once the rollout's budget is gone it is not asked again."""
    meter = FakeMeter()
    director = Director(meter, 60)
    stand = build(transport, SAYS, director=director, max_turns=9)
    stand.rollout._world.models._meters.append(meter)
    object.__setattr__(stand.rollout._world, "limits", Limits(Budgets(tokens=100), roles={"agent": Budgets()}))
    await drive(stand)
    result = stand.rollout.result()
    assert (director.asked, result.turns) == (2, 1)
    assert {role: usage.tokens for role, usage in result.usage.by_role.items()} == {"agent": 0, "user": 120}
    assert [(share.role, share.turn, share.usage.tokens) for share in result.usage.by_turn] == [
        ("agent", 1, 0),
        ("user", 0, 120),
    ]
    assert {e.why for e in events(stand) if isinstance(e, ev.PlanDone)} == {
        "the rollout's budget of 100 tokens is spent (120)"
    }


@pytest.mark.anyio
async def test_a_role_that_is_spent_while_the_one_before_it_ends_is_not_connected(transport):
    """The turn was decided before the swap; what was counted since is known before anybody is started for it."""
    stand = build(transport, {"coder": SAYS, "reviewer": SAYS}, roles=("coder", "reviewer"))
    meter = FakeMeter()
    stand.rollout._world.models._meters.append(meter)
    limits = Limits(roles={"coder": Budgets(), "reviewer": Budgets(tokens=100)})
    object.__setattr__(stand.rollout._world, "limits", limits)

    def late():
        meter.turn_began("reviewer", 0, Budgets())
        meter.counted += Usage(calls=1, input_tokens=150)

    await drive(hooked(stand, on("quiescing", late)))
    assert [event.role for event in events(stand) if isinstance(event, ev.RoleAssigned)] == ["coder"]
    assert [event.next.role for event in events(stand) if isinstance(event, ev.RoleSwapped)] == ["reviewer"]
    assert [event.why for event in events(stand) if isinstance(event, ev.PlanDone)] == [
        "reviewer's budget of 100 tokens is spent (150)"
    ]
    assert stand.rollout.result().usage.by_role["reviewer"].tokens == 150


@pytest.mark.anyio
@pytest.mark.parametrize("asked", [1, 2], ids=["disconnected", "session"])
async def test_a_turn_with_a_budget_keeps_it_over_a_pause(transport, asked):
    """Somebody holds the rollout while its plan is asked: the decision is kept as it was, limits and all."""
    calls, stands = [], []

    def lead(story):
        calls.append(len(story.turns))
        if len(calls) == asked:
            stands[0].rollout.pause("somebody")
        return Turn("agent", budgets=Budgets(tool_calls=9)) if len(story.turns) < 2 else None

    stand = build(transport, SAYS, director=lead)
    stands.append(stand)
    await drive(hooked(stand, on("paused", lambda: stand.rollout.resume("somebody"))))
    assert [event.next.budgets for event in events(stand) if isinstance(event, ev.Paused)] == [{"tool_calls": 9}]
    assert [event.budgets for event in events(stand) if isinstance(event, ev.Prompted)] == [{"tool_calls": 9}] * 2
    assert calls == [0, 1, 2]
