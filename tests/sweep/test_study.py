"""One process has a cell at a time, and what one has ended none runs again."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from mpcli.recipe.errors import Exit, UserError
from mpcli.sweep.cells import Cell
from mpcli.sweep.folder import SweepFolder
from mpcli.sweep.results import GradientHistogram, TrialResult
from mpcli.sweep.study import MAX_DEATHS, Claim, Lost, Study, unrun

CELLS = tuple(Cell(f"scale={scale}", (f"x={scale}",), seed=0) for scale in (1, 2, 4))


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    """Of a sweep."""
    return made(tmp_path)


def made(path: Path) -> SweepFolder:
    (path / "trials").mkdir(parents=True, exist_ok=True)
    return SweepFolder(path)


def done(cell: Cell, **fields: object) -> TrialResult:
    return unrun(cell, "").model_copy(
        update={"status": "done", "reason": None, "loss": 0.5, **fields}
    )


def claimed(study: Study, cells: tuple[Cell, ...] = CELLS) -> Claim:
    claim = study.claim(cells)
    assert claim is not None
    return claim


def test_every_cell_has_one_trial_however_often_it_is_asked_for(folder: SweepFolder) -> None:
    for _ in range(3):
        study = Study(folder, "study")
        study.revive(CELLS)
        study.revive(CELLS[:2])
    cells = [trial.user_attrs["cell"] for trial in study.optuna.trials]
    assert cells == [cell.name for cell in CELLS]


def test_a_cell_is_claimed_once(folder: SweepFolder) -> None:
    first, second = Study(folder, "study"), Study(folder, "study")
    first.revive(CELLS)
    claims = [claimed(study) for study in (first, second, first)]
    assert [claim.cell for claim in claims] == list(CELLS)
    second.revive(CELLS)  # those that run it are alive
    assert second.claim(CELLS) is None
    for claim in claims:
        claim.end(done(claim.cell))
    second.revive(CELLS)
    assert first.claim(CELLS) is second.claim(CELLS) is None
    assert all(standing.over for standing in second.look(CELLS).values())


def test_a_cell_whose_process_died_is_claimed_again_but_not_for_ever(folder: SweepFolder) -> None:
    study, other = Study(folder, "study"), Study(folder, "study")
    for _ in range(MAX_DEATHS):
        study.revive(CELLS)
        claim = claimed(study, CELLS[:1])
        assert other.claim(CELLS[:1]) is None
        claim.release()  # as the kernel does it
        assert other.claim(CELLS[:1]) is None  # before anybody saw to it
        study.died(claim.trial_id)
    other.revive(CELLS)
    standing = other.look(CELLS)[CELLS[0].name]
    assert standing.over
    result = other.result(CELLS[0], standing)
    assert (result.status, result.reason) == ("failed", "its process died 3 times")
    assert claimed(other).cell == CELLS[1]


def test_a_cell_is_not_blamed_for_the_end_of_its_sweep(folder: SweepFolder) -> None:
    for _ in range(MAX_DEATHS):
        study = Study(folder, "study")
        study.revive(CELLS)
        claimed(study, CELLS[:1]).give_back()  # stopped
        study.revive(CELLS)
        claimed(study, CELLS[:1]).release()  # killed, with all that could have told of it
    study.revive(CELLS)
    assert study.look(CELLS)[CELLS[0].name].waiting


def test_a_cell_that_failed_by_itself_is_not_tried_again(folder: SweepFolder) -> None:
    study = Study(folder, "study")
    study.revive(CELLS)
    claimed(study, CELLS[:1]).end(unrun(CELLS[0], "no such data"))
    study.revive(CELLS)
    standing = study.look(CELLS)[CELLS[0].name]
    assert standing.over
    assert study.result(CELLS[0], standing).reason == "no such data"
    assert study.claim(CELLS[:1]) is None


def test_results_come_back_as_they_were_told(folder: SweepFolder) -> None:
    histogram = GradientHistogram(
        module="a.b", tensor="grad", name="wéight", elements=9, max=0.5, zeros=0.25, lowest=-30,
        counts=tuple(range(60)),
    )  # fmt: skip
    results = [
        done(CELLS[0], loss=0.25, histograms=(histogram,) * 300),  # longer than MySQL's TEXT
        done(CELLS[1], loss=math.nan, first_loss=math.inf),
        done(CELLS[2], status="diverged", reason="step 3", metrics={"accuracy": 0.5}),
    ]
    study = Study(folder, "study")
    study.revive(CELLS)
    for result in results:
        claimed(study).end(result)
    seen = Study(folder, "study")
    standings = seen.look(CELLS)
    read = [seen.result(cell, standings[cell.name]) for cell in CELLS]
    assert [result.to_json() for result in read] == [result.to_json() for result in results]
    states = [trial.state for trial in seen.optuna.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]


def test_of_two_trials_that_ended_the_first_counts(folder: SweepFolder) -> None:
    study = Study(folder, "study")
    for loss in (0.25, 0.75):
        cell = CELLS[0]
        study.optuna.enqueue_trial({}, user_attrs={"cell": cell.name})
        text = done(cell, loss=loss).to_json()
        trial = study.optuna.ask()
        trial.set_user_attr("result.0", text)
        study.optuna.tell(trial, loss)
    assert study.result(cell, study.look([cell])[cell.name]).loss == 0.25


def test_of_two_trials_of_a_cell_the_first_is_run(folder: SweepFolder) -> None:
    """Two machines that begin together may both add one."""
    cell = CELLS[0]
    study = Study(folder, "study")
    for _ in range(2):
        study.optuna.enqueue_trial({}, user_attrs={"cell": cell.name})
    claim = claimed(study)
    assert study.claim([cell]) is None
    claim.release()
    study.revive([cell])  # the second takes its place: no third is added
    again = claimed(study, (cell,))
    again.end(done(cell))
    study.revive([cell])
    assert study.claim([cell]) is None
    assert len(study.optuna.trials) == 2


def test_a_process_that_was_taken_to_be_dead_tells_nothing(folder: SweepFolder) -> None:
    study, other = Study(folder, "study"), Study(folder, "study")
    study.revive(CELLS)
    claim = claimed(study)
    other.optuna.tell(0, state=TrialState.FAIL)
    assert not claim.is_worse(10, 99.0)
    with pytest.raises(Lost):
        claim.end(done(claim.cell))


def test_a_loss_that_grows_or_is_not_a_number_is_worse(folder: SweepFolder) -> None:
    study = Study(folder, "study")
    study.revive(CELLS)
    claim = claimed(study)
    verdicts = [
        claim.is_worse(step, loss) for step, loss in ((10, 3.0), (20, 3.01), (30, math.nan))
    ]
    assert verdicts == [False, True, True]


def test_processes_that_begin_together_make_one_study(folder: SweepFolder) -> None:
    def begin() -> None:
        Study(folder, "study").revive(CELLS)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Study(folder, "study").optuna.trials) == len(CELLS)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["revive", "claim", "claim", "end", "fail", "die", "give back"]),
        ),
        max_size=40,
    )
)
def test_whatever_processes_do_each_cell_ends_once(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str]]
) -> None:
    folder = made(tmp_path_factory.mktemp("sweep"))
    processes = [Study(folder, "study") for _ in range(3)]
    held: dict[int, Claim] = {}
    ended: Counter[str] = Counter()
    deaths: Counter[str] = Counter()

    def move(number: int, what: str) -> None:
        study = processes[number]
        if what == "revive":
            study.revive(CELLS)
        elif what == "claim" and number not in held:
            if claim := study.claim(CELLS):
                name = claim.cell.name
                assert name not in {other.cell.name for other in held.values()}
                assert not ended[name]
                assert deaths[name] < MAX_DEATHS
                held[number] = claim
        elif what != "claim" and (taken := held.pop(number, None)):
            if what == "die":
                taken.release()
                if others_see := number % 2 == 0:
                    processes[2].died(taken.trial_id)
                deaths[taken.cell.name] += others_see
                processes[number] = Study(folder, "study")
            elif what == "give back":
                taken.give_back()
            else:
                ended[taken.cell.name] += 1
                failed = what == "fail"
                taken.end(unrun(taken.cell, "failed") if failed else done(taken.cell))

    for number, what in moves:
        move(number, what)
    for number in range(3):
        move(number, "die")
    while not all(standing.over for standing in processes[0].look(CELLS).values()):
        for what in ("revive", "claim", "end"):
            move(0, what)
    for cell in CELLS:
        assert ended[cell.name] == (deaths[cell.name] < MAX_DEATHS)


def test_a_row_that_was_not_written_to_the_end_is_taken_back(folder: SweepFolder) -> None:
    study = Study(folder, "study")
    study.revive(CELLS)
    whole = folder.journal_path.read_bytes()
    folder.journal_path.write_bytes(whole + b'{"op_code":8,"worker_id":"x","tri')
    later = Study(folder, "study")
    claim = claimed(later)
    claim.end(done(claim.cell))
    assert Study(folder, "study").look(CELLS)[claim.cell.name].over
    assert study.look(CELLS)[claim.cell.name].over


@pytest.mark.parametrize(
    "junk",
    [
        b"junk\n",
        b"\0" * 100 + b"\n",
        b"[1]\n",
        b"7\n",
        b'{"op_code": 99}\n',
        b'{"op_code": 4}\n',
        b'{"op_code":8,"worker_id":"x","tri{"op_code":0}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_damaged_journal_is_named(folder: SweepFolder, junk: bytes) -> None:
    Study(folder, "study").revive(CELLS)
    with folder.journal_path.open("ab") as file:
        file.write(junk)
    with pytest.raises(UserError, match=r"study\.journal: damaged") as told:
        Study(folder, "study")
    assert told.value.exit_code is Exit.CHECKPOINT


def test_a_journal_that_cannot_be_written(folder: SweepFolder) -> None:
    folder.journal_path.mkdir()
    with pytest.raises(UserError, match="cannot write to the sweep") as told:
        Study(folder, "study")
    assert told.value.exit_code is Exit.STORAGE


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("postgresql://me:se%40cret@localhost:1/db", Exit.ENVIRONMENT, "refused"),
        ("postgresql://me@localhost:1/db?password=se%40cret", Exit.ENVIRONMENT, "refused"),
        ("mysql://me:se%40cret@localhost/db", Exit.ENVIRONMENT, "mysqlclient"),
        ("nonsense+x://me:se%40cret@localhost/db", Exit.USAGE, "no kind of database"),
        ("se@cret", Exit.USAGE, "no URL of a database"),
        ("postgresql://me:se@cret@localhost:port/db", Exit.USAGE, "no URL of a database"),
        ("sqlite://", Exit.USAGE, "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", Exit.USAGE, "in memory"),
        ("sqlite:////nowhere/se@cret/study.db", Exit.ENVIRONMENT, "unable to open"),
    ],
)
def test_a_database_that_is_not_there(folder: SweepFolder, url: str, code: Exit, said: str) -> None:
    with pytest.raises(UserError) as told:
        Study(folder, "study", url)
    assert told.value.exit_code is code
    text = "".join(f"{p.what} {p.hint}" for p in told.value.problems)
    assert said in text
    if "nowhere" not in url:
        assert "se@cret" not in text
        assert "se%40cret" not in text


@pytest.mark.slow
def test_a_trial_in_a_database_is_dead_without_heartbeats(tmp_path: Path) -> None:
    """Each machine has a folder of its own."""
    url = f"sqlite:///{tmp_path}/study.db"
    here, there = (
        Study(made(tmp_path / name), "study", url, heartbeat=1, grace=2) for name in "ab"
    )
    here.revive(CELLS)
    alive, dead = claimed(here), claimed(here)
    dead.release()
    time.sleep(4)
    there.revive(CELLS)
    again = claimed(there)
    assert again.cell == dead.cell
    assert there.look(CELLS)[alive.cell.name].alive is not None
    alive.end(done(alive.cell))
    again.end(done(again.cell))
    with pytest.raises(Lost):
        dead.end(done(dead.cell))


def test_a_process_that_died_before_its_first_heartbeat_is_seen_to(tmp_path: Path) -> None:
    """Optuna never takes a running trial without one to be dead."""
    url = f"sqlite:///{tmp_path}/study.db"
    study = Study(made(tmp_path), "study", url, heartbeat=1, grace=1)
    study.revive(CELLS)
    study.beat = lambda trial_id: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        study.claim(CELLS)
    assert Study(made(tmp_path), "study", url).look(CELLS)[CELLS[0].name].waiting
