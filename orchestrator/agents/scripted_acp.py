"""A scripted ACP agent that needs no model: `python3 scripted_acp.py SCRIPT.json`, on the standard library alone.

What it does is data, so that a task, a demo or a test can have an agent that behaves exactly so, well or badly:

    {"turns": [[{"think": "a file is missing"}, {"shell": "echo hi > hello.txt"}, {"say": "done"}]]}

`turns` holds a list of actions for each prompt (the last list serves every further prompt). Other keys, all optional:
`start` (actions before it reads anything), `initialize`, `session`, `load` and `close` (each a list of actions before
the answer, which `{"reply": ...}`, `{"error": ...}` or `{"silent": true}` replaces), `capabilities`, `modes`,
`config_options`, `history` (updates that session/load replays), `ignore_eof`. An action is an object with one of:

    say, think          text; "chunks": n cuts it, "id" is its messageId; `$last` is the client's last answer as JSON
    shell               run a command and show it as a tool call; "via": "terminal" runs it in the client's terminal,
                        "ask": true asks permission first and does not run what is refused
    tool, tool_update   a tool call by its id, with the other keys as its fields
    permission, elicit  ask: {"title", "options"}, or {"message", "schema"}
    request, notify     any method, with "params"; the session's id is added to a request's
    update              any session update
    line, noise         raw text on stdout, or n lines of chatter that is no protocol
    flood, huge         n updates of "text"; one message of n bytes on one line
    sleep, wait_cancel  n seconds, or until session/cancel comes; both end at once when it comes
    ignore_cancel       from here on session/cancel changes nothing
    on_cancel, late     actions after session/cancel and before the answer; actions after the answer
    cancel_after        of a request: take it back with $/cancel_request after n seconds
    stderr, spawn       text on stderr; a command that is left behind
    die, signal, hang   exit with a code, end by a signal, do nothing for ever (a cancel included)
    close_stdout        close stdout and stay
    stop, usage         the stop reason, and the usage to report, of the turn's answer
    reply, error        another result, or an error, as the answer; "reply_line" is a raw line with `$id` for the id
    silent              do not answer at all
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module itself takes longer to import than this agent needs for its turn
    from typing import Any

    Json = dict[str, Any]

OPTIONS = [
    {"optionId": "allow", "name": "Allow", "kind": "allow_once"},
    {"optionId": "reject", "name": "Reject", "kind": "reject_once"},
]


def hang() -> None:
    """Do nothing for ever."""
    while True:
        time.sleep(60)


class Cancelled(Exception):
    """session/cancel came."""


class Reply:
    """How the request at hand will be answered."""

    def __init__(self, request_id: Any, result: Json) -> None:
        self.id, self.result = request_id, result
        self.error: Json | None = None
        self.raw: str | None = None
        self.silent = False
        self.late: list[Json] = []
        self.on_cancel: list[Json] = []


class Agent:
    """One process, one session."""

    def __init__(self, script: Json) -> None:
        self.script = script
        self.session, self.cwd, self.prompts = "scripted-1", os.getcwd(), 0  # noqa: PTH109
        self.last: Any = None
        self.ids, self.writing = itertools.count(1000), threading.Lock()
        self.answers: dict[int, queue.Queue[Json]] = {}
        self.cancelled, self.deaf = threading.Event(), threading.Event()

    # -- the wire

    def _write(self, text: str) -> None:
        data = text.encode()
        with self.writing:
            while data:
                data = data[os.write(1, data) :]

    def _send(self, message: Json) -> None:
        self._write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")

    def _update(self, update: Json) -> None:
        self._send({"method": "session/update", "params": {"sessionId": self.session, "update": update}})

    def _request(self, method: str, params: Json, cancel_after: float | None = None) -> Any:
        """Ask the client and wait; returns its result, or {"error": ...}."""
        number = next(self.ids)
        self.answers[number] = queue.Queue()
        self._send({"id": number, "method": method, "params": {"sessionId": self.session, **params}})
        if cancel_after is not None:
            time.sleep(cancel_after)
            self._send({"method": "$/cancel_request", "params": {"requestId": number}})
        message = self.answers[number].get()
        self.last = message.get("result", {"error": message.get("error")})
        return self.last

    def serve(self) -> None:
        """Answer requests until stdin ends."""
        self._perform(self.script.get("start", []), Reply(None, {}))
        for line in sys.stdin:
            message = json.loads(line)
            if "method" not in message:
                if message.get("id") in self.answers:
                    self.answers[message["id"]].put(message)
            elif message["method"] == "session/cancel":
                self.cancelled.set()
            elif message["method"] == "session/prompt":
                self.cancelled.clear()
                threading.Thread(target=self._turn, args=(message,), daemon=True).start()
            elif "id" in message:
                self._answer(message)
        if self.script.get("ignore_eof"):
            hang()

    # -- requests of the client

    def _answer(self, message: Json) -> None:
        method, params = message["method"], message.get("params") or {}
        name = {"session/new": "session"}.get(method, method.rpartition("/")[2])
        reply = Reply(message["id"], {})
        if method == "initialize":
            reply.result = self._initialized()
        elif method in ("session/new", "session/load"):
            self.cwd = params["cwd"]
            self.session = params.get("sessionId", self.session)
            reply.result = {"sessionId": self.session} if method == "session/new" else {}
            reply.result.update(self._offered())
            for update in self.script.get("history", []) if method == "session/load" else []:
                self._update(update)
        elif method == "session/set_config_option":
            for option in self.script.get("config_options", []):
                if option["id"] == params["configId"]:
                    option["currentValue"] = params["value"]
            reply.result = {"configOptions": self.script.get("config_options", [])}
        elif method not in ("authenticate", "session/set_mode", "session/close"):
            reply.error = {"code": -32601, "message": f"no {method}"}
        self._perform(self.script.get(name, []), reply)
        self._finish(reply)

    def _initialized(self) -> Json:
        defaults = {"loadSession": "history" in self.script, "sessionCapabilities": {"close": {}}}
        return {
            "protocolVersion": 1,
            "agentCapabilities": self.script.get("capabilities", defaults),
            "agentInfo": {"name": "scripted-acp", "version": "1.0"},
            "authMethods": [],
        }

    def _offered(self) -> Json:
        found = {}
        if "modes" in self.script:
            modes = [{"id": mode, "name": mode} for mode in self.script["modes"]]
            found["modes"] = {"currentModeId": self.script["modes"][0], "availableModes": modes}
        if "config_options" in self.script:
            found["configOptions"] = self.script["config_options"]
        return found

    def _turn(self, message: Json) -> None:
        turns = self.script.get("turns", [[]])
        actions = turns[min(self.prompts, len(turns) - 1)]
        self.prompts += 1
        reply = Reply(message["id"], {"stopReason": "end_turn"})
        try:
            self._perform(actions, reply)
        except Cancelled:
            reply.result = {"stopReason": "cancelled"}
            with contextlib.suppress(Cancelled):
                self._perform(reply.on_cancel, reply)
        self._finish(reply)
        with contextlib.suppress(Cancelled):
            self._perform(reply.late, Reply(None, {}))

    def _finish(self, reply: Reply) -> None:
        if reply.raw is not None:
            self._write(reply.raw.replace("$id", json.dumps(reply.id)) + "\n")
        elif not reply.silent:
            self._send({"id": reply.id, **({"error": reply.error} if reply.error else {"result": reply.result})})

    # -- actions

    def _perform(self, actions: list[Json], reply: Reply) -> None:
        for action in actions:
            name = next(key for key in action if hasattr(self, f"_do_{key}"))
            getattr(self, f"_do_{name}")(action[name], action, reply)
            self._check()

    def _check(self) -> None:
        if self.cancelled.is_set() and not self.deaf.is_set():
            raise Cancelled

    def _message(self, kind: str, text: str, action: Json) -> None:
        text = text.replace("$last", json.dumps(self.last))
        size = -(-len(text) // action.get("chunks", 1)) or 1
        about = {"messageId": action["id"]} if "id" in action else {}
        for start in range(0, len(text), size):
            self._update(
                {"sessionUpdate": kind, "content": {"type": "text", "text": text[start : start + size]}, **about}
            )

    def _do_say(self, value: Any, action: Json, _reply: Reply) -> None:
        self._message("agent_message_chunk", value, action)

    def _do_think(self, value: Any, action: Json, _reply: Reply) -> None:
        self._message("agent_thought_chunk", value, action)

    def _do_tool(self, value: Any, action: Json, _reply: Reply) -> None:
        fields = {key: field for key, field in action.items() if key != "tool"}
        self._update({"sessionUpdate": "tool_call", "toolCallId": value, "title": value, **fields})

    def _do_tool_update(self, value: Any, action: Json, _reply: Reply) -> None:
        fields = {key: field for key, field in action.items() if key != "tool_update"}
        self._update({"sessionUpdate": "tool_call_update", "toolCallId": value, **fields})

    def _do_update(self, value: Any, _action: Json, _reply: Reply) -> None:
        self._update(value)

    def _do_shell(self, value: Any, action: Json, _reply: Reply) -> None:
        call = f"call_{next(self.ids)}"
        about = {"title": value, "kind": "execute", "rawInput": {"command": value}}
        self._update({"sessionUpdate": "tool_call", "toolCallId": call, "status": "in_progress", **about})
        if action.get("ask"):
            asked = {"toolCall": {"toolCallId": call, **about}, "options": OPTIONS}
            outcome = self._request("session/request_permission", asked).get("outcome", {})
            self._check()
            if outcome.get("optionId") != "allow":
                self._update({"sessionUpdate": "tool_call_update", "toolCallId": call, "status": "failed"})
                return
        output, code = self._in_terminal(value) if action.get("via") == "terminal" else self._run(value)
        content = [{"type": "content", "content": {"type": "text", "text": output}}]
        status = "completed" if code == 0 else "failed"
        about = {"status": status, "content": content, "rawOutput": {"exit_code": code}}
        self._update({"sessionUpdate": "tool_call_update", "toolCallId": call, **about})

    def _run(self, command: str) -> tuple[str, int]:
        done = subprocess.run(  # noqa: S602 - running commands is what it is for
            command, shell=True, cwd=self.cwd, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        self.last = (done.stdout + done.stderr).decode("utf-8", "replace")
        return self.last, done.returncode

    def _in_terminal(self, command: str) -> tuple[str, int]:
        made = self._request("terminal/create", {"command": command, "cwd": self.cwd})
        if "terminalId" not in made:
            return json.dumps(made), 1
        code = self._request("terminal/wait_for_exit", made).get("exitCode")
        output = self._request("terminal/output", made).get("output", "")
        self._request("terminal/release", made)
        self.last = output
        return output, code

    def _do_permission(self, value: Any, _action: Json, _reply: Reply) -> None:
        call = {"toolCallId": value.get("id", "asked_1"), "title": value.get("title", "May I?")}
        self._request("session/request_permission", {"toolCall": call, "options": value.get("options", OPTIONS)})

    def _do_elicit(self, value: Any, _action: Json, _reply: Reply) -> None:
        form = {"mode": value.get("mode", "form"), "requestedSchema": value.get("schema", {"type": "object"})}
        self._request("elicitation/create", {"message": value["message"], **form})

    def _do_request(self, value: Any, action: Json, _reply: Reply) -> None:
        self._request(value, action.get("params", {}), action.get("cancel_after"))

    def _do_notify(self, value: Any, action: Json, _reply: Reply) -> None:
        self._send({"method": value, "params": action.get("params", {})})

    def _do_line(self, value: Any, _action: Json, _reply: Reply) -> None:
        self._write(value + "\n")

    def _do_noise(self, value: Any, _action: Json, _reply: Reply) -> None:
        self._write("".join(f"INFO chatter {number}\n" for number in range(value)))

    def _do_flood(self, value: Any, action: Json, _reply: Reply) -> None:
        text = {"type": "text", "text": action.get("text", "word ")}
        update = {"sessionUpdate": "agent_message_chunk", "content": text}
        params = {"sessionId": self.session, "update": update}
        line = json.dumps({"jsonrpc": "2.0", "method": "session/update", "params": params}) + "\n"
        for start in range(0, value, 1000):
            self._write(line * min(1000, value - start))
            self._check()

    def _do_huge(self, value: Any, action: Json, _reply: Reply) -> None:
        self._message("agent_message_chunk", "x" * value, action)

    def _do_sleep(self, value: Any, _action: Json, _reply: Reply) -> None:
        if self.deaf.is_set():
            time.sleep(value)
        else:
            self.cancelled.wait(value)

    def _do_wait_cancel(self, _value: Any, _action: Json, _reply: Reply) -> None:
        self.cancelled.wait()

    def _do_ignore_cancel(self, _value: Any, _action: Json, _reply: Reply) -> None:
        self.deaf.set()

    def _do_on_cancel(self, value: Any, _action: Json, reply: Reply) -> None:
        reply.on_cancel = value

    def _do_late(self, value: Any, _action: Json, reply: Reply) -> None:
        reply.late = value

    def _do_stderr(self, value: Any, _action: Json, _reply: Reply) -> None:
        sys.stderr.write(value + "\n")
        sys.stderr.flush()

    def _do_spawn(self, value: Any, _action: Json, _reply: Reply) -> None:
        subprocess.Popen(value, shell=True, start_new_session=True)  # noqa: S602

    def _do_die(self, value: Any, _action: Json, _reply: Reply) -> None:
        os._exit(value)

    def _do_signal(self, value: Any, _action: Json, _reply: Reply) -> None:
        os.kill(os.getpid(), getattr(signal, value) if isinstance(value, str) else value)
        hang()

    def _do_hang(self, _value: Any, _action: Json, _reply: Reply) -> None:
        hang()

    def _do_close_stdout(self, _value: Any, _action: Json, _reply: Reply) -> None:
        os.close(1)
        hang()

    def _do_stop(self, value: Any, _action: Json, reply: Reply) -> None:
        reply.result["stopReason"] = value

    def _do_usage(self, value: Any, _action: Json, reply: Reply) -> None:
        reply.result["usage"] = value

    def _do_reply(self, value: Any, _action: Json, reply: Reply) -> None:
        reply.result = value

    def _do_reply_line(self, value: Any, _action: Json, reply: Reply) -> None:
        reply.raw = value

    def _do_error(self, value: Any, _action: Json, reply: Reply) -> None:
        reply.error = value

    def _do_silent(self, _value: Any, _action: Json, reply: Reply) -> None:
        reply.silent = True


def main() -> None:
    """Run the script that the command line names."""
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123
        script = json.load(file)
    with contextlib.suppress(BrokenPipeError):
        Agent(script).serve()


if __name__ == "__main__":
    main()
