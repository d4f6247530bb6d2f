"""The Hugging Face Trainer, with three lines more."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli.flight import flights, load_flight
from mpcli.recipe.errors import Exit, UserError
from mpcli.recorder import HFRecorder
from mpcli.rundir import RunDirectory

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """16 random ones of 8 tokens, with labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(5, 50, (16, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        mask = torch.ones(8, dtype=torch.long)
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens[0] % 2}


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def trainer(tmp_path: Path, model: nn.Module, **arguments: Any) -> Any:
    """Of 4 steps, unless said otherwise."""
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
    }
    defaults |= {"save_strategy": "no"}
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **(defaults | arguments),
    )
    return transformers.Trainer(model=model, args=settings, train_dataset=Sentences())


@pytest.fixture(autouse=True)
def _fresh_accelerate(caplog: pytest.LogCaptureFixture) -> Any:
    """Accelerate remembers the precision of the first Trainer of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bf16": True, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_the_trainer_trains_as_it_does_alone(arguments: dict[str, Any], tmp_path: Path) -> None:
    alone, recorded = bert(), bert()
    trainer(tmp_path, alone, **arguments).train()
    random_alone = torch.get_rng_state()
    other = trainer(tmp_path, recorded, **arguments)
    recorder = HFRecorder(other, out=tmp_path / "run", every=2)
    other.train()
    recorder.close()
    assert torch.equal(torch.get_rng_state(), random_alone)
    for (name, value), theirs in zip(
        recorded.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        assert torch.equal(value, theirs), name
    run = RunDirectory.read(tmp_path / "run")
    assert [row.step for row in run.steps()] == [1, 2, 3, 4]
    assert {row.step for row in run.layers()} == {1, 2, 4}
    assert "train" not in vars(other) and "training_step" not in vars(other)


def test_a_run_directory_is_written(tmp_path: Path) -> None:
    training = trainer(tmp_path, bert(), gradient_accumulation_steps=2, bf16=True)
    HFRecorder(training, out=tmp_path / "run")
    losses = training.train().training_loss
    run = RunDirectory.read(tmp_path / "run")
    about, result = run.foreign(), run.result()
    assert about is not None and result is not None
    assert (about.loop, about.model) == ("transformers", "BertForSequenceClassification")
    assert about.settings["mixed_precision"] == "bf16"
    assert about.settings["gradient_accumulation_steps"] == 2
    assert (result.status, result.steps_applied) == ("done", 4)
    rows = list(run.steps())
    assert sum(row.loss for row in rows) / len(rows) == pytest.approx(losses)
    first = next(run.events())
    seen = [event.event for event in first.events]
    assert seen == [
        *("forward", "backward") * 2,
        *("clip_norm", "optimizer_step", "zero_grad"),
    ]
    assert first.events[0].autocast == "bf16"
    assert run.observed()["bert.encoder.layer.0.attention.self.query"].computed == "bf16"


def test_fp16_on_a_cpu_that_trains_in_fp32_is_seen(tmp_path: Path) -> None:
    try:
        training = trainer(tmp_path, bert(), fp16=True)
        HFRecorder(training, out=tmp_path / "run")
        training.train()
    except ValueError as error:  # a version that refuses
        pytest.skip(str(error))
    run = RunDirectory.read(tmp_path / "run")
    about = run.foreign()
    assert about is not None
    assert about.settings["fp16"] is True
    forward = next(event for event in next(run.events()).events if event.event == "forward")
    computed = run.observed()["bert.encoder.layer.0.attention.self.query"].computed
    assert (forward.autocast == "off") == (computed == "fp32")


class HalfInside(nn.Module):
    """A module somebody made half, whose squares leave the range of fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(16, 16).half()
        self.grown = 1.0

    def forward(self, x: Tensor) -> Tensor:
        half = self.line(x.half()) * self.grown
        return (half * half).to(x.dtype)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.narrow = HalfInside()
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Any:
        x = self.embedding(input_ids).mean(dim=1)
        logits = self.head(self.norm(self.narrow(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_half_module_that_overflows_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Classifier()
    training = trainer(tmp_path, model, learning_rate=1e-4, max_grad_norm=0.0)

    class Growing(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.narrow.grown = 1e4 if state.global_step == 2 else 1.0

    training.add_callback(Growing())
    recorder = HFRecorder(training, out=tmp_path / "run")
    training.train()
    recorder.close()
    found = flights(RunDirectory.read(tmp_path / "run"))[0]
    assert found.step == 3
    assert found.origin is not None
    assert (found.origin.module, found.origin.phase) == ("narrow", "forward")
    assert "step 3: the first inf was made by `narrow`, in forward" in caplog.text
    kept = load_flight(RunDirectory.read(tmp_path / "run"), 3)
    assert kept["batch.[0]['input_ids']"].shape == (4, 8)


def test_a_bf16_bert_that_becomes_nan_is_named(tmp_path: Path) -> None:
    model = bert()
    training = trainer(tmp_path, model, bf16=True)

    class Spoiled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            return output / (output - output) if training.state.global_step == 1 else output

    model.bert.encoder.layer[1].output.dense.__class__ = Spoiled
    recorder = HFRecorder(training, out=tmp_path / "run")
    training.train()
    recorder.close()
    found = flights(RunDirectory.read(tmp_path / "run"))[0]
    assert found.step == 2
    assert found.origin is not None
    assert found.origin.module == "bert.encoder.layer.1.output.dense"
    assert found.origin.phase == "forward"


def test_an_exception_closes_the_record_and_is_the_trainer_s_own(tmp_path: Path) -> None:
    model = bert()
    training = trainer(tmp_path, model)

    class Ends(transformers.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError("mine")

    training.add_callback(Ends())
    HFRecorder(training, out=tmp_path / "run")
    with pytest.raises(ZeroDivisionError, match="mine"):
        training.train()
    result = RunDirectory.read(tmp_path / "run").result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "ZeroDivisionError: mine")
    assert "train" not in vars(training)


def test_an_error_of_the_data_is_in_the_record(tmp_path: Path) -> None:
    training = trainer(tmp_path, bert())

    class Broken(Sentences):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if training.state.global_step == 2:
                raise RuntimeError("bad sample")
            return super().__getitem__(index)

    training.train_dataset = Broken()
    HFRecorder(training, out=tmp_path / "run")
    with pytest.raises(RuntimeError, match="bad sample"):
        training.train()
    result = RunDirectory.read(tmp_path / "run").result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "RuntimeError: bad sample")


def test_a_training_that_is_resumed_counts_on(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, bert(), **arguments).train()
    training = trainer(tmp_path, bert(), max_steps=6, **arguments)
    HFRecorder(training, out=tmp_path / "run")
    training.train(resume_from_checkpoint=str(tmp_path / "hf" / "checkpoint-4"))
    assert [row.step for row in RunDirectory.read(tmp_path / "run").steps()] == [5, 6]


def test_a_disk_that_is_gone_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = trainer(tmp_path, bert())

    class Gone(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                shutil.rmtree(tmp_path / "run")

    training.add_callback(Gone())
    HFRecorder(training, out=tmp_path / "run")
    training.train()
    assert training.state.global_step == 4
    assert "the end of the record was lost" in caplog.text
    caplog.clear()


def test_a_second_training_is_the_trainer_s_alone(tmp_path: Path) -> None:
    training = trainer(tmp_path, bert())
    recorder = HFRecorder(training, out=tmp_path / "run")
    training.train()
    training.train()
    recorder.close()
    assert len(list(RunDirectory.read(tmp_path / "run").steps())) == 4


def test_what_is_no_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes a Hugging Face Trainer, not a Linear") as refused:
        HFRecorder(nn.Linear(1, 1), out=tmp_path)
    assert refused.value.exit_code == Exit.USAGE


def test_a_run_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    training = trainer(tmp_path, bert())
    HFRecorder(training, out=tmp_path)
    with pytest.raises(UserError, match="not empty"):
        training.train()
