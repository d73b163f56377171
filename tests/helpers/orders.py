"""A reward function that obeys the response: it forks, forges, prints, fills the memory or refuses to end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from or1.core.types import Prompt, Response, Score
from or1.reward.scorers import CustomScorer

# A response is an order: a word, and what comes after it. The reward of what is obeyed and returns is the number in it.
FUNCTION = """
import array, ctypes, json, os, signal, socket, struct, sys, threading, time

def frame(data):
    return struct.pack("!i", len(data)) + data

FORGED = json.dumps(["ok", 1.0, ""]).encode()

def sockets():
    for fd in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                yield fd
        except OSError:
            pass

def forge(*messages):
    for fd in sockets():
        for message in messages:
            os.write(fd, message)

def daemon(seconds):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(seconds)
        os._exit(0)
    os.wait()

class Sullen(Exception):
    def __str__(self):
        raise KeyError("no words")

def reward(completions, **columns):
    order, _, rest = completions[0].partition(" ")
    number = float(rest.split()[-1]) if rest else 0.25
    if order == "fork":
        os.fork()
    elif order == "fork-raise" and os.fork() == 0:
        raise KeyError("in the copy")
    elif order == "fork-exit" and os.fork() == 0:
        sys.exit(3)
    elif order == "fork-hang" and os.fork() == 0:
        time.sleep(60)
    elif order == "forge":
        forge(frame(FORGED))
    elif order == "forge-half":
        forge(struct.pack("!i", 40))
    elif order == "forge-huge":
        forge(struct.pack("!i", 2 ** 30) + b"x")
    elif order == "forge-long":
        forge(frame(os.urandom(16) + b"+" + FORGED))
    elif order == "forge-later":
        threading.Timer(0.3, forge, [frame(os.urandom(16) + b"+" + FORGED)]).start()
    elif order == "daemon":
        daemon(0)
    elif order == "daemon-long":
        daemon(60)
        with open(columns["place"][0], "a") as file:
            print(os.getpid(), file=file)
        time.sleep(60)
    elif order == "ignore":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)
    elif order == "timer":
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(60)
    elif order == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif order == "length":
        forge(struct.pack("!i", -1) + struct.pack("!Q", 2 ** 40))
        time.sleep(60)
    elif order == "sys.exit":
        sys.exit("bye")
    elif order == "interrupt":
        raise KeyboardInterrupt
    elif order == "generator-exit":
        raise GeneratorExit
    elif order == "sullen":
        raise Sullen
    elif order == "long":
        raise ValueError("x" * 30_000_000)
    elif order == "escape":
        raise ValueError(chr(27) + "[2J" + chr(0xD800))
    elif order == "memory":
        ballast.append(bytearray(int(number) << 20))
    elif order == "print":
        for i in range(int(number)):
            print(f"{rest.split()[0]} line {i}", chr(0xD800))
        print("unfinished", end="", file=sys.stderr)
    elif order == "print-bytes":
        line = "x" * 999
        for i in range(int(number) // 1000):
            print(line)
    return [number]

ballast = []
"""


def response(text: str) -> Response:
    return Response(np.array([1], np.int32), np.zeros(1, np.float32), "stop", 0, text)


def scores(scorer: CustomScorer, *orders: str, place: Path | None = None) -> list[Score]:
    """Return the scores of orders that wait together."""
    prompt = Prompt("t:1", "t", "?", np.array([1], np.int32), row={"place": str(place)})
    return [f.result(timeout=90) for f in [scorer.submit(prompt, response(order)) for order in orders]]


def results(scorer: CustomScorer, *orders: str) -> list[float | str]:
    """Return the reward of each order that was obeyed, and the status of the others."""
    return [s.status.value if math.isnan(s.reward) else s.reward for s in scores(scorer, *orders)]
