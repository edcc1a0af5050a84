"""``launch``: one reason is told, once, whichever process has it; nothing is left running. With a module that needs no torch."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pmpseg import processes
from pmpseg.errors import InputError
from pmpseg.processes import LOST, launch, launched

STUB = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1 + int(os.environ["RANK"])]
from pathlib import Path
Path(__file__).with_name(f"pid{rank}").write_text(str(os.getpid()))
print("rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
if what.startswith("late:"):
    time.sleep(0.3)
if what.startswith(("say:", "late:")):
    print("pmpseg: error: " + what.partition(":")[2], file=sys.stderr, flush=True)
    sys.exit(2)
if what == "hang":
    time.sleep(60)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what) if what.isdecimal() else 0)
"""


@pytest.fixture(autouse=True)
def stub(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(processes, "GRACE", 2.0)


def test_all_is_well(capfd):
    launch("stub", ["ok", "ok", "ok"], 3)
    assert capfd.readouterr().out == "rank 0 of 3\n"  # one process speaks


def test_rank_0_has_said_why(capfd):
    with pytest.raises(SystemExit) as ended:
        launch("stub", ["say:no such file", "say:no such file"], 2)
    assert ended.value.code == 2 and capfd.readouterr().err == "pmpseg: error: no such file\n"


@pytest.mark.parametrize("rank_0", ["hang", str(LOST)])
def test_another_ones_reason_is_told(rank_0, capfd):
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^process 1 of 2 failed: 5\.png has label 77$"):
        launch("stub", [rank_0, "say:5.png has label 77"], 2)
    assert time.monotonic() - began < 20 and capfd.readouterr().err == ""


@pytest.mark.parametrize("when", ["say", "late"])
def test_who_was_only_waiting_is_not_blamed(when):
    with pytest.raises(InputError, match=r"process 2 of 3 failed: no space"):
        launch("stub", [str(LOST), str(LOST), f"{when}:no space"], 3)


def test_who_is_lost_without_a_reason_is_told():
    with pytest.raises(InputError, match=r"process 0 of 2 failed: another one was lost"):
        launch("stub", [str(LOST), str(LOST)], 2)


@pytest.mark.parametrize(("args", "rank"), [(["killed", "hang"], 0), (["hang", "killed"], 1)])
def test_a_killed_process_is_told(args, rank, capfd):
    with pytest.raises(InputError, match=f"process {rank} of 2 failed: .*signal 9"):
        launch("stub", args, 2)


def test_ended_from_outside_it_leaves_nothing_running(tmp_path):
    code = "from pmpseg.processes import launch; launch('stub', ['hang', 'hang'], 2)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "rank 0 of 2\n"
    deadline = time.monotonic() + 20
    while len(pids := [path.read_text() for path in tmp_path.glob("pid*")]) < 2 or not all(pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == 143
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_launched(monkeypatch):
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launched()
    monkeypatch.setenv("RANK", "1")
    assert launched()
