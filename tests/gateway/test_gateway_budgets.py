"""Budgets at the gateway: what is refused, what is lowered, who waits, and by how much a budget can be exceeded."""

from __future__ import annotations

import asyncio
import json

import attrs
import pytest
from test_gateway import COMMAND, PRICES, WORDS, Bench, both, every_api, request

from orchestrator.budgets import Budgets, Limits
from orchestrator.gateway.formats import CHAT, FORMATS, LEAST_OUTPUT, MESSAGES, RESPONSES
from orchestrator.gateway.meter import LONGEST
from orchestrator.gateway.scripted import Always, Call, Fail, Say, ShellScript
from orchestrator.gateway.upstream import Upstream
from states.events import Share, Usage

ESSAY = "x" * 4 * 100_000
FIELDS = {
    "openai-chat": "max_tokens",
    "openai-responses": "max_output_tokens",
    "anthropic-messages": "max_tokens",
}


NONE = Budgets()


def limited(bench, rollout=NONE, *, roles=None, upstream=None, **limits):
    """A meter of this bench with these budgets, for the roles a and b."""
    given = Limits(rollout=rollout, roles=roles or {"a": Budgets(), "b": Budgets()}, **limits)
    bench.meter = bench.gateway.open("r2", upstream=upstream or bench.upstream, sink=bench.lines.append, limits=given)
    return bench.meter


def most(bench, number=-1):
    """The output limit with which the provider was asked."""
    call = bench.provider.calls[number]
    return FORMATS[call.api].output_limit(call.request)


# --- refused ----------------------------------------------------------------------------------------------------


@both
@every_api
def test_a_call_begun_after_the_budget_is_spent_is_refused(api, stream):
    """Nobody is called; it is written down as refused, adds to no sum, and is no failure of the provider's."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            meter = limited(bench, Budgets(tokens=10))
            status, _ = await bench.post(api, request(api, stream=stream), meter.key_for("a"))
            assert status == 200
            used = await meter.settle()
            assert used.tokens > 10
            status, raw = await bench.post(api, request(api, stream=stream), meter.key_for("b"))
            assert status == FORMATS[api].refusal
            said = json.loads(raw)["error"]
            assert said["type"] == "billing_error"
            assert said["message"].startswith(f"the rollout's budget of 10 tokens is spent ({used.tokens})")
            assert await meter.settle() == used == bench.provider.usage
            assert meter.provider_failure() is None
            assert meter.error is None
            assert len(bench.provider.calls) == 1
            assert [line["via"] for line in bench.lines] == ["passthrough", "refused"]
            assert (bench.lines[1]["usage"], bench.lines[1]["status"]) == (None, FORMATS[api].refusal)
            assert "is spent" in bench.lines[1]["error"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        ({"rollout": Budgets(tokens=10)}, "aaccd"),
        ({"scene": Budgets(tokens=10)}, "aacc"),
        ({"roles": {"a": Budgets(tokens=10), "c": Budgets()}}, "aa"),
        ({"directors": {"d": Budgets(tokens=10)}}, ""),
    ],
    ids=["rollout", "scene", "role", "director"],
)
def test_each_budget_refuses_those_for_whom_it_holds(limits, refused):
    """A role's is its own, a scene's is of its roles, and a director spends of the rollout's and of its own."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            meter = limited(bench, **{"roles": {"a": Budgets(), "c": Budgets()}} | limits)
            await bench.post("openai-chat", request("openai-chat"), meter.key_for("a"))
            answers = {}
            for role in "aaccd":
                status, _ = await bench.post("openai-chat", request("openai-chat"), meter.key_for(role))
                answers[role] = status
            assert {role for role, status in answers.items() if status != 200} == set(refused)

    asyncio.run(scenario())


def test_the_budget_of_a_turn_holds_for_what_is_begun_in_it():
    """The next turn of the same role has its own; what the role did before its turns is of none of them."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            meter = limited(bench)

            async def call():
                return (await bench.post("openai-chat", request("openai-chat"), meter.key_for("a")))[0]

            assert await call() == 200
            meter.turn_began("a", 1, Budgets(tokens=10))
            assert [await call(), await call()] == [200, 400]
            meter.turn_began("a", 2, Budgets())
            assert [await call(), await call()] == [200, 200]
            shares = {(share.role, share.turn): share.usage.calls for share in meter.shares()}
            assert shares == {("a", 0): 1, ("a", 1): 1, ("a", 2): 2}
            assert [line["turn"] for line in bench.lines] == [0, 1, 1, 2, 2]

    asyncio.run(scenario())


def test_a_late_call_is_of_the_turn_in_which_it_began_and_of_the_role_whose_key_it_came_with():
    """It ends when somebody else works, and is not counted for that one."""

    async def scenario():
        async with Bench(Always(Say(WORDS, delay=0.2))) as bench:
            meter = limited(bench)
            meter.turn_began("a", 1, Budgets())
            late = asyncio.create_task(bench.post("openai-chat", request("openai-chat"), meter.key_for("a")))
            while not bench.provider.calls:  # noqa: ASYNC110 - a list is what the provider offers
                await asyncio.sleep(0.001)
            meter.turn_began("b", 2, Budgets())
            bench.provider.script = Always(Say(WORDS))
            await bench.post("openai-chat", request("openai-chat"), meter.key_for("b"))
            assert meter.shares() == (Share("b", 2, bench.provider.calls[1].usage),)
            await late
            assert set(meter.shares()) == {
                Share("a", 1, bench.provider.calls[0].usage),
                Share("b", 2, bench.provider.calls[1].usage),
            }
            assert meter.usage() == bench.provider.usage

    asyncio.run(scenario())


def test_a_call_that_is_refused_does_not_hide_what_the_provider_said_before():
    """A failure stays the last word until a call succeeds."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            meter = limited(bench, Budgets(tokens=10))
            key = meter.key_for("a")
            slow = asyncio.create_task(bench.post("openai-chat", request("openai-chat"), key))
            await slow
            meter._last_failure = 503, "HTTP 503: out of order"
            assert (await bench.post("openai-chat", request("openai-chat"), key))[0] == 400
            assert meter.provider_failure() == "HTTP 503: out of order"

    asyncio.run(scenario())


# --- lowered ----------------------------------------------------------------------------------------------------


@both
@every_api
def test_a_call_may_write_what_is_left_and_overshoots_by_its_input_alone(api, stream):
    """A model that would write for ever stops where the budget does; what went in is all that is too much."""

    async def scenario():
        async with Bench(Always(Say(ESSAY))) as bench:
            meter = limited(bench, Budgets(tokens=700))
            asked = {"max_tokens": 50_000} if api == "anthropic-messages" else {}
            await bench.post(api, request(api, stream=stream) | asked, meter.key_for("a"))
            used = await meter.settle()
            assert used.output_tokens == most(bench) == 700
            assert used.tokens - 700 == used.input_tokens
            assert bench.lines[0]["lowered_to"] == 700
            assert used == bench.provider.usage

    asyncio.run(scenario())


@every_api
def test_a_limit_that_is_low_enough_stays_and_so_do_the_bytes(api):
    """Budgets that are far away change nothing."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            meter = limited(bench, Budgets(tokens=10_000_000, cost=1_000.0))
            body = request(api, **({} if api == "anthropic-messages" else {FIELDS[api]: 900})) | {"model": "scripted"}
            await bench.post(api, body, meter.key_for("a"))
            assert bench.provider.calls[0].request == body
            assert bench.lines[0]["lowered_to"] is None

    asyncio.run(scenario())


def test_a_budget_of_cost_lowers_by_the_price_of_output():
    """A cent buys so many tokens, and a call that is begun within it overspends by what its input costs."""

    async def scenario():
        async with Bench(Always(Say(ESSAY))) as bench:
            meter = limited(bench, Budgets(cost=0.01))
            await bench.post("openai-chat", request("openai-chat"), meter.key_for("a"))
            used = await meter.settle()
            assert most(bench) == int(0.01 / PRICES.output)
            assert used.cost - 0.01 <= PRICES.cost(attrs.evolve(used, output_tokens=0))
            assert (await bench.post("openai-chat", request("openai-chat"), meter.key_for("a")))[0] == 400

    asyncio.run(scenario())


def test_a_budget_of_cost_and_a_model_that_costs_nothing_do_not_meet():
    """There is no price by which to lower, and nothing is ever spent."""

    async def scenario():
        async with Bench(Always(Say(WORDS)), prices=attrs.evolve(PRICES, input=0.0, output=0.0)) as bench:
            free = attrs.evolve(bench.upstream, prices=type(PRICES)(0.0, 0.0))
            meter = limited(bench, Budgets(cost=0.01), upstream=free)
            for _ in range(2):
                assert (await bench.post("openai-chat", request("openai-chat"), meter.key_for("a")))[0] == 200
            assert most(bench) is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("left", "max_output", "asked"),
    [(LONGEST - 1, None, LONGEST - 1), (LONGEST, None, None), (5_000, 4_000, None), (3_000, 4_000, 3_000)],
)
def test_a_call_without_a_limit_gets_one_only_where_the_model_could_write_more(left, max_output, asked):
    """A provider refuses a limit above what its model can write, so none is set that is not needed."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            upstream = attrs.evolve(bench.upstream, max_output=max_output)
            meter = limited(bench, Budgets(tokens=left), upstream=upstream)
            await bench.post("openai-chat", request("openai-chat"), meter.key_for("a"))
            assert most(bench) == asked

    asyncio.run(scenario())


def test_what_is_left_is_never_less_than_a_provider_takes():
    """Sixteen tokens are the lowest limit there is: with one left, fifteen more can be written."""

    async def scenario():
        async with Bench(Always(Say(ESSAY))) as bench:
            meter = limited(bench, Budgets(tokens=1))
            for api in FORMATS:
                meter.turn_began("a", 1, Budgets())
                meter._used.clear()
                await bench.post(api, request(api), meter.key_for("a"))
                assert most(bench) == LEAST_OUTPUT

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ({"max_tokens": 50}, {"max_tokens": 40}),
        ({"max_completion_tokens": 50}, {"max_completion_tokens": 40}),
        ({"max_completion_tokens": 20, "max_tokens": 60}, {"max_completion_tokens": 20, "max_tokens": 40}),
        ({"n": 2}, {"n": 2, "max_tokens": 20}),
        ({"n": 2, "max_tokens": 30}, {"n": 2, "max_tokens": 20}),
        ({"n": "two", "max_tokens": True}, {"n": "two", "max_tokens": 40}),
        ({"n": 1, "best_of": 1.5, "max_tokens": 30}, {"n": 1, "best_of": 1.5, "max_tokens": 20}),
        ({"max_tokens": -1, "max_completion_tokens": "9999"}, {"max_tokens": 40, "max_completion_tokens": 40}),
    ],
)
def test_a_chat_says_its_limit_in_one_of_two_words_and_for_each_choice(body, after):
    assert CHAT.limited(body, 40) == after


def test_what_a_chat_wants_is_for_all_its_choices_together():
    assert CHAT.output_limit({"n": 3, "max_tokens": 10, "max_completion_tokens": 20}) == 30
    assert CHAT.output_limit({"max_tokens": "10"}) is None
    assert CHAT.output_limit({"max_tokens": -1}) is None
    assert RESPONSES.output_limit({"max_output_tokens": 0}) is None
    assert RESPONSES.output_limit({"max_output_tokens": 7}) == 7
    assert MESSAGES.output_limit({"max_tokens": 0}) == 0


def test_openai_itself_has_dropped_the_older_word():
    """It refuses `max_tokens` for its newer models; other servers may not know another."""
    assert Upstream("m", "https://api.openai.com/v1", ["openai-chat"]).chat_limit == "max_completion_tokens"
    assert Upstream("m", "http://127.0.0.1:1", ["openai-chat"]).chat_limit == "max_tokens"
    assert CHAT.limited({}, 40, "max_completion_tokens") == {"max_completion_tokens": 40}


EDITS = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}, {"type": "clear_tool_uses_20250919"}]}


@pytest.mark.parametrize(
    ("thinking", "left", "after"),
    [
        ({"type": "enabled", "budget_tokens": 30_000}, 10_000, {"type": "enabled", "budget_tokens": 5_000}),
        ({"type": "enabled", "budget_tokens": 2_000}, 10_000, {"type": "enabled", "budget_tokens": 2_000}),
        ({"type": "enabled", "budget_tokens": 30_000}, 1_500, {"type": "enabled", "budget_tokens": 1_024}),
        ({"type": "enabled", "budget_tokens": 30_000}, 1_024, {"type": "disabled"}),
        ({"type": "adaptive"}, 100, {"type": "adaptive"}),
    ],
)
def test_thinking_stays_below_the_output_limit_or_is_left_out(thinking, left, after):
    """Anthropic wants at least 1,024 tokens of it, below the limit; without it there is none to clear either."""
    body = MESSAGES.limited({"max_tokens": 32_000, "thinking": thinking, "context_management": EDITS}, left)
    assert (body["max_tokens"], body["thinking"]) == (left, after)
    assert (len(body["context_management"]["edits"]) == 1) == (after == {"type": "disabled"})


def test_without_thinking_no_empty_list_of_edits_is_left():
    body = {
        "thinking": {"type": "enabled", "budget_tokens": 2_000},
        "context_management": {"edits": EDITS["edits"][:1]},
    }
    assert MESSAGES.limited(body, 100) == {"max_tokens": 100, "thinking": {"type": "disabled"}}


# --- in parallel ------------------------------------------------------------------------------------------------


def test_a_call_that_would_be_cut_short_only_by_one_in_flight_waits_for_it():
    """The first may write all that is left, so the second begins when it is over, with what is left then."""

    async def scenario():
        async with Bench(Always(Say(WORDS, delay=0.1))) as bench:
            meter = limited(bench, Budgets(tokens=2_000))
            begun = []

            def script(_conversation):
                begun.append(len(bench.lines))
                return Say(WORDS, delay=0.1)

            bench.provider.script = script
            posts = [bench.post("openai-chat", request("openai-chat"), meter.key_for(role)) for role in "ab"]
            assert [status for status, _ in await asyncio.gather(*posts)] == [200, 200]
            assert begun == [0, 1]
            first = bench.provider.calls[0].usage
            assert (most(bench, 0), most(bench, 1)) == (2_000, 2_000 - first.tokens)

    asyncio.run(scenario())


def test_calls_that_fit_beside_each_other_do_not_wait():
    async def scenario():
        async with Bench(Always(Say(WORDS, delay=0.1))) as bench:
            meter = limited(bench, Budgets(tokens=2_000))
            begun = []

            def script(_conversation):
                begun.append(len(bench.lines))
                return Say(WORDS, delay=0.1)

            bench.provider.script = script
            body = request("openai-chat", max_tokens=900)
            posts = [bench.post("openai-chat", body, meter.key_for(role)) for role in "ab"]
            await asyncio.gather(*posts)
            assert begun == [0, 0]
            assert meter.usage() == bench.provider.usage

    asyncio.run(scenario())


@pytest.mark.parametrize("asked", [None, 100, 300, 5_000])
@pytest.mark.parametrize("limit", [300, 1_500, 5_000])
def test_twelve_calls_at_once_exceed_a_budget_by_their_inputs_at_most(asked, limit):
    """Whatever they ask for: what they write stays within it, and those that begin when it is spent are refused."""

    async def scenario():
        async with Bench(Always(Say(ESSAY, delay=0.01))) as bench:
            meter = limited(bench, Budgets(tokens=limit))
            body = request("openai-chat", **({} if asked is None else {"max_tokens": asked}))
            posts = [bench.post("openai-chat", body, meter.key_for("a")) for _ in range(12)]
            statuses = [status for status, _ in await asyncio.gather(*posts)]
            used = await meter.settle()
            inputs = [call.usage.input_tokens for call in bench.provider.calls]
            rounding = (LEAST_OUTPUT - 1) * len(inputs)
            assert used == bench.provider.usage
            assert statuses.count(200) == len(inputs) >= 1
            assert limit <= used.tokens <= limit + sum(inputs) + rounding or statuses.count(200) == 12
            assert used.output_tokens <= limit + rounding
            if asked is None:  # one at a time: nothing but the last one's input is too much
                assert used.tokens - limit <= inputs[-1] + LEAST_OUTPUT - 1

    asyncio.run(scenario())


def test_a_client_that_goes_while_its_call_waits_costs_nothing():
    """Nobody is asked on its behalf, and nothing is counted."""

    async def scenario():
        async with Bench(Always(Say(WORDS, delay=0.3)), drain_sec=0.05) as bench:
            meter = limited(bench, Budgets(tokens=2_000))
            first = asyncio.create_task(bench.post("openai-chat", request("openai-chat"), meter.key_for("a")))
            while not bench.provider.calls:  # noqa: ASYNC110 - a list is what the provider offers
                await asyncio.sleep(0.001)
            second = asyncio.create_task(bench.post("openai-chat", request("openai-chat"), meter.key_for("b")))
            while len(bench.gateway._tasks) < 2:  # noqa: ASYNC110 - a set is what the gateway has
                await asyncio.sleep(0.001)
            second.cancel()
            await asyncio.wait([second])
            await first
            assert await meter.settle() == bench.provider.usage
            assert meter.usage().calls == 1
            assert {line["via"] for line in bench.lines} == {"passthrough", "refused"}
            assert meter.provider_failure() is None

    asyncio.run(scenario())


def test_a_client_that_hangs_up_does_not_spend_for_nothing():
    """What it left is read to its end under a budget, and counted for who began it; nobody waits for that."""

    async def scenario():
        async with Bench(Always(Say(WORDS, delay=0.4)), drain_sec=0.05) as bench:
            meter = limited(bench, Budgets(tokens=2_000))
            left = asyncio.create_task(bench.post("openai-chat", request("openai-chat"), meter.key_for("a")))
            while not bench.provider.calls:  # noqa: ASYNC110 - a list is what the provider offers
                await asyncio.sleep(0.001)
            left.cancel()
            await asyncio.wait([left])
            while meter._inflight:  # noqa: ASYNC110 - until the patience of `settle` is over
                await asyncio.sleep(0.001)
            assert await meter.settle() == Usage()
            _, raw = await bench.post("openai-chat", request("openai-chat"), meter.key_for("b"))  # has to wait for it
            assert b"usage" in raw
            assert meter.usage() == bench.provider.usage
            assert meter.usage("a").calls == 1

    asyncio.run(scenario())


def test_a_key_that_comes_twice_is_read_once():
    """A provider that takes the first one would write without bound."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            meter = limited(bench, Budgets(tokens=1_000_000))
            header = {"Authorization": f"Bearer {meter.key_for('a')}"}
            body = '{"model": "scripted", "max_tokens": 999999, "messages": [], "max_tokens": 5}'
            url = bench.gateway.url + FORMATS["openai-chat"].path
            async with bench.client.post(url, data=body, headers=header) as answer:
                assert answer.status == 200
            assert bench.provider.calls[0].request == {"model": "scripted", "max_tokens": 5, "messages": []}
            assert bench.provider.usage.output_tokens <= 5

    asyncio.run(scenario())


def test_a_call_that_fails_sets_nothing_aside_any_more():
    """The next one has all that is left."""

    async def scenario():
        async with Bench(Always(Fail(500))) as bench:
            meter = limited(bench, Budgets(tokens=2_000))
            await bench.post("openai-chat", request("openai-chat"), meter.key_for("a"))
            bench.provider.script = ShellScript(COMMAND)
            await bench.post("openai-chat", request("openai-chat"), meter.key_for("a"))
            assert most(bench) == 2_000
            assert isinstance(bench.provider.calls[1].reply, Call)
            assert meter.usage() == bench.provider.usage

    asyncio.run(scenario())


def test_shares_add_up_to_the_sum():
    """By role and by turn, for calls that succeed, fail and are refused."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            meter = limited(bench, roles={"a": Budgets(), "b": Budgets(tokens=200)})
            for turn, role in enumerate("abab", 1):
                meter.turn_began(role, turn, Budgets())
                bench.provider.script = Always(Fail(503)) if turn == 3 else Always(Say(WORDS))
                for api in FORMATS:
                    await bench.post(api, request(api), meter.key_for(role))
            assert meter.usage() == bench.provider.usage
            assert sum((share.usage for share in meter.shares()), Usage()) == meter.usage()
            assert meter.usage("a") + meter.usage("b") == meter.usage()
            assert meter.usage("a").failed_calls == 3
            assert [line["via"] for line in bench.lines].count("refused") >= 3

    asyncio.run(scenario())
