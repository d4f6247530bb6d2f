"""Faults of a loop's own calls, planted in real loops; and loops that are as they should be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from mpcli.diagnose.checks.loop import LOOP
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.facts import Facts
from mpcli.diagnose.finding import Finding
from tests.diagnose.checks.numeric_runs import evidence_of, odd_run
from tests.recorder.loops import LOOPS, adam, batches, bf16, conv_net, fp32, loss_of


def only(found: list[Finding], name: str) -> Finding:
    """The one finding of level warning or above."""
    (trouble,) = [finding for finding in found if finding.severity != "info"]
    assert trouble.id == name
    assert trouble.suggestion is not None and trouble.suggestion.code
    return trouble


def test_nothing_is_said_where_nothing_is_known():
    empty = Evidence(Facts(path="x", kind="file"))
    assert [finding for check in LOOP for finding in check(empty)] == []


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_that_is_as_it_should_be_gets_no_finding(loop, said):
    assert [f for f in said(loop, conv_net()) if f.severity != "info"] == []


def half(record, model=None, *, init_scale=1024.0, steps=4, optimizer=None, **calls):
    """An fp16 loop of which single calls can be replaced by a test's."""
    model = model or conv_net()
    optimizer = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    step = record(model, optimizer, scaler)
    for batch in batches(steps):
        with step(batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            calls["update"](model, optimizer, scaler)


def test_clipping_scaled_gradients_is_found(said):
    def update(model, optimizer, scaler):
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    found = only(said(lambda record: half(record, update=update)), "clip-before-unscale")
    assert (found.severity, found.phase, found.step) == ("error", "update", 1)
    assert found.evidence["limit_unscaled"] == 1 / 1024
    assert found.evidence["share_of_steps_clipped"] == 1
    assert "scaler.unscale_(optimizer)" in found.suggestion.code


def test_clipping_values_of_scaled_gradients_is_found(said):
    def update(model, optimizer, scaler):
        clip_grad_value_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()

    found = only(said(lambda record: half(record, update=update)), "clip-before-unscale")
    assert "clip_grad_value_(model.parameters(), 0.5)" in found.suggestion.code


def test_a_limit_that_was_multiplied_by_the_scale_is_no_fault(said):
    def update(model, optimizer, scaler):
        clip_grad_norm_(model.parameters(), 1.0 * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()

    assert said(lambda record: half(record, update=update)) == []


def test_a_step_on_scaled_gradients_is_found(said):
    found = only(
        said(lambda record: half(record, update=lambda model, optimizer, scaler: optimizer.step())),
        "missing-unscale",
    )
    assert (found.severity, found.step) == ("error", 1)
    assert found.evidence["loss_scale"] == 1024
    assert found.evidence["norm_used"] == pytest.approx(1024 * found.evidence["norm_unscaled"])


def test_unscaling_by_hand_is_no_fault(said):
    def update(model, optimizer, scaler):
        for parameter in model.parameters():
            parameter.grad.div_(scaler.get_scale())
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert said(lambda record: half(record, update=update)) == []


def accumulating(record, micro_step, *, zero=True, steps=4):
    """Three micro-batches for each step; `micro_step` is called after each of their backwards."""
    model = conv_net()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = record(model, optimizer, scaler)
    for images, labels in batches(steps):
        with step((images, labels)):
            if zero:
                optimizer.zero_grad()
            for part in range(3):
                micro = images[part * 2 : part * 2 + 2], labels[part * 2 : part * 2 + 2]
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = loss_of(model, micro) / 3
                scaler.scale(loss).backward()
                micro_step(optimizer, scaler, part)
            if zero is not None:
                scaler.step(optimizer)
                scaler.update()


def test_a_scale_that_is_updated_inside_of_a_window_is_found(said):
    def micro_step(optimizer, scaler, part):
        scaler.update(2.0 ** (10 + part))

    found = only(said(accumulating_with(micro_step)), "accumulation")
    assert "between the micro-batches" in found.cause


def test_unscaling_inside_of_a_window_is_found(said):
    def micro_step(optimizer, scaler, part):
        if part == 0:
            scaler.unscale_(optimizer)

    found = only(said(accumulating_with(micro_step)), "accumulation")
    assert "unscaled before all micro-batches" in found.cause
    assert (found.severity, found.step) == ("error", 1)


def test_stepping_at_every_micro_batch_without_zeroing_is_found(said):
    def micro_step(optimizer, scaler, part):
        if part < 2:
            scaler.step(optimizer)
            scaler.update()

    found = only(said(accumulating_with(micro_step)), "accumulation")
    assert "uses them again" in found.cause


def accumulating_with(micro_step):
    return lambda record: accumulating(record, micro_step)


def test_zeroing_that_was_forgotten_is_found(said):
    def loop(record):
        model = conv_net()
        optimizer = adam(model)
        step = record(model, optimizer)
        for batch in batches(4):
            with step(batch):
                loss_of(model, batch).backward()
                optimizer.step()

    found = only(said(loop), "accumulation")
    assert (found.severity, found.step) == ("error", 2)
    assert found.evidence["norm_left_over"] > 0
    assert "zero_grad" in found.suggestion.code


def test_a_loss_that_is_not_scaled_beside_one_that_is_is_found(said):
    def loop(record):
        model = conv_net()
        optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
        step = record(model, optimizer, scaler)
        for batch in batches():
            with step(batch):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = loss_of(model, batch)
                scaler.scale(loss).backward()
                sum(p.square().sum() for p in model.parameters()).backward()
                scaler.step(optimizer)
                scaler.update()

    found = only(said(loop), "accumulation")
    assert "some backwards are of a scaled loss" in found.cause


def test_micro_batches_that_are_recorded_one_by_one_are_no_fault(said):
    """`step` is meant around all of them; a loop that does otherwise trains as well."""

    def loop(record):
        model = conv_net()
        optimizer = adam(model)
        step = record(model, optimizer)
        for number, batch in enumerate(batches(6)):
            with step(batch):
                (loss_of(model, batch) / 2).backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()

    assert said(loop) == []


def test_gradients_that_another_loss_left_in_a_discriminator_are_no_fault(said):
    def loop(record):
        made, judge = nn.Linear(4, 4), nn.Linear(4, 1)
        of_made = torch.optim.Adam(made.parameters())
        of_judge = torch.optim.Adam(judge.parameters())
        step = record(judge, of_judge)
        for _ in range(3):
            z = torch.randn(3, 4)
            with step(z):
                of_judge.zero_grad()
                judge(torch.randn(3, 4)).mean().backward()
                judge(made(z).detach()).neg().mean().backward()
                of_judge.step()
                of_made.zero_grad()
                judge(made(z)).mean().backward()
                of_made.step()

    assert said(loop) == []


def test_a_closure_s_gradients_are_no_fault(said):
    def loop(record):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
        step = record(model, optimizer)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            with step(None):
                optimizer.step(closure)

    assert said(loop) == []


def test_a_scaler_without_autocast_is_found(said):
    def loop(record):
        model = conv_net()
        optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
        step = record(model, optimizer, scaler)
        for batch in batches():
            with step(batch):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch)).backward()
                scaler.step(optimizer)
                scaler.update()

    found = only(said(loop), "autocast-inactive")
    assert (found.severity, found.phase) == ("warning", "forward")
    assert "torch.autocast('cpu', dtype=torch.bfloat16)" in found.suggestion.code


def test_a_scaler_that_is_switched_off_in_fp32_is_no_fault(said):
    def loop(record):
        fp32(conv_net(), lambda m, o: record(m, o, torch.amp.GradScaler("cpu", enabled=False)))

    (found,) = said(loop)
    assert (found.id, found.severity) == ("autocast-inactive", "info")


class Island(nn.Linear):
    """A layer that somebody keeps out of autocast."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def with_island(size: int) -> nn.Module:
    """One whose weights are 3 x `size`, beside 36 + 64 x `size` others that multiply."""
    return nn.Sequential(*conv_net()[:4], nn.Linear(64, size), Island(size, 3))


def test_an_island_is_told_and_is_no_fault(said):
    (found,) = said(bf16, with_island(8), every=1)
    assert (found.id, found.severity, found.layers) == ("fp32-island", "info", ("5",))
    assert found.evidence["modules_given_half"] == 1
    assert found.evidence["values_cast_back_per_step"] == 6 * 3
    assert found.evidence["share_of_weights"] == pytest.approx(27 / (40 + 520 + 27), abs=1e-4)


def test_islands_that_are_most_of_the_work_are_a_fault(said):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), Island(3, 64), Island(64, 3))
    found = only(said(bf16, model), "fp32-island")
    assert found.layers == ("2", "3")


@pytest.mark.parametrize(("layers", "told"), [('"0", "3"', True), ('"4"', False)])
def test_sensitive_layers_that_hold_most_of_the_weights_are_told(tmp_path, layers, told):
    sensitive = f"precision.sensitive_layers=[ReLU, {layers}]"
    evidence = evidence_of(*odd_run(tmp_path, "none", "train.steps=2", sensitive), again=False)
    found = [finding for check in LOOP for finding in check(evidence)]
    assert [(one.id, one.severity, set(one.layers)) for one in found] == (
        [("fp32-island", "info", {"0", "3"})] if told else []
    )
    if told:
        assert found[0].suggestion.set == ("precision.sensitive_layers=[ReLU]",)


FUSED = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
    "adam": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}


def scaled_step(model, optimizer, scaler):
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("kind", FUSED)
def test_state_that_a_skipped_first_step_left_is_found(kind, said, monkeypatch):
    """torch's fused SGD makes its momentum of whatever is in memory, and then leaves it so."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7.0))
    found = said(
        lambda record: half(
            record, init_scale=2.0**40, steps=30, optimizer=FUSED[kind], update=scaled_step
        )
    )
    state = [finding for finding in found if finding.id == "optimizer-state-corrupted"]
    assert bool(state) == (kind == "sgd")
    if state:
        assert state[0].evidence["state"] == "momentum_buffer"
        assert "0" in state[0].layers
        assert "fused=False" in state[0].suggestion.code
