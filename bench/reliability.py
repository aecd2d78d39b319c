"""Reliability: random cases of tests/test_reliability.py, counted.

    python bench/reliability.py --minutes 10                                     # the kinds share the time
    python bench/reliability.py --kinds "kill -9: TRAIN" "full disk" --count 100

A case draws a situation (a moment to kill a run, a file and its damage, a request, ...), runs the program in it and checks what
the program promises: nothing that was saved is lost, damage is reported or repaired, and an error is one line. For each loss, the
check that failed is printed, with the flags that repeat the case.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
from test_reliability import CASES, Shop

import TRAIN


def tried(kind: str, shop: Shop, seed: int, first: int, count: int | None, seconds: float) -> tuple[int, int, str]:
    """(cases, losses, why it was skipped) of one kind: `count` cases from number `first` on, or as many as fit the time."""
    number, cases, losses, end = first, 0, 0, time.monotonic() + seconds
    while number - first < count if count else time.monotonic() < end or not cases:
        try:
            cases += CASES[kind](shop, random.Random(f"{kind} {seed} {number}")) or 1
        except pytest.skip.Exception as reason:
            return cases, losses, str(reason)
        except Exception:
            cases, losses = cases + 1, losses + 1
            print(f'{traceback.format_exc()}--kinds "{kind}" --seed {seed} --first {number} --count 1\n', file=sys.stderr)
        number += 1
        shop.clean()
    return cases, losses, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=CASES, default=list(CASES), metavar="KIND", help=", ".join(CASES))
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all kinds together")
    parser.add_argument("--count", type=int, help="cases of each kind (of random input: hundreds), instead of --minutes")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="random seed; by default a new one")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    TRAIN.plot_curves = lambda *_: None  # drawing takes longer than these runs
    print(f"seed {arguments.seed}", file=sys.stderr)
    folder, begin, rows = tempfile.mkdtemp(), time.monotonic(), []
    try:
        shop = Shop(Path(folder))
        for left, kind in zip(range(len(arguments.kinds), 0, -1), arguments.kinds):
            share = (60 * arguments.minutes - (time.monotonic() - begin)) / left
            rows.append((kind, *tried(kind, shop, arguments.seed, arguments.first, arguments.count, share)))
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("| kind | cases | losses | command |\n|---|---|---|---|")
    for kind, cases, losses, reason in rows:
        print(f'| {kind} | {cases:,} | {reason and f"skipped: {reason}" or losses} | `python bench/reliability.py --kinds "{kind}"` |')


if __name__ == "__main__":
    main()
