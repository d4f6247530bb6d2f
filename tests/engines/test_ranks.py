"""What several ranks agree on."""

from __future__ import annotations

from mpcli.ranks import ALONE, Ask, Ranks
from tests.ranks import Group


def asks_of_rank_1(ranks: Ranks) -> list[int]:
    """A save is asked for; the calls: one that obeys stops alone, twice, and then any."""
    ask = Ask.SAVE if ranks.rank == 1 else Ask.NOTHING
    found = [ranks.agree(ask, now=Ask.STOP)]
    stop = Ask.INTERRUPT if ranks.rank == 0 else Ask.NOTHING
    found.append(ranks.agree(stop, now=Ask.STOP))
    found.append(ranks.agree(Ask.NOTHING, now=Ask.STOP))
    return [*found, ranks.agree(Ask.NOTHING), ranks.agree(Ask.NOTHING)]


def test_all_obey_one_call_later_and_what_cannot_be_done_yet_is_kept(pair: Group) -> None:
    assert pair.run(asks_of_rank_1) == [[0, 0, Ask.INTERRUPT, Ask.SAVE, 0]] * 2


def test_alone_nobody_waits_for_a_call() -> None:
    assert ALONE.agree(Ask.SAVE) == Ask.SAVE
    assert ALONE.agree(Ask.NOTHING) == Ask.NOTHING
