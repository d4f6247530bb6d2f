"""A recorder changes nothing of the training that it watches."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.recorder.conftest import Recording
from tests.recorder.loops import LOOPS, adam, batches, conv_net, fp16, fp32, loss_of, unrecorded


def trained(name: str, record: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and buffers after a loop, and the state of random numbers."""
    model = conv_net()
    LOOPS[name](model, record)
    return model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("every", [0, 1])
def test_weights_and_random_numbers_are_those_of_the_loop_alone(
    name: str, every: int, recording: Recording
) -> None:
    alone, random_alone = trained(name, unrecorded)
    recorded, random_recorded = trained(name, lambda *args: recording.record(*args, every=every))
    recording.close()
    assert torch.equal(random_recorded, random_alone)
    for key, value in alone.items():
        assert torch.equal(recorded[key], value), key


def everything_global() -> dict[str, Any]:
    clip_grad = torch.nn.utils.clip_grad
    return {
        "backward": torch.autograd.backward,
        **{f"clip_grad.{name}": value for name, value in vars(clip_grad).items()},
        **{f"Module.{name}": value for name, value in vars(nn.Module).items()},
        **{f"Optimizer.{name}": value for name, value in vars(torch.optim.Optimizer).items()},
        "modes": len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "kernel": torch._C._dispatch_dump("aten::softmax.int"),
        "threads": torch.get_num_threads(),
    }


def test_nothing_stays_replaced_or_hooked_after_a_step(recording: Recording) -> None:
    before = everything_global()
    model = conv_net()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu")
    attributes = [set(vars(thing)) for thing in (model, optimizer, scaler)]
    step = recording.record(model, optimizer, scaler, every=1)
    assert everything_global() == before
    for number, batch in enumerate(batches(3)):
        with step(batch):
            images = batch[0] * (torch.nan if number == 1 else 1.0)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, (images, batch[1]))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert everything_global() == before
        assert [set(vars(thing)) for thing in (model, optimizer, scaler)] == attributes
        for module in model.modules():
            hooks = [value for name, value in vars(module).items() if name.endswith("_hooks")]
            assert not any(hooks)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    recording.close()
    assert everything_global() == before


def test_nothing_stays_after_a_step_that_an_exception_left(recording: Recording) -> None:
    before = everything_global()
    model = conv_net()
    step = recording.record(model, adam(model))
    with pytest.raises(ZeroDivisionError), step(None):
        loss_of(model, next(batches())).backward()
        _ = 1 / 0
    assert everything_global() == before


def test_a_copy_of_the_model_made_inside_a_step_is_an_ordinary_model(recording: Recording) -> None:
    model = conv_net()
    optimizer = adam(model)
    step = recording.record(model, optimizer, every=1)
    with step(None):
        average = copy.deepcopy(model)
        loss_of(model, next(batches())).backward()
        kept = model[0].weight.grad.clone()
        average.zero_grad()
        assert torch.equal(model[0].weight.grad, kept)
        optimizer.step()
    num_events = len(recording.events())
    loss_of(average, next(batches())).backward()
    assert len(recording.events()) == num_events


def test_another_thread_trains_on_unseen(recording: Recording) -> None:
    model, other = conv_net(), conv_net()
    optimizer = adam(model)
    step = recording.record(model, optimizer, every=0)
    with step(None):
        thread = threading.Thread(target=fp32, args=(other, unrecorded))
        thread.start()
        thread.join()
        loss_of(model, next(batches())).backward()
        optimizer.step()
    assert [event.event for event in recording.events()].count("backward") == 1


@pytest.mark.parametrize(
    "broken",
    [
        *("step.find_origin", "step.observed_types", "loop.keep_flight", "loop.num_samples"),
        *("events.gradient_norm", "events.floating_tensors", "events.LoopEvent"),
        *("origin.floating_tensors", "log.EventLog.read"),
    ],
)
def test_a_failure_of_the_recorder_is_told_and_changes_no_training(
    broken: str, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug of the recorder")

    monkeypatch.setattr(f"mpcli.recorder.{broken}", fail)
    alone, _ = trained("fp16", unrecorded)
    model = conv_net()
    fp16(model, recording.record)
    errors = [r for r in recording.caplog.records if r.levelname == "ERROR"]
    assert 1 <= len(errors) <= 3
    assert "a bug of the recorder" in recording.caplog.text
    recording.caplog.clear()
    for key, value in model.state_dict().items():
        assert torch.equal(value, alone[key]), key


def test_nothing_of_a_step_is_kept_after_it(recording: Recording) -> None:
    import gc
    import weakref

    model = conv_net()
    optimizer = adam(model)
    step = recording.record(model, optimizer, every=1)
    gone = []
    for images, labels in batches(2):
        with step({"images": images}):
            output = model(images)
            loss = nn.functional.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        gone += [weakref.ref(tensor) for tensor in (images, output, loss)]
    del images, labels, output, loss
    gc.collect()
    assert [reference() is None for reference in gone] == [True] * 6
