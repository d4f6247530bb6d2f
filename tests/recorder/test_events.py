"""What happened in a step is seen from what the loop really did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.nn.utils import clip_grads_with_norm_ as clip_with_norm

from mpcli.records import LoopEvent
from tests.recorder.conftest import Recording
from tests.recorder.loops import accumulated, adam, batches, bf16, conv_net, fp16, fp32, loss_of
from tests.recorder.loops import masters as masters_loop


def names(events: list[LoopEvent]) -> list[str]:
    return [event.event for event in events]


def named(events: list[LoopEvent], name: str) -> LoopEvent:
    (found,) = [event for event in events if event.event == name]
    return found


def half_step(
    recording: Recording, unscale_first: bool, clip: Any, optimizer: Any = None, model: Any = None
) -> list[LoopEvent]:
    model = model or conv_net()
    optimizer = optimizer or adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = recording.record(model, optimizer, scaler)
    with step(None):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, next(batches()))
        scaler.scale(loss).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        clip(model.parameters())
        scaler.step(optimizer)
        scaler.update()
    return recording.events()


CLIPPINGS = {
    "clip_grad_norm_": lambda p: clip_grad_norm_(p, 0.5),
    "clip_grad_norm_, not in groups": lambda p: clip_grad_norm_(p, 0.5, foreach=False),
    "clip_grads_with_norm_": lambda p: clip_with_norm(list(p), 0.5, torch.tensor(7.0)),
    "clip_grad_value_": lambda p: clip_grad_value_(p, 0.5),
    "clip_grad_value_, not in groups": lambda p: clip_grad_value_(p, 0.5, foreach=False),
}


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_clipping_before_unscaling_is_seen(clipping: str, recording: Recording) -> None:
    events = half_step(recording, False, CLIPPINGS[clipping])
    kind = "clip_value" if "value" in clipping else "clip_norm"
    assert names(events) == [
        *("forward", "scale", "backward", kind, "unscale", "optimizer_step", "scaler_update")
    ]
    clip = named(events, kind)
    assert (clip.gradients, clip.limit) == ("scaled", 0.5)
    assert clip.norm is not None and clip.norm > 100  # 1024 times too large
    assert named(events, "unscale").by == "scaler.step"


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_clipping_after_unscaling_is_seen(clipping: str, recording: Recording) -> None:
    events = half_step(recording, True, CLIPPINGS[clipping])
    kind = "clip_value" if "value" in clipping else "clip_norm"
    assert names(events)[2:6] == ["backward", "unscale", kind, "optimizer_step"]
    assert named(events, kind).gradients == "unscaled"
    assert named(events, "unscale").by is None


def test_clipping_of_another_model_is_not_this_loop_s(recording: Recording) -> None:
    other = nn.Linear(1, 1)
    other(torch.ones(1)).backward()
    events = half_step(recording, True, lambda _: clip_grad_norm_(other.parameters(), 1.0))
    assert "clip_norm" not in names(events)


def test_clipping_by_hand_is_a_change_of_gradients(recording: Recording) -> None:
    def by_hand(parameters: Any) -> None:
        for parameter in parameters:
            parameter.grad.mul_(0.5)

    events = half_step(recording, True, by_hand)
    assert names(events)[3:6] == ["unscale", "gradients_changed", "optimizer_step"]


def test_a_step_on_gradients_that_nobody_unscaled_is_seen(recording: Recording) -> None:
    model = conv_net()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = recording.record(model, optimizer, scaler)
    with step(None):
        scaler.scale(loss_of(model, next(batches()))).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
    events = recording.events()
    assert names(events) == ["forward", "scale", "backward", "optimizer_step"]
    assert named(events, "optimizer_step").gradients == "scaled"
    (row,) = recording.close().steps()
    assert row.applied
    assert row.grad_norm == pytest.approx(norm.item() / 1024)


def test_a_fused_optimizer_unscales_inside(recording: Recording) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    events = half_step(recording, False, lambda _: None, optimizer, model)
    assert "unscale" not in names(events)
    assert named(events, "optimizer_step").gradients == "unscaled"


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_seen_and_its_row_says_so(fused: bool, recording: Recording) -> None:
    fp16(conv_net(), recording.record, fused=fused)
    rows = list(recording.close().steps())
    skipped = [not row.applied for row in rows]
    assert skipped[0] and not skipped[-1]
    assert [row.scale for row in rows[:2]] == [2.0**24, 2.0**17]
    assert "skipped_step" in names(recording.events(step=1))
    # What the recorder computed again to explain it is no part of the step.
    assert names(recording.events(step=1)).count("forward") == 1
    assert names(recording.events(step=1)).count("backward") == 1
    assert "skipped_step" not in names(recording.events(step=4))


def test_an_accumulation_window_shows_every_backward_and_its_loss(recording: Recording) -> None:
    accumulated(conv_net(), recording.record)
    events = recording.events()
    backwards = [event for event in events if event.event == "backward"]
    assert [event.gradients for event in backwards] == ["none", "scaled", "scaled"]
    row = next(recording.close().steps())
    assert row.loss == pytest.approx(sum(event.loss or 0.0 for event in backwards))
    assert 0.5 < row.loss < 3  # as the loop divided it, without the scale


def test_gradients_left_from_the_step_before_are_seen(recording: Recording) -> None:
    model = conv_net()
    optimizer = adam(model)
    step = recording.record(model, optimizer)
    for batch in batches(2):  # nobody calls `zero_grad`
        with step(None):
            loss_of(model, batch).backward()
            optimizer.step()
    assert "stale_gradients" not in names(recording.events(1))
    stale = named(recording.events(2), "stale_gradients")
    assert stale.norm is not None and stale.norm > 0


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_zeroed_outside_of_a_step_are_not_stale(
    to_none: bool, recording: Recording
) -> None:
    model = conv_net()
    optimizer = adam(model)
    step = recording.record(model, optimizer)
    for batch in batches(2):
        optimizer.zero_grad(set_to_none=to_none)
        with step(None):
            loss_of(model, batch).backward()
            optimizer.step()
    assert "stale_gradients" not in names(recording.events(2))


def test_autocast_is_seen_where_the_model_computes(recording: Recording) -> None:
    bf16(conv_net(), recording.record)
    forward = named(recording.events(), "forward")
    assert (forward.autocast, forward.output) == ("bf16", "bf16")


def test_autocast_that_is_never_active_is_seen(recording: Recording) -> None:
    fp32(conv_net(), recording.record)
    assert named(recording.events(), "forward").autocast == "off"


def test_autocast_inside_of_a_wrapped_forward_is_seen(recording: Recording) -> None:
    """As accelerate wraps it: outside of the forward, where hooks run, autocast is off."""
    model = conv_net()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    fp32(model, recording.record)
    assert named(recording.events(), "forward").autocast == "bf16"


def test_masters_are_named_after_the_weights_they_stand_for(recording: Recording) -> None:
    model = conv_net()
    masters_loop(model, recording.record)
    run = recording.close()
    about = run.foreign()
    assert about is not None and about.masters
    assert names(recording.events())[:4] == [
        *("forward", "backward", "gradients_changed", "optimizer_step")
    ]
    trained = {name for name, _ in model.named_parameters()}
    weights = {row.name: row for row in run.layers() if row.tensor == "weight"}
    assert set(weights) == trained
    assert {row.dtype for row in weights.values()} == {"fp32"}
    updates = {row.name for row in run.layers() if row.tensor == "update"}
    assert updates == trained


def test_half_norms_show_in_the_modules_types(recording: Recording) -> None:
    model = conv_net()
    model[1].half()
    recording.record(model, adam(model))
    about = recording.close().foreign()
    assert about is not None
    assert {m.name: (m.type, m.stored) for m in about.modules} == {
        "0": ("Conv2d", "fp32"),
        "1": ("BatchNorm2d", "fp16"),
        "5": ("Linear", "fp32"),
    }


def test_a_batch_norm_that_a_skipped_step_spoiled_is_named(recording: Recording) -> None:
    model = conv_net()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu")
    step = recording.record(model, optimizer, scaler, every=0)
    for number, (images, labels) in enumerate(batches(2)):
        with step(None):
            bad = images * (torch.inf if number else 1.0)
            scaler.scale(loss_of(model, (bad, labels))).backward()
            scaler.step(optimizer)
            scaler.update()
    spoiled = [e.name for e in recording.events(2) if e.event == "buffer_nonfinite"]
    assert spoiled == ["1.running_mean", "1.running_var"]
    assert "skipped_step" in names(recording.events(2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_that_a_skipped_step_changed_is_named(
    momentum: float, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused SGD makes its momentum out of uninitialized memory, in a skipped step too."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7.0))
    model = nn.Linear(36, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    step = recording.record(model, optimizer, scaler)
    for number, (images, labels) in enumerate(batches(2)):
        with step(None):
            optimizer.zero_grad()
            bad = images.flatten(1) * (1.0 if number else torch.inf)
            scaler.scale(loss_of(model, (bad, labels))).backward()
            scaler.step(optimizer)
            scaler.update()
    changed = [e.name for e in recording.events(1) if e.event == "state_changed"]
    assert changed == (["weight.momentum_buffer", "bias.momentum_buffer"] if momentum else [])
    assert "state_changed" not in names(recording.events(2))


def test_rows_are_written_when_what_happens_changes(recording: Recording) -> None:
    model = conv_net()
    optimizer = adam(model)
    step = recording.record(model, optimizer)
    for number in range(9):
        with step(None):
            optimizer.zero_grad()
            loss_of(model, next(batches())).backward()
            if number == 5:
                clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert [row.step for row in recording.close().events()] == [1, 6, 7]


def test_events_of_one_step_are_bounded(recording: Recording) -> None:
    model = nn.Linear(1, 1)
    step = recording.record(model, torch.optim.SGD(model.parameters()))
    with step(None):
        for _ in range(300):
            model(torch.ones(1)).backward()
    (row,) = recording.close().events()
    assert (len(row.events), row.left_out) == (200, 400)


def test_a_validation_inside_of_a_step_is_no_part_of_it(recording: Recording) -> None:
    model = conv_net()
    step = recording.record(model, adam(model))
    with step(None), torch.no_grad():
        model(next(batches())[0])
    assert list(recording.close().events()) == []


def scaled_twice(recording: Recording, backward: Any) -> tuple[list[LoopEvent], float]:
    """Two losses that are both scaled before the first backward; and their sum."""
    model = conv_net()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = recording.record(model, optimizer, scaler, every=1)
    with step(None):
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(next(batches())[0]).float()
        first, second = output.square().mean(), output.abs().mean()
        backward(scaler, first, second)
        scaler.step(optimizer)
        scaler.update()
    return recording.events(), (first + second).item()


def one_by_one(scaler: Any, first: Any, second: Any) -> None:
    one, other = scaler.scale(first), scaler.scale(second)
    one.backward(retain_graph=True)
    other.backward()


def kept_graph(scaler: Any, first: Any, second: Any) -> None:
    half = scaler.scale((first + second) / 2)
    half.backward(retain_graph=True)
    half.backward()


def as_a_list(scaler: Any, first: Any, second: Any) -> None:
    torch.autograd.backward(scaler.scale([first, second]))


def worked_on(scaler: Any, first: Any, second: Any) -> None:
    one, other = scaler.scale(first), scaler.scale(second)
    (one + other).backward()


def worked_on_and_gone(scaler: Any, first: Any, second: Any) -> None:
    (scaler.scale(first) + scaler.scale(second)).backward()


@pytest.mark.parametrize(
    "backward", [one_by_one, kept_graph, as_a_list, worked_on, worked_on_and_gone]
)
def test_losses_are_scaled_in_any_order(backward: Any, recording: Recording) -> None:
    events, total = scaled_twice(recording, backward)
    assert named(events, "unscale").gradients == "scaled"
    run = recording.close()
    (row,) = run.steps()
    assert (row.loss, row.scale) == (pytest.approx(total, rel=1e-3), 1024)
    scales = {row.scale for row in run.layers() if row.tensor in ("grad", "grad_output")}
    assert scales == {1024}
    outputs = [(row.name, row.call) for row in run.layers() if row.tensor == "grad_output"]
    assert len(set(outputs)) == len(outputs)


def test_a_loss_that_was_not_scaled_makes_gradients_mixed(recording: Recording) -> None:
    def backward(scaler: Any, first: Any, second: Any) -> None:
        one = scaler.scale(first)
        second.backward(retain_graph=True)
        one.backward()

    events, total = scaled_twice(recording, backward)
    assert named(events, "unscale").gradients == "mixed"
    assert next(recording.close().steps()).loss == pytest.approx(total, rel=1e-3)


def test_a_scaler_that_nobody_calls_scales_nothing(recording: Recording) -> None:
    model = conv_net()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = recording.record(model, optimizer, scaler, every=1)
    for batch in batches(2):
        with step(None):
            optimizer.zero_grad()
            unused = scaler.scale(torch.ones(()))  # which makes the scale, and is no loss
            assert unused == 1024
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
    rows = [row for row in recording.close().layers() if row.tensor in ("grad", "grad_output")]
    assert {row.scale for row in rows} == {1.0}
    assert all(row.shadow.error < 0.1 for row in rows if row.shadow)


def test_each_half_of_a_gan_has_the_backwards_that_reach_it(tmp_path: Any) -> None:
    from mpcli.recorder import Recorder
    from mpcli.rundir import RunDirectory

    made, judge = nn.Linear(4, 4), nn.Linear(4, 1)
    of_made = torch.optim.Adam(made.parameters())
    of_judge = torch.optim.Adam(judge.parameters())
    recorders = {
        "made": Recorder(made, of_made, out=tmp_path / "made"),
        "judge": Recorder(judge, of_judge, out=tmp_path / "judge"),
    }
    z = torch.randn(3, 4)
    with recorders["made"].step(z), recorders["judge"].step(z):
        of_judge.zero_grad()
        judge(made(z).detach()).mean().backward()
        of_judge.step()
        of_made.zero_grad()
        loss = -judge(made(z)).mean()
        loss.backward()
        of_made.step()
    backwards = {}
    for name, recorder in recorders.items():
        recorder.close()
        run = RunDirectory.read(tmp_path / name)
        (row,) = run.events()
        backwards[name] = [event.loss for event in row.events if event.event == "backward"]
        if name == "made":
            assert next(run.steps()).loss == pytest.approx(loss.item())
    assert [len(losses) for losses in backwards.values()] == [1, 2]


def test_an_optimizer_inside_of_backward_leaves_its_backward_in_the_record(
    recording: Recording,
) -> None:
    """It steps as gradients come and frees them: no gradient is there afterwards."""
    model = nn.Linear(4, 1)
    step = recording.record(model, torch.optim.SGD(model.parameters()))

    def free(parameter: Any) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(free)
    with step(None):
        model(torch.ones(1, 4)).sum().backward()
    assert "backward" in names(recording.events())


def test_the_norm_of_a_closure_s_first_gradients_is_recorded(recording: Recording) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    step = recording.record(model, optimizer)
    norms = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        return loss

    with step(None):
        optimizer.step(closure)
    (row,) = recording.close().steps()
    assert len(norms) > 1
    assert row.grad_norm == pytest.approx(norms[0])


def test_zeroing_between_micro_batches_leaves_no_shadow_of_the_gradients(
    recording: Recording,
) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = recording.record(model, optimizer, every=1)
    with step(None):
        for batch in batches(2):
            optimizer.zero_grad()  # in the wrong place: the first backward is lost
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
        optimizer.step()
    gradients = [row for row in recording.close().layers() if row.tensor == "grad"]
    assert gradients
    assert {row.shadow for row in gradients} == {None}


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_step_that_an_optimizer_leaves_out_itself_is_seen(
    spoilt: bool, recording: Recording
) -> None:
    from tests.diagnose.checks.test_foreign import scaled_by_hand

    scaled_by_hand(recording.record, called=True, spoilt=spoilt)
    events = recording.events(2)
    assert "skipped_step" not in names(recording.events(1))
    assert "skipped_step" in names(events)
    changed = [event.name for event in events if event.event == "state_changed"]
    assert bool(changed) == spoilt
    assert all(name and name.endswith(".momentum_buffer") for name in changed)
