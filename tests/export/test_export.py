"""What holds for every export: any rollout, whole files, sentences for mistakes, no secret."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from export_cases import KEY

from orchestrator import ConfigError, cli
from orchestrator.cli import looking
from orchestrator.export import FORMATS, document, export, files_of, recorded
from orchestrator.export.recorded import Act
from states.errors import JournalError
from states.events import Usage


def named(to):
    """A name that its readers will open."""
    return f"out{FORMATS[to].suffix}"


every_format = pytest.mark.parametrize("to", FORMATS)


@pytest.fixture
def rollout(tmp_path, capfd, monkeypatch):
    """A command in this process, in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return code, said.out, said.err

    return go


# --- every rollout, in every format --------------------------------------------------------------------------------


@every_format
def test_every_rollout_can_be_exported_and_says_what_it_is(to, cases):
    """Each way out, each moment of a kill: the document is JSON and names the state in which the rollout stands."""
    for name, case in cases.items():
        whole = b"".join(files_of(case.folder, to).values())
        state = recorded(case.folder).result.state
        assert state.encode() in whole, name


@every_format
def test_no_export_holds_a_secret(to, cases):
    """The provider's key and the rollout's own are in no file, whatever agents were given."""
    for case in cases.values():
        whole = b"".join(files_of(case.folder, to).values())
        assert KEY.encode() not in whole
        assert b"sk-rollout-" not in whole


@every_format
def test_an_export_is_the_same_each_time(to, two_roles):
    """A fold: no clock, no random id."""
    assert files_of(two_roles.folder, to) == files_of(two_roles.folder, to)


@every_format
def test_what_is_written_is_the_document(to, two_roles, tmp_path):
    written = export(two_roles.folder, to, tmp_path / named(to))
    for name, data in files_of(two_roles.folder, to).items():
        assert (written / name).read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == [named(to)], "no draft is left"


def test_a_rollout_that_was_read_once_can_be_exported_many_times(two_roles):
    read = recorded(two_roles.folder)
    assert recorded(read) is read
    assert document(read, "atif") == document(two_roles.folder, "atif")


# --- mistakes ------------------------------------------------------------------------------------------------------


@every_format
def test_nothing_is_overwritten(to, one_role, tmp_path):
    """Not a file, not a folder, not a link that leads nowhere; and what was there is as it was."""
    file, folder, link = (tmp_path / f"{name}{FORMATS[to].suffix}" for name in ("file", "folder", "link"))
    file.write_text("mine")
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    for path in (file, folder, link):
        with pytest.raises(ConfigError, match=f"{path.name} is there already, and an export overwrites nothing"):
            export(one_role.folder, to, path)
    assert file.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@every_format
def test_a_place_that_cannot_be_written_is_a_sentence(to, one_role, tmp_path):
    with pytest.raises(ConfigError, match=rf"none/{named(to)} cannot be written: No such file or directory"):
        export(one_role.folder, to, tmp_path / "none" / named(to))


def test_a_name_that_its_readers_would_not_open_is_a_sentence(one_role, tmp_path):
    """Inspect tells a log by its name, and would take `.eval` for an archive."""
    with pytest.raises(ConfigError, match=r"log\.eval: whoever reads inspect goes by .* end with \.json"):
        export(one_role.folder, "inspect", tmp_path / "log.eval")


@every_format
def test_a_folder_without_a_rollout_is_a_sentence(to, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no rollout: there is no journal\.jsonl in it"):
        document(tmp_path, to)


@pytest.mark.parametrize("file", ["journal.jsonl", "trajectory.jsonl", "llm.jsonl"])
def test_a_file_that_is_no_record_is_a_sentence_that_shows_it(file, one_role, tmp_path):
    for name in ("journal.jsonl", "trajectory.jsonl", "llm.jsonl"):
        text = (one_role.folder / name).read_text()
        (tmp_path / name).write_text(text + '{"odd": "line"}\n' if name == file else text)
    with pytest.raises(JournalError, match=r"odd|lacks"):
        document(tmp_path, "atif")


def test_a_format_that_there_is_not_is_a_sentence(one_role):
    with pytest.raises(ConfigError, match="no export format 'csv'; there are atif"):
        document(one_role.folder, "csv")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_knows_the_formats_of_the_library():
    assert tuple(FORMATS) == looking.EXPORTS
    help_text = cli.cli.commands["export"].help
    assert all(name in help_text for name in FORMATS)


def test_the_readme_lists_the_formats_that_there_are():
    """In its table, in the order of the command's help."""
    table = (Path(__file__).parents[2] / "README.md").read_text().partition("| `--to` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == list(FORMATS)


@every_format
def test_the_command_writes_to_a_file_or_to_stdout(to, one_role, rollout, tmp_path):
    """A folder has to be named; everything else can go down a pipe."""
    code, out, err = rollout("export", one_role.folder, "--to", to)
    if FORMATS[to].kind == "folder":
        assert (code, out) == (2, "")
        assert f"{to} is a folder: give -o" in err
    else:
        assert (code, err, out.encode()) == (0, "", files_of(one_role.folder, to)["."])
    code, out, err = rollout("export", one_role.folder, "--to", to, "-o", named(to))
    assert (code, out, err) == (0, f"wrote {named(to)}\n", "")
    assert (tmp_path / named(to)).exists()
    code, out, err = rollout("export", one_role.folder, "--to", to, "-o", named(to), "--json")
    assert code == 2
    assert "is there already" in json.loads(out)["error"]["message"]


def test_a_folder_of_rollouts_is_told_from_a_rollout(one_role, rollout):
    """A format of lines has one for each; any other wants one rollout."""
    code, out, _ = rollout("export", one_role.folder.parent, "--to", "verifiers-jsonl")
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == [
        "one_role",
        "two_roles",
        "void",
        "unverified",
        "led",
    ]
    code, _, err = rollout("export", one_role.folder.parent, "--to", "atif")
    assert code == 2
    assert "holds no rollout" in err


# --- steps and model calls, brought together -----------------------------------------------------------------------


def test_the_usage_of_acts_is_the_usage_of_the_rollout(cases):
    """To the token and the cent, in every metered rollout; and it is what the provider counted."""
    for name in ("one_role", "two_roles", "void", "unverified", "led"):
        read = recorded(cases[name].folder)
        used = sum((act.usage for turn in read.turns for act in turn.acts), Usage())
        beside = sum((call.counted for call in read.other_calls), Usage())
        assert used + beside == read.result.usage.total == cases[name].provider, name
        assert (beside.calls > 0) == (name == "led")


def test_a_directors_calls_belong_to_no_turn(cases):
    """Its role takes none; its usage is there beside that of the turns."""
    read = recorded(cases["led"].folder)
    assert {call.role for call in read.other_calls} == {"user"}
    assert [turn.role for turn in read.turns] == ["coder"]
    final = document(cases["led"].folder, "atif")["final_metrics"]
    assert final["extra"]["outside_turns"]["calls"] == len(read.other_calls) == 2
    (line,) = document(cases["led"].folder, "verifiers-jsonl")
    assert [trace["agent"]["name"] for trace in line["traces"]] == ["coder", "user"]


def test_each_act_is_one_model_call(two_roles):
    """Tools that follow one another without a word between are told apart by the calls that asked for them."""
    turns = recorded(two_roles.folder).turns
    assert [turn.role for turn in turns] == ["coder", "reviewer", "coder"]
    told = [[(len(act.calls), len(act.tools), act.said) for act in turn.acts] for turn in turns]
    coder = [(1, 1, ""), (1, 1, ""), (1, 0, "Done.")]
    assert told == [coder, [(1, 1, ""), (1, 0, "It is <b>right</b>.")], coder]


def test_a_call_belongs_to_the_turn_of_its_role_in_which_it_was_made(two_roles):
    for turn in recorded(two_roles.folder).turns:
        assert {call.role for call in turn.calls} == {turn.role}
        assert all(turn.began <= call.began <= turn.ended for call in turn.calls)


def test_a_tool_call_has_the_name_and_arguments_that_its_model_gave(one_role):
    act = recorded(one_role.folder).turns[0].acts[0]
    assert (act.tool_name(act.tools[0]), act.tool_arguments(act.tools[0])) == ("bash", {"command": "make it"})


def test_calls_that_no_step_shows_are_lost_nowhere(cases):
    """Every call failed and nothing was said: the turn has one act, which holds them."""
    read = recorded(cases["void"].folder)
    (act,) = (entry for turn in read.turns for entry in turn.entries if isinstance(entry, Act))
    assert act.calls == read.calls
    assert act.usage.failed_calls == len(read.calls) > 0


def test_an_export_reads_a_folder_that_may_not_be_written(one_role, tmp_path):
    """Nothing is written beside the journal."""
    before = {path: path.stat().st_mtime_ns for path in one_role.folder.rglob("*")}
    for to in FORMATS:
        files_of(one_role.folder, to)
    assert {path: path.stat().st_mtime_ns for path in one_role.folder.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []
