"""Files of a sandbox seen from the host: what an agent may plant, and where a walk along it ends."""
# ruff: noqa: PTH208

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from orchestrator.sandboxes import _files
from orchestrator.sandboxes._files import Mount, Tree, remove
from states.errors import PathEscape, SandboxError


@pytest.fixture
def tree(tmp_path):
    """Two folders of a sandbox and one of the system."""
    for name in ("app", "other", "usr"):
        (tmp_path / name).mkdir()
    (tmp_path / "usr/tool").write_text("tool")
    (tmp_path / "outside").write_text("secret")
    return Tree(
        "box",
        (
            Mount("/app", str(tmp_path / "app")),
            Mount("/logs/agent", str(tmp_path / "other")),
            Mount("/usr", str(tmp_path / "usr"), writable=False),
        ),
    )


@pytest.fixture
def app(tmp_path, tree):
    """The folder behind `/app`."""
    return tmp_path / "app"


def test_a_file_keeps_its_name_in_a_folder_that_is_there(tree, app, tmp_path):
    """So whoever has a folder to copy to need not look first at what will come; what is neither is refused."""
    (app / "one").write_text("1")
    (app / "more").mkdir()
    (app / "more/two").write_text("2")
    os.mkfifo(app / "fifo")
    (tmp_path / "home").mkdir()
    out = os.open(tmp_path / "home", os.O_RDONLY)
    try:
        tree.give_out("/app/one", out, "")
        tree.give_out("/app/more", out, "")
        with pytest.raises(SandboxError, match="not a file or folder in sandbox box: /app/fifo"):
            tree.give_out("/app/fifo", out, "")
        with pytest.raises(SandboxError, match="swapped for another while we looked"):
            tree.give_out("/app/more", out, "one")
    finally:
        os.close(out)
    assert {path.name: path.read_text() for path in (tmp_path / "home").iterdir()} == {"one": "1", "two": "2"}


@pytest.mark.parametrize(
    "target",
    [
        "/etc/passwd",
        "../outside",
        "../../../../../../etc/passwd",
        "/app/../etc/passwd",
        "/logs/agent/x",
        "/usr/tool",
        "/",
    ],
)
def test_link_out_of_its_folder_is_an_escape(tree, app, tmp_path, target):
    """Whether it leads to the host, to another folder of the sandbox or to the system."""
    (tmp_path / "other/x").write_text("another folder's")
    (app / "link").symlink_to(target)
    with pytest.raises(PathEscape):
        tree.read("/app/link")
    with pytest.raises(PathEscape):
        tree.copy_out("/app/link", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["real", "../app/real", "/app/real", "./d/../real", "hop"])
def test_link_within_its_folder_is_followed(tree, app, target):
    """Relative or absolute, over several hops, and around."""
    (app / "real").write_text("yes")
    (app / "d").mkdir()
    (app / "hop").symlink_to("d/../real")
    (app / "link").symlink_to(target)
    assert tree.read("/app/link") == b"yes"


def test_agents_own_tree_lets_links_cross(tree, app, tmp_path):
    """A handle that is not confined follows links to whatever it sees, and to nothing else."""
    free = Tree("box", tree.mounts, confined=False)
    (app / "tool").symlink_to("/usr/tool")
    (app / "host").symlink_to("/etc/passwd")
    assert free.read("/app/tool") == b"tool"
    with pytest.raises(PathEscape):
        free.read("/app/host")


def test_links_in_circles_end(tree, app):
    """A loop of links is an escape, not a hang."""
    (app / "a").symlink_to("b")
    (app / "b").symlink_to("a")
    with pytest.raises(PathEscape, match="too many links"):
        tree.read("/app/a")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("relative", "absolute"),
        ("/app/x\0y", "NUL"),
        ("/app/missing", "/app/missing"),
        ("/etc/passwd", "there is /app, /logs/agent"),
        ("/logs", "/logs"),
        ("/app", "regular file"),
        ("/app/file/below", "/app/file/below"),
    ],
)
def test_path_that_is_no_file_is_named(tree, app, path, message):
    """Each mistake says what is wrong with which path."""
    (app / "file").write_text("x")
    with pytest.raises(SandboxError, match=message):
        tree.read(path)


def test_climbing_above_the_root_is_an_escape(tree):
    """`..` beyond the root is not quietly the root."""
    with pytest.raises(PathEscape):
        tree.read("/app/../../app/x")


def test_written_file_takes_the_place_of_a_link(tree, app, tmp_path):
    """What a planted link points to is never written through."""
    (app / "out").symlink_to(tmp_path / "outside")
    tree.write("/app/out", b"ours", 0o4755)
    assert (tmp_path / "outside").read_text() == "secret"
    assert not (app / "out").is_symlink()
    assert stat.S_IMODE((app / "out").stat().st_mode) == 0o755
    (app / "d").mkdir()
    with pytest.raises(SandboxError, match="/app/d"):
        tree.write("/app/d", b"", 0o644)
    assert sorted(path.name for path in app.iterdir()) == ["d", "out"]


def test_system_is_read_only(tree):
    """Its files can be read, not written."""
    assert tree.read("/usr/tool") == b"tool"
    with pytest.raises(SandboxError, match="read-only"):
        tree.write("/usr/tool", b"", 0o644)


def test_upload_replaces_what_is_in_the_way(tree, app, tmp_path):
    """A link or a file where a folder belongs gives way; folders merge; links come along as links."""
    source = tmp_path / "source"
    (source / "dir/sub").mkdir(parents=True)
    (source / "dir/sub/file").write_text("new")
    (source / "link").symlink_to("/etc/passwd")
    (app / "kept").write_text("kept")
    (app / "dir").symlink_to(tmp_path)
    tree.copy_in(source, "/app")
    assert (app / "dir/sub/file").read_text() == "new"
    assert not (app / "dir").is_symlink()
    assert (app / "link").readlink() == Path("/etc/passwd")
    assert (app / "kept").read_text() == "kept"
    assert not (tmp_path / "sub").exists()


def test_names_that_are_no_text_survive(tree, app, tmp_path):
    """Bytes that are not UTF-8 and newlines in names go down, up and away like any other."""
    names = [os.fsdecode(b"a\xff\n"), "-rf", "..."]
    for name in names:
        (app / name).write_text("x")
    tree.copy_out("/app", tmp_path / "home")
    tree.copy_in(tmp_path / "home", "/app/again")
    assert sorted(os.listdir(app / "again")) == sorted(names)
    remove(app)
    assert not app.exists()


def test_upload_of_a_file_into_a_folder_keeps_its_name(tree, app, tmp_path):
    """As `cp` does it: into a folder that is there, to the name where there is none."""
    (tmp_path / "script").write_text("x")
    tree.copy_in(tmp_path / "script", "/app")
    tree.copy_in(tmp_path / "script", "/app/new/name")
    assert (app / "script").read_text() == (app / "new/name").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SandboxError, match="neither a file nor a folder"):
        tree.copy_in(tmp_path / "pipe", "/app/pipe")


def test_download_keeps_only_links_that_cannot_lead_out(tree, app, tmp_path):
    """Also not in two steps, where each link by itself seems to stay inside."""
    (app / "a/b/c").mkdir(parents=True)
    (app / "a/b/c/up").symlink_to("../../..")
    (app / "two-steps").symlink_to("a/b/c/up/../../etc")
    (app / "out").symlink_to("../x")
    (app / "absolute").symlink_to("/app/a")
    (app / "fine").symlink_to("a/b")
    (app / "a/b/too").symlink_to("../../fine")
    tree.copy_out("/app", tmp_path / "home")
    links = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").rglob("*") if path.is_symlink()}
    assert links == {"fine", "a/b/too", "a/b/c/up"}


def test_download_of_a_sparse_file_costs_what_it_holds(tree, app, tmp_path):
    """A hole of a terabyte is a hole again; reading it into memory is refused."""
    with (app / "sparse").open("wb") as file:
        file.write(b"head")
        file.seek(1 << 40)
        file.write(b"tail")
    tree.copy_out("/app/sparse", tmp_path / "sparse")
    info = (tmp_path / "sparse").stat()
    assert info.st_size == (1 << 40) + 4
    assert info.st_blocks * 512 < 1 << 20
    with pytest.raises(SandboxError, match="download it instead"):
        tree.read("/app/sparse")


def test_download_of_a_nest_ends(tree, app, tmp_path):
    """Deeper than anybody works: an error, not a crash."""
    deep = app
    for _ in range(_files.MAX_DEPTH + 5):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with pytest.raises(SandboxError, match="nested deeper"):
        tree.copy_out("/app", tmp_path / "home")


def test_swapping_a_folder_for_a_link_never_wins(tree, app, tmp_path):
    """An agent that swaps while we read gets us to read its own file, or an error: never the host's."""
    (app / "dir").mkdir()
    (app / "dir/outside").write_text("own")
    (app / "evil").symlink_to(tmp_path)
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for one, two in (("dir", "kept"), ("evil", "dir"), ("dir", "evil"), ("kept", "dir")):
                (app / one).rename(app / two)

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        for _ in range(2000):
            try:
                seen.add(tree.read("/app/dir/outside"))
            except SandboxError as error:
                seen.add(type(error).__name__)
    finally:
        stop.set()
        thread.join()
    assert b"secret" not in seen
    assert seen <= {b"own", "PathEscape", "SandboxError"}


def test_walks_leak_no_file_descriptor(tree, app):
    """Neither those that end well nor those that do not."""
    (app / "d").mkdir()
    (app / "d/f").write_text("x")
    (app / "out").symlink_to("/etc")
    before = len(os.listdir("/proc/self/fd"))
    for path in ("/app/d/f", "/app/d/missing", "/app/out/passwd", "/app/d/../d/f", "/nowhere"):
        try:
            tree.read(path)
        except SandboxError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_remove_goes_below_what_has_a_path(tmp_path):
    """A nest of 3,000 folders, closed ones among them, is removed; what links lead to stays."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "kept").write_text("kept")
    (root / "link").symlink_to(tmp_path)
    here = os.open(root, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    (root / "closed").mkdir()
    (root / "closed/x").write_text("")
    (root / "closed").chmod(0)
    remove(root)
    remove(root)
    assert not root.exists()
    assert (tmp_path / "kept").read_text() == "kept"
