"""What holds in every rollout: each test is one statement about every node that any legal events can reach.

A test that takes `space` is also a detector: `test_machine_mutants.py` gives it spaces of broken tables.
"""

from __future__ import annotations

import pytest
from machine_space import ALPHABET, FAILURE, EndlessError, Graph, Node, Space, Step

from states import deadlines
from states import events as ev
from states import machine as m

AGENTLESS = ("provisioning", "disconnected", "verifying", "releasing", *m.CLOSED)
TURN = ("executing", "cancelling", *m.CAPTURING)
WIND_DOWN = ("cancelling", *m.CAPTURING, "quiescing", "releasing", *m.CLOSED)
DECISIONS = (ev.Prompted, ev.CheckAsked, ev.Paused, ev.Recovered)

EXPIRY: dict[str, type[ev.Event]] = {
    "provisioning": ev.SandboxFailed,
    "disconnected": ev.Failed,
    "connecting": ev.ConnectFailed,
    "session/acp": ev.Failed,
    "session/factory": ev.Failed,
    "executing": ev.DeadlinePassed,
    "paused": ev.Failed,
    "checking": ev.Checked,
    "cancelling": ev.Unresponsive,
    "capturing/whole": ev.Captured,
    "capturing/partial": ev.Captured,
    "quiescing": ev.Unquiet,
    "verifying": ev.VerifierFailed,
    "releasing": ev.Released,
}
"""What the kernel fires when a state's deadline passes."""

CRASH = EXPIRY | {"executing": ev.Failed}


def test_the_table_of_deadlines_fires_what_is_assumed_here():
    """So these checks speak about the deadlines that the kernel really keeps."""
    assert {state: type(fires(FAILURE, deadlines.Deadline(1.0))) for state, fires in deadlines.EXPIRY.items()} == EXPIRY
    assert {state: type(deadlines.crashed(state, FAILURE, deadlines.Deadline(1.0))) for state in m.LIVE} == CRASH
    assert set(deadlines.DEADLINES) == set(m.LIVE)


@pytest.fixture(scope="module")
def space() -> Space:
    """The machine that runs rollouts, explored."""
    return Space(m.TABLE, m.fire)


def never(found) -> None:
    """Nothing of the kind exists; the first of them is shown."""
    first = next(iter(found), None)
    assert first is None, str(first)


# --- the table as a whole ------------------------------------------------------------------------------------


def test_every_guarded_row_has_an_unguarded_twin_which_stands_last(space: Space):
    """An event that is legal always leads somewhere, and no row is shadowed by one above it."""
    for state in m.LIVE:
        for event in m.EVENTS.values():
            guards = [row.guard is not None for row in space.rows(event, state)]
            assert guards == [True] * (len(guards) - 1) + [False] * bool(guards), f"{event.__name__} in {state}"


def test_cancelled_and_sandbox_failed_and_recovered_are_legal_in_every_live_state(space: Space):
    """What comes from outside asks nobody whether it is a good moment."""
    for event in (ev.Cancelled, ev.SandboxFailed, ev.Recovered):
        assert [state for state in m.LIVE if not space.rows(event, state)] == []


def test_what_each_deadline_fires_is_legal_in_its_state(space: Space):
    assert [state for state in m.LIVE if not space.rows(EXPIRY[state], state)] == []


def test_what_a_crashed_handler_fires_is_legal_in_its_state(space: Space):
    assert [state for state in m.LIVE if not space.rows(CRASH[state], state)] == []


def test_an_agent_can_be_lost_wherever_a_session_lives(space: Space):
    lives = (*m.SESSION, "paused", "executing", "cancelling")
    assert [state for state in lives if not space.rows(ev.Lost, state)] == []


def test_every_limit_of_a_turn_and_an_interruption_are_legal_while_it_runs(space: Space):
    limits = (ev.DeadlinePassed, ev.IdlePassed, ev.BudgetSpent, ev.Interrupted)
    assert [event for event in limits if not space.rows(event, "executing")] == []


def test_every_event_is_used_and_no_row_leads_into_the_start_or_out_of_a_closed_state(space: Space):
    assert {row.event for row in space.table} == {type(event) for event in ALPHABET}
    assert {row.to for row in space.table} == {*m.STATES, None} - {m.INITIAL}
    assert {source for row in space.table for source in row.sources} == set(m.LIVE)


def test_all_19_states_are_reached(space: Space):
    assert {node.state for _, node in space.nodes()} == set(m.STATES)


def test_all_106_edges_are_fired(space: Space):
    fired = {step.edge for _, step in space.steps()}
    assert fired == {(row, source) for row in space.table for source in row.sources}


def test_no_legal_event_is_ever_refused_by_all_guards(space: Space):
    never(stuck for graph in space.graphs for stuck in graph.stuck)


# --- the way to closed ---------------------------------------------------------------------------------------


def test_from_every_node_there_is_a_way_to_closed(space: Space):
    """Also without a new process that takes over."""
    for graph in space.graphs:
        good = graph.reaches(lambda node: node.position.closed, lambda step: type(step.event) is not ev.Recovered)
        never(node for node in graph.steps if node not in good)


def test_only_released_leads_to_closed_and_only_from_releasing(space: Space):
    """So `releasing` dominates every way to an end, and everything that was held is given back."""
    never(
        step
        for _, step in space.steps()
        if step.target.position.closed and not (type(step.event) is ev.Released and step.source.state == "releasing")
    )


def test_the_lease_is_held_until_closed_and_given_back_there(space: Space):
    never(node for _, node in space.nodes() if node.ghost.leased == node.position.closed)


def test_the_closed_leaf_is_the_ending(space: Space):
    never(node for _, node in space.nodes() if node.position.closed and node.state != f"closed/{node.facts.ending}")


def test_an_ending_is_set_before_releasing(space: Space):
    never(node for _, node in space.nodes() if node.state == "releasing" and node.facts.ending is None)


def test_an_ending_never_changes(space: Space):
    """The first one wins, so a reward survives a cancel that comes while things are given back."""
    never(
        step
        for _, step in space.steps()
        if step.source.facts.ending and step.source.facts.ending != step.target.facts.ending
    )


def test_after_an_ending_a_rollout_only_winds_down(space: Space):
    """No prompt, no connect and no verification after a cancel."""
    never(node for _, node in space.nodes() if node.facts.ending and node.state not in WIND_DOWN)


def test_closed_is_left_by_nothing(space: Space):
    never(node for graph in space.graphs for node, steps in graph.steps.items() if node.position.closed and steps)


# --- who is alive --------------------------------------------------------------------------------------------


def test_nothing_runs_before_provisioned_was_seen(space: Space):
    early = (m.INITIAL, "releasing", *m.CLOSED)
    never(node for _, node in space.nodes() if not node.ghost.provisioned and node.state not in early)


def test_provisioning_happens_once(space: Space):
    never(step for _, step in space.steps() if step.target.state == m.INITIAL and step.moves)
    never(node for _, node in space.nodes() if node.state == m.INITIAL and node.ghost.provisioned)


def test_no_agent_is_alive_while_the_verifier_runs(space: Space):
    never(node for _, node in space.nodes() if node.state == "verifying" and node.ghost.alive)


def test_disconnected_means_that_no_agent_is_alive(space: Space):
    never(node for _, node in space.nodes() if node.state == "disconnected" and node.ghost.alive)


def test_a_check_sees_no_agent_or_a_frozen_one_with_a_usable_session(space: Space):
    never(
        node
        for rules, node in space.nodes()
        if node.state == "checking" and node.ghost.alive and not (rules.can_freeze and not node.ghost.dead)
    )


def test_things_are_given_back_beside_a_live_agent_only_after_unquiet_and_never_with_a_reward(space: Space):
    never(
        node
        for _, node in space.nodes()
        if node.state == "releasing"
        and node.ghost.alive
        and not (node.ghost.unquiet and node.facts.ending in {"failed", "cancelled"})
    )


def test_there_are_never_two_agents(space: Space):
    never(step for _, step in space.steps() if step.target.state == "connecting" and step.source.ghost.alive)


def test_a_dead_session_is_never_used_again(space: Space):
    usable = (*m.SESSION, "executing", "cancelling", "checking", "paused", "connecting")
    never(node for _, node in space.nodes() if node.ghost.dead and node.state in usable)


def test_a_session_is_the_one_that_was_opened(space: Space):
    """The state's name, the only place which tells the transports apart, is never wrong."""
    names = {"session/acp": "acp", "session/factory": "factory"}
    never(node for _, node in space.nodes() if node.state in names and node.facts.link != names[node.state])


# --- turns ---------------------------------------------------------------------------------------------------


def test_a_turn_is_open_exactly_from_prompt_to_seal(space: Space):
    never(node for _, node in space.nodes() if node.ghost.open != (node.state in TURN))


def test_each_prompt_is_captured_once(space: Space):
    """A kill -9 and a second kill -9 included, as Recovered is among the events."""
    never(step for _, step in space.steps() if type(step.event) is ev.Captured and not step.source.ghost.open)
    never(step for _, step in space.steps() if type(step.event) is ev.Prompted and step.source.ghost.open)


def test_prompted_is_the_only_way_into_executing(space: Space):
    never(
        step
        for _, step in space.steps()
        if step.target.state == "executing" and step.moves and type(step.event) is not ev.Prompted
    )


def test_a_turn_is_whole_only_when_it_answered(space: Space):
    """It ended by itself, or the cancelled one settled."""
    never(
        step
        for _, step in space.steps()
        if step.target.state == "capturing/whole" and step.moves and type(step.event) not in {ev.TurnEnded, ev.Settled}
    )


def test_a_turn_that_may_still_answer_is_asked_to_stop_before_it_is_captured(space: Space):
    """A limit leads through `cancelling`; straight to the seal go only an answer, a loss and a take-over."""
    over = {ev.TurnEnded, ev.TurnFailed, ev.Settled, ev.Unresponsive, ev.Lost, ev.SandboxFailed, ev.Recovered}
    never(
        step
        for _, step in space.steps()
        if step.target.state in m.CAPTURING and step.moves and type(step.event) not in over
    )


# --- why it ended --------------------------------------------------------------------------------------------


def test_rewarded_means_verified(space: Space):
    never(node for _, node in space.nodes() if (node.facts.ending == "rewarded") != node.ghost.verified)


def test_void_means_that_a_prompt_was_sent_and_nothing_came_of_it(space: Space):
    never(
        step
        for rules, step in space.steps()
        if step.target.facts.ending == "void"
        and not step.source.facts.ending
        and not (step.source.ghost.silent(rules) and type(step.event) is ev.PlanDone)
    )


def test_a_silent_rollout_is_never_verified(space: Space):
    never(node for rules, node in space.nodes() if node.state == "verifying" and node.ghost.silent(rules))
    never(node for rules, node in space.nodes() if node.facts.ending == "unverified" and node.ghost.silent(rules))


def test_cancelled_means_that_somebody_cancelled_first(space: Space):
    never(node for _, node in space.nodes() if (node.facts.ending == "cancelled") != node.ghost.cancelled)


def test_unverified_means_that_the_host_verifies(space: Space):
    never(node for rules, node in space.nodes() if node.facts.ending == "unverified" and rules.has_verifier)
    never(node for rules, node in space.nodes() if node.state == "verifying" and not rules.has_verifier)


def test_failed_has_a_cause(space: Space):
    """A crash, a dead sandbox, an agent not proven dead, or a limit that was reached."""

    def cause(rules: m.Rules, step: Step) -> bool:
        match step.event:
            case ev.Failed() | ev.SandboxFailed() | ev.Unquiet():
                return True
            case ev.RoleAssigned():
                return step.source.facts.connects >= rules.max_connects
            case ev.VerifierFailed():
                return step.source.facts.verifies + 1 >= rules.max_verifies
        return False

    never(
        step
        for rules, step in space.steps()
        if step.target.facts.ending == "failed" and not step.source.facts.ending and not cause(rules, step)
    )


def test_a_cause_of_failure_is_never_forgotten(space: Space):
    """The converse: after a crash, a dead sandbox or an Unquiet there is an ending, the first one."""
    never(
        step
        for _, step in space.steps()
        if type(step.event) in {ev.Failed, ev.SandboxFailed, ev.Unquiet, ev.Cancelled, ev.Verified}
        and step.target.facts.ending is None
    )


# --- how long it takes ---------------------------------------------------------------------------------------

MOVES_TO_CLOSED = {
    "executing": 5,
    "cancelling": 4,
    "connecting": 3,
    "session/acp": 3,
    "session/factory": 3,
    "paused": 3,
    "checking": 3,
    "capturing/whole": 3,
    "capturing/partial": 3,
    "quiescing": 2,
    "disconnected": 2,
    "provisioning": 2,
    "verifying": 2,
    "releasing": 1,
}


def test_from_a_cancel_it_is_at_most_five_moves_to_closed(space: Space):
    """Whatever else happens on the way: a second cancel, kill -9, the death of the sandbox."""
    most: dict[str, int] = {}
    for graph in space.graphs:
        cancels = [step for step in graph.all() if type(step.event) is ev.Cancelled]
        longest = graph.longest((step.target for step in cancels), lambda _: True)
        for step in cancels:
            moves = step.moves + longest[step.target]
            most[step.source.state] = max(most.get(step.source.state, 0), moves)
    assert most == MOVES_TO_CLOSED


@pytest.mark.parametrize("fired", [EXPIRY, CRASH], ids=["hangs", "crashes"])
def test_when_every_handler_fails_the_rollout_closes_within_five_moves(space: Space, fired):
    """From wherever it begins. `VerifierFailed` may try again in place, so its own two do not count as moves."""
    for graph in space.graphs:
        longest = graph.longest(
            graph.steps, lambda step: not step.source.position.closed and type(step.event) is fired[step.source.state]
        )
        assert max(longest.values()) <= 5
        never(node for node in graph.steps if not node.position.closed and not ends(graph, node, fired))


def ends(graph: Graph, node: Node, fired) -> bool:
    """Whether the events that failing handlers fire lead to closed, the first of each kind taken."""
    for _ in range(8):
        if node.position.closed:
            return True
        step = next((step for step in graph.steps[node] if type(step.event) is fired[node.state]), None)
        if step is None:
            return False
        node = step.target
    return node.position.closed


def test_handlers_that_hang_and_crash_in_turn_close_it_within_five_moves_too(space: Space):
    for graph in space.graphs:
        longest = graph.longest(
            graph.steps, lambda step: type(step.event) in {EXPIRY[step.source.state], CRASH[step.source.state]}
        )
        assert max(longest.values()) <= 5


def test_nothing_goes_round_without_a_decision(space: Space):
    """A loop holds a prompt, a check, a pause or a take-over, and between two of those are at most 16 moves.

    (And the verifier's second try, which stays in place.)
    """
    most = 0
    for graph in space.graphs:
        try:
            longest = graph.longest(graph.steps, lambda step: type(step.event) not in DECISIONS)
        except EndlessError as error:
            pytest.fail(str(error))
        most = max(most, *longest.values())
    assert most == 16


def test_after_kill_9_only_states_that_need_nothing_live_are_entered(space: Space):
    resumable = ("provisioning", "disconnected", *m.CAPTURING, "quiescing", "verifying", "releasing")
    recovered = [step for _, step in space.steps() if type(step.event) is ev.Recovered]
    never(step for step in recovered if step.target.state not in resumable)
    never(step for step in recovered if step.target.facts.link not in {"none", "gone"})
