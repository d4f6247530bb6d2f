"""Whether a suggestion helps: the same steps of a run without and with it."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from pydantic import ValidationError
from torch import Tensor

from mpcli import checkpoint
from mpcli.diagnose.finding import Arm, Finding, FindingId, Suggestion, Verification
from mpcli.diagnose.replay import plan_of
from mpcli.diagnose.rerun import Rerun, State, run_steps
from mpcli.diagnose.stage import check_device
from mpcli.diagnose.symptoms import SYMPTOMS, Symptom, judged, mean, symptom_of
from mpcli.machine import Machine, detect_machine
from mpcli.plan import make_plan
from mpcli.plan.processes import Group
from mpcli.recipe.engine import Local
from mpcli.recipe.errors import UserError, user_error
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import PluginFile
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan, TrainingState
from mpcli.rundir import RunDirectory

logger = logging.getLogger(__name__)

STEPS = 32
"""A dynamic loss scale that begins at 2^16 is at 1 after at most 16 skipped steps: the other half
shows what training does then, and a quarter is 8 losses to compare."""
MOST_FINDINGS = 3
MOST_SUGGESTIONS = 3
REACH = 1000
"""Steps from the last good checkpoint to the symptom: more would have to be run each time."""
_FROM_FRESH: frozenset[FindingId] = frozenset((
    *("adam-eps", "weights-exceed-fp16", "optimizer-state-corrupted"),
))  # fmt: skip
"""What a state has had done to it by the cause is still in it after a fix: second moments that were
rounded to zero, weights that were rounded to infinity."""


def verify(
    run: RunDirectory,
    findings: Sequence[Finding],
    *,
    steps: int = STEPS,
    plugin: PluginFile | None = None,
    tell: Callable[[str], None] = logger.info,
) -> list[Finding]:
    """Try the suggestions of the most important causes, each until one helps.

    The steps from the last good checkpoint before the finding up to `steps` after it are run
    without and with the override that is suggested, on the same batches and from the same state.
    Nothing is written to the run. Of at most `MOST_FINDINGS` causes that are no mere information,
    at most `MOST_SUGGESTIONS` are tried: the suggestion, then its alternatives.

    Args:
        findings: causes, the most important first.
        steps: after the step at which a finding is first seen.
        plugin: the file whose task the run has.
        tell: what takes time, and what came of it.

    Returns:
        the findings in their order. Of those that were tried, the suggestion is the one that
        helped, or else the first; `tried` has each one's numbers. `not_tried` says why others were
        not: data or the device are missing, say.

    Raises:
        UserError: exit 2, the run is not ours.
    """
    run.refuse_foreign("--verify ")
    bench = _Bench(run, steps, plugin, tell)
    told = []
    tried = 0
    for finding in findings:
        if finding.severity != "info" and _candidates(finding):
            tried += 1
            if tried <= MOST_FINDINGS:
                finding = bench.verified(finding)
            else:
                finding = _not_tried(finding, f"it is not among the first {MOST_FINDINGS} causes")
        told.append(finding)
    return told


def _candidates(finding: Finding) -> list[Suggestion]:
    """Suggestions that can be tried: those that change the recipe."""
    suggestions = (finding.suggestion, *finding.alternatives)
    return list(islice((s for s in suggestions if s and s.set), MOST_SUGGESTIONS))


def _not_tried(finding: Finding, why: str) -> Finding:
    return finding.model_copy(update={"not_tried": why})


class _Window(NamedTuple):
    """The steps after `start` up to `end`, as an attempt of the run had them."""

    past: RunDirectory
    recipe: Recipe
    plan: Plan
    start: State
    end: int

    @property
    def length(self) -> int:
        """Number of steps."""
        return self.end - self.start.attempted

    @property
    def name(self) -> str:
        """For people."""
        first = self.start.attempted + 1
        begin = "fresh weights" if self.start.tensors is None else f"step-{first - 1}"
        return f"steps {first:,} to {self.end:,} from {begin}"


class _Bench:
    """Reruns of one run; the one without a fix is run once for each window."""

    def __init__(
        self,
        run: RunDirectory,
        steps: int,
        plugin: PluginFile | None,
        tell: Callable[[str], None],
    ) -> None:
        self.run, self.steps, self.plugin, self.tell = run, steps, plugin, tell
        self.attempts: dict[int, int] = {}  # by step
        rates = []
        for row in run.steps():
            self.attempts[row.step] = row.attempt
            rates.append(row.samples_per_second)
        self.samples_per_second = statistics.median(rates) if rates else 0.0
        self.without: dict[tuple[int, int, int], Rerun] = {}  # by attempt and window

    def verified(self, finding: Finding) -> Finding:
        """A finding whose suggestions were tried until one helped."""
        if finding.id not in SYMPTOMS:
            return _not_tried(finding, "no number of a step shows that it is gone")
        try:
            return self._tried(finding)
        except UserError as error:  # of the run as it was: what is found is told all the same
            why = f"its steps cannot be run again: {error.problems[0].what}"
            self.tell(f"no suggestion is tried: {why}")
            return _not_tried(finding, why)

    def _tried(self, finding: Finding) -> Finding:
        window = self._window(finding)
        if window.length > REACH + self.steps:
            why = f"the symptom is {window.length:,} steps from the last good checkpoint"
            return _not_tried(finding, f"{why}; at most {REACH:,} are run")
        without = self._rerun_without(window)
        symptom = symptom_of(finding, without)
        if symptom is None:
            what = f"{SYMPTOMS[finding.id].what}: {window.name} do not show it without a change"
            return _not_tried(finding, what)
        tried: list[Verification] = []
        for suggestion in _candidates(finding):
            self.tell(f"with `{'`, `'.join(suggestion.set)}`: {window.name}")
            tried.append(self._try(suggestion, symptom, finding, window, without))
            self.tell(f"{'it helps' if tried[-1].fixed else 'it does not help'}: {tried[-1].why}")
            if tried[-1].fixed:
                return _mended(finding, tried)
        return finding.model_copy(update={"verified": False, "tried": tuple(tried)})

    def _window(self, finding: Finding) -> _Window:
        attempt = self.attempts.get(finding.step or 0, self.run.attempt)
        past = RunDirectory(self.run.path, attempt)
        recipe, plan = load_recipe(past.recipe_path, plugin=self.plugin).recipe, plan_of(past)
        check_device(plan)
        step = min(finding.step or plan.steps, plan.steps)
        begun_wrong = finding.id in _FROM_FRESH or any(
            setting.startswith("task") for s in _candidates(finding) for setting in s.set
        )
        # From where so many steps can follow, if that is not too far.
        for latest in (min(step - 1, plan.steps - self.steps), step - 1):
            start = self._last_good(0 if begun_wrong else latest)
            seen = finding.step or start.attempted
            window = _Window(past, recipe, plan, start, min(seen + self.steps, plan.steps))
            if window.length <= REACH + self.steps:
                break
        return window

    def _last_good(self, latest: int) -> State:
        """Of the newest checkpoint up to a step that is whole and finite, else fresh weights."""
        for saved in checkpoint.completed(self.run.checkpoints_path):
            if 0 < saved.step <= latest:
                try:
                    tensors, found = checkpoint.load(saved)
                    attempted = TrainingState.model_validate(found).attempted
                except (UserError, ValidationError):
                    self.tell(f"{saved.path.name} is passed over: it is not whole")
                    continue
                if attempted == saved.step and all(map(_is_finite, tensors.values())):
                    return State(attempted, tensors)
                self.tell(f"{saved.path.name} is passed over: it is not finite")
        return State(0, None)

    def _rerun_without(self, window: _Window) -> Rerun:
        key = window.past.attempt, window.start.attempted, window.end
        if key not in self.without:
            samples = window.length * window.recipe.train.global_batch_size
            time = samples / self.samples_per_second if self.samples_per_second else 0.0
            about = f", about {time:,.0f} s each time" if time >= 1 else ""
            self.tell(f"as the run was: {window.name}{about}")
            self.without[key] = run_steps(
                window.recipe, window.plan, window.start, window.end, self.tell
            )
        return self.without[key]

    @functools.cached_property
    def machine(self) -> Machine:
        """This one, for plans of other recipes."""
        return detect_machine()

    def _try(
        self,
        suggestion: Suggestion,
        symptom: Symptom,
        finding: Finding,
        window: _Window,
        without: Rerun,
    ) -> Verification:
        with_it: Rerun | None = None
        try:
            with_it = self._rerun_with(suggestion, window)
            fixed, why = judged(symptom, finding, without, with_it)
        except UserError as error:
            fixed, why = False, f"it cannot be run: {error.problems[0].what}"
        start = window.start
        return Verification(
            suggestion=suggestion,
            fixed=fixed,
            why=why,
            symptom=symptom.what,
            checkpoint=None if start.tensors is None else start.attempted,
            without=_arm(without, symptom, finding),
            with_it=_arm(with_it, symptom, finding) if with_it else None,
        )

    def _rerun_with(self, suggestion: Suggestion, window: _Window) -> Rerun:
        recipe = load_recipe(window.past.recipe_path, suggestion.set, self.plugin).recipe
        group = Group(window.plan.world_size)  # whose batches are cut here as they were there
        if not isinstance(recipe.engine, Local):
            anywhere = recipe.engine.model_copy(update={"processes": "auto"})
            recipe = recipe.model_copy(update={"engine": anywhere})
        plan, start = make_plan(recipe, self.machine, group=group), window.start
        if plan.steps < window.end:
            raise user_error(f"the run would have only {plan.steps:,} steps")
        if start.tensors and recipe.precision.loss_scale != window.recipe.precision.loss_scale:
            kept = {n: t for n, t in start.tensors.items() if not n.startswith("scaler.")}
            start = State(start.attempted, kept)
        return run_steps(recipe, plan, start, window.end, self.tell)


def _mended(finding: Finding, tried: Sequence[Verification]) -> Finding:
    """Its suggestion is the last one that was tried; others that were not stay."""
    known = [verification.suggestion for verification in tried]
    others = (finding.suggestion, *finding.alternatives)
    return finding.model_copy(
        update={
            "suggestion": known[-1],
            "alternatives": tuple(s for s in others if s and s not in known),
            "verified": True,
            "tried": tuple(tried),
        }
    )


def _arm(rerun: Rerun, symptom: Symptom, finding: Finding) -> Arm:
    return Arm(
        steps=len(rerun.rows),
        skipped=sum(not row.applied for row in rerun.rows),
        loss=mean(rerun.last_losses),
        symptom=symptom.measure(rerun, finding),
        seconds_per_step=rerun.seconds,
        peak_memory_bytes=rerun.peak_memory,
    )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
