"""The private MongoDB server: a real one, on real folders."""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pymongo
import pytest

from chatserver import mongod as mongod_module
from chatserver.errors import SetupError
from chatserver.mongod import Mongod
from chatserver.store import initiate_replica_set

pytestmark = pytest.mark.gen_test


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[tuple[Mongod, "pymongo.MongoClient[dict[str, Any]]"]]:
    mongod = Mongod(folder)
    uri = await mongod.start()
    try:
        await initiate_replica_set(uri, mongod.host)
        with pymongo.MongoClient[dict[str, Any]](uri, w="majority") as client:
            yield mongod, client
    finally:
        await mongod.stop()


def pid_on(folder: Path) -> int:
    return int((folder / "db" / "mongod.lock").read_text())


@pytest.mark.parametrize("name", ["data", "data with a space", "d" * 120])
async def test_data_is_there_after_a_restart(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    async with started(folder) as (first, client):
        client.db.things.insert_one({"_id": 1})
        first_host = first.host
    async with started(folder) as (second, client):
        assert client.db.things.count_documents({}) == 1
        assert client.admin.command("hello")["isWritablePrimary"]
        assert client.admin.command("hello")["primary"] == second.host != first_host


async def test_stale_server_of_a_killed_chatserver_is_ended(tmp_path: Path) -> None:
    """A chatserver that is killed lets go of its lock, and leaves its server behind."""
    killed = Mongod(tmp_path)
    uri = await killed.start()
    await initiate_replica_set(uri, killed.host)
    with pymongo.MongoClient[dict[str, Any]](uri, w="majority") as client:
        client.db.things.insert_one({"_id": 1})
    stale = pid_on(tmp_path)
    killed._release_folder()
    async with started(tmp_path) as (_, client):
        assert pid_on(tmp_path) != stale
        assert client.db.things.count_documents({}) == 1
        assert mongod_module._ended(stale)
    killed.kill()


async def test_another_process_with_that_number_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "mongod.lock").write_text(f"{os.getpid()}\n")
    async with started(tmp_path):
        pass


async def test_folder_in_use_is_refused_and_its_server_lives_on(tmp_path: Path) -> None:
    async with started(tmp_path) as (_, client):
        with pytest.raises(SetupError, match="in use by another chatserver"):
            await Mongod(tmp_path).start()
        assert client.admin.command("ping")["ok"]


async def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file/data cannot be used"):
        await Mongod(tmp_path / "file" / "data").start()


async def test_no_server_to_be_had_says_what_to_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongod_module, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError) as caught:
        await Mongod(tmp_path).start()
    assert "docker run" in str(caught.value) and "MONGODB_URI=mongodb://" in str(caught.value)


async def test_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "storage.bson").write_text("not a database")
    with pytest.raises(SetupError, match=r"(?s)does not start.*mongod\.log.*storage"):
        await Mongod(tmp_path).start()
    # The folder is free again.
    mongod = Mongod(tmp_path)
    mongod._take_folder()
    mongod._release_folder()


async def test_no_other_user_can_reach_it(tmp_path: Path) -> None:
    async with started(tmp_path) as (mongod, _):
        path = Path(mongod.host)
        assert path.is_socket() and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        opened = {os.readlink(link) for link in Path(f"/proc/{pid_on(tmp_path)}/fd").iterdir() if link.is_symlink()}
        for table in ("tcp", "tcp6"):
            listening = [line.split() for line in Path("/proc/net", table).read_text().splitlines() if " 0A " in line]
            assert not any(f"socket:[{fields[9]}]" in opened for fields in listening)
    assert not path.parent.exists()


async def test_everything_of_it_is_in_its_two_private_folders(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with started(folder) as (mongod, _):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        opened = {os.readlink(link) for link in Path(f"/proc/{pid_on(folder)}/fd").iterdir() if link.is_symlink()}
        files = {name for name in opened if name.startswith("/") and not name.startswith("/dev/")}
        assert files and all(Path(name).is_relative_to(folder) for name in files)
        # Number, ..., flags, type, state, inode, path: flags 10000 is a socket that listens.
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        sockets = [fields for fields in lines if len(fields) > 7 and f"socket:[{fields[6]}]" in opened]
        assert {fields[7] for fields in sockets if fields[3] == "00010000"} == {mongod.host}
        assert [each.name for each in Path(mongod.host).parent.iterdir()] == ["mongodb.sock"]


async def test_socket_folder_of_a_killed_chatserver_is_removed(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="chatserver-"))
    (folder / "mongodb.sock").write_text("")
    (tmp_path / "lock").write_text(str(folder))
    async with started(tmp_path):
        pass
    assert not folder.exists()


@pytest.mark.expects_log("lock is damaged and is written again; .*remove it")
@pytest.mark.parametrize("content", [b"\xff\xfe\0garbage", b"\0" * 4096, b"{other}", b"chatserver-relative"])
async def test_damaged_lock_is_named_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, others = tmp_path / "data", [tmp_path / "other", tmp_path / "chatserver-relative"]
    for each in (folder, *others):
        each.mkdir()
    (folder / "lock").write_bytes(content.replace(b"{other}", os.fsencode(others[0])))
    mongod = Mongod(folder)
    await mongod.start()
    assert (folder / "lock").read_text() == str(Path(mongod.host).parent)
    assert all(each.is_dir() for each in others)
    mongod.kill()
    await mongod.stop()


@pytest.mark.parametrize("name", ["lock", "mongod.log", "mongod.log.1", "db"])
async def test_file_of_ours_that_is_something_else_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if name == "db":
        (folder / "db").write_text("")
    else:
        (folder / "mongod.log").write_text("")
        (folder / name).unlink(missing_ok=True)
        (folder / name / "x").mkdir(parents=True)
    if name == "mongod.log":
        # A log of an earlier run is moved away, but never onto a path that is not a file.
        (folder / "mongod.log.1").write_text("")
    with pytest.raises(SetupError, match=rf"data cannot be used: .*{folder / name}.*: .*; repair or move that file"):
        await Mongod(folder).start()


async def test_folder_that_cannot_be_locked_is_not_reported_as_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))  # a network's file system without locks

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SetupError, match="cannot be used: No locks available; choose another folder"):
        await Mongod(tmp_path).start()


async def test_folder_that_is_a_loop_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SetupError, match="loop cannot be used"):
        await Mongod(tmp_path / "loop").start()


async def test_no_temporary_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no")[-50:])
    with pytest.raises(SetupError, match="No such file or directory"):
        await Mongod(tmp_path / "data").start()


async def test_temporary_folder_with_a_long_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("d" * 120)))
    async with started(tmp_path) as (mongod, _):
        assert mongod.host.startswith("/tmp/")


async def test_library_that_is_missing_is_named_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "mongod"
    program.write_text(
        "#!/bin/sh\necho 'mongod: error while loading shared libraries: libssl.so.3: no' >&2\nexit 127\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(mongod_module, "find_mongod", lambda: str(program))
    with pytest.raises(SetupError, match=r"(?s)exit code 127.*libssl\.so\.3.*apt-get install libssl3.*docker run"):
        await Mongod(tmp_path).start()


@pytest.mark.expects_log("private MongoDB server has exited \\(-9\\) and is restarted")
async def test_server_that_is_killed_is_started_again(tmp_path: Path) -> None:
    async with started(tmp_path) as (mongod, client):
        client.db.things.insert_one({"_id": 1})
        killed = pid_on(tmp_path)
        os.kill(killed, signal.SIGKILL)
        keeping = asyncio.create_task(mongod.keep_running())
        try:
            async with asyncio.timeout(20):
                while True:
                    await asyncio.sleep(0.1)
                    with contextlib.suppress(pymongo.errors.ConnectionFailure):
                        if (await asyncio.to_thread(client.admin.command, "hello"))["isWritablePrimary"]:
                            break
        finally:
            keeping.cancel()
        assert client.db.things.count_documents({}) == 1 and pid_on(tmp_path) != killed


async def test_server_that_hangs_is_ended_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongod_module, "_STOP_S", 0.3)
    mongod = Mongod(tmp_path)
    await mongod.start()
    pid = pid_on(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    await asyncio.wait_for(mongod.stop(), 10)
    assert mongod_module._ended(pid) and time.monotonic() - began < 5
