"""The share of the engines that each of several gateways has."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest

from gateway.scheduling.shards import Shard, owners


def addresses(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"http://10.{rng.randrange(256)}.{rng.randrange(256)}.{number}:8000" for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("engines", [10, 11, 57, 100])
def test_shares_are_disjoint_complete_and_differ_by_at_most_one(engines: int, count: int) -> None:
    for seed in range(5):
        known = addresses(engines, seed)
        shares = [Shard(index, count).share(known) for index in range(count)]
        assert sorted(engine for share in shares for engine in share) == sorted(known)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_share_depends_on_the_set_of_engines_only() -> None:
    known = addresses(20, seed=1)
    share = Shard(1, 3).share(known)
    assert Shard(1, 3).share([*reversed(known), known[0]]) == share
    code = f"from gateway.scheduling.shards import owners; print(sorted(owners({known!r}, 3).items()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(sorted(owners(known, 3).items()))


@pytest.mark.parametrize("count", [2, 4, 10])
@pytest.mark.parametrize("engines", [10, 40, 100])
def test_engine_that_leaves_moves_one_or_two_others(engines: int, count: int) -> None:
    moved = []
    for seed in range(30):
        known = addresses(engines, seed)
        before, after = owners(known, count), owners(known[:-1], count)
        moved.append(sum(before[engine] != shard for engine, shard in after.items()))
    assert sum(moved) / len(moved) < 2
    assert max(moved) <= 5


def test_further_gateway_takes_engines_only_for_itself_mostly() -> None:
    known = addresses(100, seed=0)
    before, after = owners(known, 4), owners(known, 5)
    moved = Counter(after[engine] == 4 for engine in known if before[engine] != after[engine])
    assert moved[True] == 20
    assert moved[False] <= 20


def test_fewer_engines_than_gateways_leave_none_without() -> None:
    known = addresses(3, seed=0)
    shares = [Shard(index, 8).share(known) for index in range(8)]
    assert [len(share) for share in shares] == [1] * 8
    assert set().union(*shares) == set(known)


def test_no_engines_are_no_share() -> None:
    assert [Shard(index, 2).share([]) for index in range(2)] == [set(), set()]


@pytest.mark.parametrize("total", [4, 7, 60, 100_001])
def test_parts_of_a_limit_add_up_to_it(total: int) -> None:
    parts = [Shard(index, 4).part(total) for index in range(4)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1


def test_part_of_a_limit_is_at_least_one() -> None:
    assert [Shard(index, 4).part(2) for index in range(4)] == [1, 1, 1, 1]
