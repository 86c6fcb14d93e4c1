"""A heartbeat between processes that work together: when one fails or falls silent, all end, with one sentence."""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from rlhf.errors import MissingProcessError, OtherProcessError, causes
from rlhf.files import is_main_process

TEMPORARY = MissingProcessError.status
EVERY = 1.0  # seconds between two beats
MINUTES = 10.0
GO_ON = "All processes are ended; --ckpt_path last resumes a training run from its last checkpoint."
GRACE = 5.0  # seconds that a process leaves another one to say what is wrong
DISK = ("torch/serialization.py", "safetensors/torch.py", "rlhf/files.py")  # who waits for a disk is not stuck
LIBRARIES = "/lib/python"  # in the paths of Python's own and of installed ones

Failure = dict[str, Any]  # rank, exit status, and ranks that must be killed


class Heartbeat:
    """Tells the other processes every second that this one lives and where it is, and looks at what they tell.

    It goes through the store of the process group, so over machines, too. A process that is stopped tells nothing. One
    that is stuck in a driver still does, but its main thread stays where it is while all others wait for it: that of no
    process moves. Time is counted in beats of this process, so it is no silence when all were stopped, or asleep.

    Args:
        rank, size: the number of this process, and how many there are.
        what: tells in a few words what this process does.
        minutes: how long a process may be silent, or all be stuck.
        children: other processes that this one has started, those of the next ranks.
    """

    def __init__(
        self, rank: int, size: int, what: Callable[[], str], minutes: float, children: Sequence[Any] = ()
    ) -> None:
        self.rank, self.what, self.children, self.minutes = rank, what, children, minutes
        self.patience = max(5, round(60 * minutes / EVERY))  # in beats
        self.keys = [str(number) for number in range(size)]
        self.store, self.own_store = _connect(), _connect()  # of the beats, and of the main thread
        self.silent = [0] * size  # of my beats, since the last one of each
        self.rounds = 0
        self.left = False  # what this process had to do is done
        self.others_left = threading.Event()
        self.lock = threading.Lock()  # nothing is told after having left
        self._main: Any = threading.main_thread().ident
        clock = getattr(time, "pthread_getcpuclockid", None)
        self._clock = clock and clock(self._main)
        self._seen: tuple[Any, float] = ((), 0.0)
        self._still = 0
        self.beats: list[dict[str, Any]] = [{} for _ in self.keys]
        self._exchange()
        for run in (self._beat, self._watch_store):
            threading.Thread(target=run, daemon=True, name="heartbeat").start()

    # ---------------------------------------------------------------------------------------------- telling and looking

    def _beat(self) -> None:
        try:
            while not self.others_left.is_set():
                self._round()
                self.rounds += 1
                self.others_left.wait(EVERY)
        except RuntimeError:  # the first process, which has the store and ends last, is gone
            if not (self.left or self.others_left.is_set()):
                if self.rank == 1:
                    _say(f"error: process 0 ({self._name(0)}) has ended without a word. {GO_ON}")
                _exit(TEMPORARY)

    def _exchange(self) -> None:
        """Tells where this process is, and reads what each has told last."""
        place, moves = self._place()
        self._still = 0 if moves else self._still + 1
        with suppress(Exception):  # what it reads may just be changing
            place = f"{self.what()}, {place}"
        where = {"host": socket.gethostname(), "pid": os.getpid(), "at": place}
        with self.lock:
            if not self.left:
                self.store.set(str(self.rank), json.dumps({"number": self.rounds, "still": self._still, **where}))
        self._read()

    def _read(self) -> None:
        for beat, told in zip(self.beats, self.store.multi_get(self.keys), strict=True):
            beat.update(json.loads(told))

    def _round(self) -> None:
        before = [beat.get("number") for beat in self.beats]
        self._exchange()
        for n, beat in enumerate(self.beats):
            self.silent[n] = self.silent[n] + 1 if beat.get("number") == before[n] else 0
        if self._have_left():
            self.others_left.set()
        elif self.store.check(["failure"]):
            failure = json.loads(self.store.get("failure"))
            if failure["rank"] != self.rank:
                self._end(failure)
        else:
            self._check_others()

    def _check_others(self) -> None:
        """Ends all if a process is gone, silent or stuck."""
        for number, child in enumerate(self.children, self.rank + 1):
            if not self.left and child.poll() and not self.beats[number].get("left"):
                how = f"status {child.returncode}" if child.returncode > 0 else signal.Signals(-child.returncode).name
                self._fail_for([number], f"has ended with {how} and without a word (was the memory full?)")
        silent = [n for n, beats in enumerate(self.silent) if beats >= self.patience and not self.beats[n].get("left")]
        if silent:
            self._fail_for(silent, f"has been silent for {self.minutes:g} minutes", kill=silent)
        stuck = [n for n, beat in enumerate(self.beats) if not beat.get("left")]
        if all(self.beats[n].get("still", 0) >= self.patience for n in stuck):
            waiting = {n for n in stuck if "torch.distributed" in self.beats[n]["at"]}
            self._fail_for(
                [n for n in stuck if n not in waiting] or stuck, f"has been stuck for {self.minutes:g} minutes"
            )

    def _fail_for(self, ranks: list[int], what: str, kill: Sequence[int] = ()) -> NoReturn:
        names = " and ".join(f"process {n} ({self._name(n)})" for n in ranks)
        self._end(self.fail(f"error: {names} {what}. {GO_ON}", TEMPORARY, kill))

    def _name(self, rank: int) -> str:
        return "{pid} on {host}, last seen {at}".format(**self.beats[rank])

    def _place(self) -> tuple[str, bool]:
        """Returns where the main thread is, and whether it has moved, or may be where it is for long."""
        frame: Any = sys._current_frames().get(self._main)
        stack, place, waits = [], "", ""
        while frame is not None:
            code, module = frame.f_code, str(frame.f_globals.get("__name__"))
            stack.append((code.co_filename, frame.f_lasti))
            waits = waits or (" waiting in torch.distributed" if module.startswith("torch.distributed") else "")
            if not place and (module.startswith("rlhf.") or LIBRARIES not in code.co_filename):
                place = f"in {code.co_name} ({'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno})"
            frame = frame.f_back
        worked = time.clock_gettime(self._clock) if self._clock else 0.0
        before, self._seen = self._seen, (stack, worked)
        # Who waits for several things one after another works a little; who waits for a GPU works all the time.
        moves = stack != before[0] or 0 < worked - before[1] < EVERY / 2
        return place + waits, moves or any(file.endswith(DISK) for file, _ in stack)

    def _watch_store(self) -> None:
        """Ends this process, and that of rank 0 if it runs here, if no beat gets through: then the store is silent."""
        rounds, missed = -1, 0
        while not self.others_left.wait(EVERY) and not self.left:
            rounds, missed = self.rounds, missed + 1 if rounds == self.rounds else 0
            if missed > self.patience + 3 * self.rank:  # the next process speaks, and the others see that
                _say(f"error: process 0 ({self._name(0)}) has been silent for {self.minutes:g} minutes. {GO_ON}")
                self._kill([0])
                _exit(TEMPORARY)

    # ------------------------------------------------------------------------------------------------------- the end

    def fail(self, text: str, status: int, kill: Sequence[int] = ()) -> Failure:
        """Says why all processes end, unless another one has; returns what is known of the first failure."""
        # With the text, or the two threads of a process would take each other's failure for their own, and both speak.
        mine = json.dumps({"rank": self.rank, "status": status, "kill": [*kill], "text": text})
        first = self.own_store.compare_set("failure", "", mine).decode()
        if first == mine:
            _say(text)
        return json.loads(first)

    def missing(self) -> str:
        """Names the processes that have told nothing for some seconds."""
        gone = [
            n for n, beats in enumerate(self.silent) if beats >= GRACE / EVERY / 2 and not self.beats[n].get("left")
        ]
        return " and ".join(f"process {n} ({self._name(n)})" for n in gone)

    def failed(self) -> bool:
        """Tells whether any process has failed."""
        return self.own_store.check(["failure"])

    def leave(self, patient: bool) -> None:
        """Tells that this process is done; the first one, and one that has started others, waits until those are, too.

        Args:
            patient: they are waited for as long as they live; otherwise all are stopping, and get some seconds.
        """
        with self.lock:
            self.own_store.set(str(self.rank), json.dumps({"left": True}))
            self.left = True
        if self.rank == 0 or self.children:
            self.others_left.wait(None if patient else 2 * GRACE)
        self.others_left.set()
        if not patient:
            for child in self.children:
                child.kill()

    def _have_left(self, killed: Sequence[int] = ()) -> bool:
        mine = range(len(self.keys)) if self.rank == 0 else range(self.rank, self.rank + len(self.children) + 1)
        return all(self.beats[n].get("left") for n in mine if n not in killed)

    def _end(self, failure: Failure) -> NoReturn:
        """Ends this process from a thread of its own, whatever its main thread waits for."""
        self._kill(failure["kill"])
        with self.lock:
            self.left = True
            self.store.set(str(self.rank), json.dumps({"left": True}))
        deadline = time.monotonic() + 2 * GRACE
        while (self.rank == 0 or self.children) and not self._have_left(failure["kill"]):
            if time.monotonic() > deadline:
                break
            time.sleep(EVERY / 10)
            self._read()
        for child in self.children:
            child.kill()
        _exit(failure["status"])

    def _kill(self, ranks: Sequence[int]) -> None:
        """Kills processes of this machine: SIGKILL ends those that are stopped, too."""
        for beat in (self.beats[rank] for rank in ranks):
            if beat.get("host") == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(beat["pid"], signal.SIGKILL)


_heartbeat: Heartbeat | None = None


def start(
    rank: int, size: int, what: Callable[[], str], minutes: float = MINUTES, children: Sequence[Any] = ()
) -> None:
    """Starts the heartbeat of this process, whose process group is connected; see `Heartbeat` for the arguments."""
    global _heartbeat
    if _heartbeat is None and size > 1:
        _heartbeat = Heartbeat(rank, size, what, minutes, children)


def leave() -> None:
    """Ends the heartbeat of this process, which has done its work; the first process waits for the others."""
    global _heartbeat
    if _heartbeat is not None:
        with suppress(RuntimeError):  # the store is gone
            _heartbeat.leave(patient=sys.exc_info()[0] is None)
        _heartbeat = None


def started() -> bool:
    """Tells whether this process has a heartbeat: it is one of several that are connected."""
    return _heartbeat is not None


def fail(error: Exception, message: str | None, status: int) -> int:
    """Says why this command ends, unless another one of its processes does; returns the exit status.

    Args:
        error: what was raised.
        message: a sentence for the user; None: a traceback is shown.
        status: the exit status if this is the process that failed.
    """
    global _heartbeat
    text = f"error: {message}" if message is not None else "".join(traceback.format_exception(error)).rstrip()
    if _heartbeat is None:
        if not is_main_process():  # the first one may say the same, and whoever started both then ends this one
            time.sleep(GRACE)
        _say(text)
        return status
    known = any(isinstance(cause, OtherProcessError) for cause in causes(error))
    lost = any("/gloo/" in str(cause) or type(cause).__name__ == "DistBackendError" for cause in causes(error))
    try:
        deadline = time.monotonic() + GRACE
        while (known or lost) and not _heartbeat.failed() and time.monotonic() < deadline:
            time.sleep(EVERY / 10)
        if lost and not known:
            status, reason = TEMPORARY, (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            gone, cut_off = _heartbeat.missing(), f"process {_heartbeat.rank} is cut off from another one: {reason}"
            text = f"error: {f'{gone} has ended without a word' if gone else cut_off}. {GO_ON}"
        status = int(_heartbeat.fail(text, status)["status"])
        _heartbeat.leave(patient=False)
    except RuntimeError:  # the store is gone: the heartbeat says so, and ends this process
        time.sleep(GRACE)
    _heartbeat = None
    return status


def _connect() -> Any:
    """Connects to the store of the process group: its own connection waits for nothing that others wait for."""
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    started = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"rlhf-{started}", TCPStore(address, port, is_master=False))


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may be there to read it
        print(text, file=sys.stderr, flush=True)


def _exit(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
