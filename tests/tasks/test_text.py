"""The tasks on text: models of transformers, from a recipe to a folder that loads elsewhere."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.text import IGNORED
from mpcli.evaluation import evaluate, load_weights
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.records import Result
from mpcli.rundir import RunDirectory
from mpcli.tasks import (
    apply_activation_checkpointing,
    causal_lm,
    masked_lm,
    sequence_classification,
    task_of,
)
from tests.small import CPU, resume_small, run_small, small_recipe
from tests.stopped import Killed, assert_same_run, kill_at

MLM = """\
name: mlm
task:
  kind: masked-lm
  model:
    kind: config
    name: bert-tiny
    values: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}
data: {kind: text, sequence_length: 16, tokenizer: {kind: wordpiece, vocab_size: 200}}
precision: {mode: fp32}
optim: {kind: adamw, lr: 0.01}
train: {steps: 4, global_batch_size: 32}
eval: {every: null}
engine: {kind: local, device: cpu}
"""
GPT = """\
name: gpt
task:
  kind: causal-lm
  model: {kind: config, name: gpt2-tiny, values: {n_embd: 16, n_layer: 1, n_head: 2}}
data: {kind: text, sequence_length: 16, tokenizer: {kind: wordpiece, vocab_size: 200}}
precision: {mode: fp32}
optim: {kind: adamw, lr: 0.01}
train: {steps: 4, global_batch_size: 32}
eval: {every: null}
engine: {kind: local, device: cpu}
"""
FRESH = """\
  model:
    kind: config
    name: bert-tiny
    values: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}
"""
TOKENIZER = "tokenizer: {kind: wordpiece, vocab_size: 200}"
NO_DROPOUT = {
    MLM: ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    GPT: ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
BLOCKS = {
    MLM: ("task.model.values.num_hidden_layers=4",),
    # Keys that did not pass through a cache lie elsewhere: dropped attention then rounds otherwise.
    GPT: ("task.model.values.n_layer=4", "task.model.values.attn_pdrop=0.0"),
}


def rows(folder: Path, count: int = 64) -> Path:
    """A labelled set that can be learnt: label 1 has the word `good`."""
    for split in ("train", "validation"):
        lines = [f"a {'good' if n % 2 else 'bad'} film number {n},{n % 2}" for n in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n", "utf-8")
    return folder


def classification(folder: Path, model: str = FRESH, tokenizer: str = TOKENIZER) -> str:
    """A recipe for `rows`."""
    return f"""\
name: classification
task:
  kind: sequence-classification
{model}
data: {{kind: datasets, path: {rows(folder)}, sequence_length: 16, {tokenizer}}}
precision: {{mode: fp32}}
optim: {{kind: adamw, lr: 0.01}}
train: {{steps: 30, global_batch_size: 16}}
eval: {{every: null}}
engine: {{kind: local, device: cpu}}
"""


def finished(result: Result) -> dict[str, float]:
    """Its metrics."""
    assert (result.status, result.problems) == ("done", ())
    return result.metrics["eval"]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "fp16-master", "bf16-pure"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_was_planned_is_what_runs(tmp_path: Path, mode: str, attention: str) -> None:
    """`finished` refuses warnings: there is one where the types of a run differ from the plan's."""
    overrides = (f"precision.mode={mode}", f"task.attention={attention}", "train.steps=2")
    for number, task in enumerate((MLM, GPT)):
        _, result = run_small(tmp_path, *overrides, name=str(number), text=task)
        finished(result)


def test_the_softmax_of_eager_attention_can_be_kept_in_fp32(tmp_path: Path) -> None:
    softmax = "precision={mode: bf16-pure, sensitive_layers: [softmax]}"
    for attention in ("sdpa", "eager"):
        recipe = small_recipe(tmp_path, softmax, f"task.attention={attention}", text=MLM).recipe
        assert make_plan(recipe, CPU).modules


@pytest.mark.parametrize("task", [MLM, GPT], ids=["masked", "causal"])
def test_micro_batches_add_up_to_one_batch(tmp_path: Path, task: str) -> None:
    """They hold different numbers of tokens to guess: each must count as what it weighs."""
    dropout = [f"task.model.values.{name}=0.0" for name in NO_DROPOUT[task]]
    common = (*dropout, "optim={kind: sgd, lr: 0.5}")
    whole, _ = run_small(tmp_path, *common, name="whole", text=task)
    parts, _ = run_small(tmp_path, *common, "train.micro_batch_size=4", name="parts", text=task)
    for name in ("loss", "grad_norm"):
        for one, other in zip(step_rows(whole), step_rows(parts), strict=True):
            assert one[name] == pytest.approx(other[name], rel=1e-6)
    expected, found = (load_file(run.final_path / "model.safetensors") for run in (whole, parts))
    begun = initial(tmp_path, *common, text=task)
    moved = 0.0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        moved = max(moved, float((tensor - begun[name]).abs().max()))
    assert moved > 0.01


def initial(folder: Path, *overrides: str, text: str) -> dict[str, Tensor]:
    """The weights that a run begins with."""
    recipe = small_recipe(folder, *overrides, text=text).recipe
    task = task_of(recipe.task)
    data = task.load_data(recipe.task, recipe.data)
    torch.manual_seed(recipe.train.seed)
    return task.build_model(recipe.task, data.info).state_dict()


def test_the_micro_batches_of_that_test_weigh_differently(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, text=MLM).recipe
    data = masked_lm.load_data(recipe.task, recipe.data)
    weights = [part.weight for part in data.train_batch(0, 0, 32).split(4)]
    assert len(weights) == 8
    assert len(set(weights)) > 3


def step_rows(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "mode", ["fp32", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bf16", "fp16-master"))]
)
@pytest.mark.parametrize("text", [MLM, GPT], ids=["masked", "causal"])
def test_activation_checkpointing_changes_no_number(tmp_path: Path, text: str, mode: str) -> None:
    """Dropout included: what is computed again drops the same elements."""
    runs = []
    for chosen in ("false", "true"):
        overrides = (f"precision.mode={mode}", f"engine.activation_checkpointing={chosen}")
        run, result = run_small(tmp_path, *overrides, *BLOCKS[text], name=chosen, text=text)
        finished(result)
        runs.append(run)
    usual, ours = (load_file(run.final_path / "model.safetensors") for run in runs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in usual.items())
    usual_rows, our_rows = (
        [(row["loss"], row["grad_norm"]) for row in step_rows(run)] for run in runs
    )
    assert usual_rows == our_rows


@pytest.mark.parametrize("text", [MLM, GPT], ids=["masked", "causal"])
def test_activation_checkpointing_keeps_less_for_backward(tmp_path: Path, text: str) -> None:
    """A deep copy, as the average of weights is, recomputes with its own weights."""
    recipe: Any = small_recipe(tmp_path, *BLOCKS[text], text=text).recipe
    task = task_of(recipe.task)
    data = task.load_data(recipe.task, recipe.data)
    batch = data.train_batch(0, 0, 8)
    model = task.build_model(recipe.task, data.info)
    ours = copy.deepcopy(model)
    apply_activation_checkpointing(ours)
    twin = copy.deepcopy(ours)
    kept, gradients = [], []
    for built in (model, ours, twin):
        torch.manual_seed(0)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = task.loss(recipe.task, built, batch)
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append([parameter.grad for parameter in built.parameters()])
    assert max(kept[1:]) < 0.5 * kept[0]
    for usual, *others in zip(*gradients, strict=True):
        assert usual is not None
        assert all(torch.equal(usual, other) for other in others)


def test_activation_checkpointing_is_refused_where_a_model_has_no_blocks(tmp_path: Path) -> None:
    name = "task.model={kind: config, name: albert, values: {num_hidden_layers: 1}}"
    recipe = small_recipe(tmp_path, name, "engine.activation_checkpointing=true", text=MLM).recipe
    with pytest.raises(UserError, match="no blocks") as caught:
        make_plan(recipe, CPU)
    assert caught.value.problems[0].path == "engine.activation_checkpointing"


def test_a_run_with_dropout_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("output.checkpoint_every=2 steps", "train.steps=6", "eval.every=3 steps")
    whole, _ = run_small(tmp_path, *every, name="whole", text=MLM)
    with monkeypatch.context() as context, pytest.raises(Killed):
        kill_at(context, 4)
        run_small(tmp_path, *every, text=MLM)
    run = RunDirectory(tmp_path / "run")
    finished(resume_small(run))
    assert_same_run(run, whole)


LOGITS = """
import json, sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(folder).eval()
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
assert "mpcli" not in sys.modules
tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
logits = model(input_ids=ids).logits
json.dump([ids.tolist(), str(logits.dtype), tied, logits.tolist()], sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
def test_the_final_folder_gives_the_same_logits_without_this_program(
    tmp_path: Path, mode: str
) -> None:
    run, result = run_small(tmp_path, f"precision.mode={mode}", text=MLM)
    finished(result)
    recipe = small_recipe(tmp_path, text=MLM).recipe
    data = masked_lm.load_data(recipe.task, recipe.data)
    model = masked_lm.build_model(recipe.task, data.info).eval()
    # The masters of the last checkpoint, without transformers' own way to load them.
    state = masters(run, mode)
    model.load_state_dict(state, strict=False)
    text = "The statement is executed."
    ids = data.info.tokenizer(text, return_tensors="pt")["input_ids"]
    process = subprocess.run(
        [sys.executable, "-c", LOGITS, run.final_path, text],
        capture_output=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr.decode()
    found_ids, dtype, tied, logits = json.loads(process.stdout)
    assert found_ids == ids.tolist()
    assert (dtype, tied) == ("torch.float32", True)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-6)
    card = (run.final_path / "README.md").read_text()
    assert f"precision of the training: {mode}\n" in card
    assert "- perplexity on the evaluation data: " in card
    assert "kind: masked-lm" in card


def test_tied_weights_are_written_once_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    run, result = run_small(tmp_path, "output.final_dtype=bf16", text=MLM)
    finished(result)
    saved = load_file(run.final_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert [name for name in saved if saved[name].shape == (200, 16)] == [
        "bert.embeddings.word_embeddings.weight"
    ]
    assert json.loads((run.final_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("text", [MLM, GPT], ids=["masked", "causal"])
def test_the_final_model_is_evaluated_to_the_same_numbers(tmp_path: Path, text: str) -> None:
    run, result = run_small(tmp_path, text=text)
    recipe = small_recipe(tmp_path, text=text).recipe
    weights = load_weights(run, recipe)
    assert weights.name == "final"
    assert evaluate(recipe, make_plan(recipe, CPU), weights) == finished(result)


def masters(run: RunDirectory, mode: str) -> dict[str, Tensor]:
    from mpcli import checkpoint

    newest, _ = checkpoint.newest_valid(run.checkpoints_path)
    assert newest is not None
    tensors, _ = checkpoint.load(newest)
    kinds = ("model.", "master.") if "master" in mode else ("model.",)
    return {
        name.removeprefix(kind): tensor
        for kind in kinds
        for name, tensor in tensors.items()
        if name.startswith(kind)
    }


def test_classification_learns_from_fresh_weights(tmp_path: Path) -> None:
    _, result = run_small(tmp_path, text=classification(tmp_path))
    metrics = finished(result)
    assert metrics["accuracy"] == metrics["f1"] == 1.0
    assert metrics["loss"] < 0.1


def test_classification_begins_with_a_run_of_ours(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, name="mlm", text=MLM)
    for number, path in enumerate((run.path, run.final_path)):
        text = classification(tmp_path, f"  init_from: {path}", "tokenizer: null")
        one_step = ("train.steps=1", "optim.lr=1e-30")
        tuned, result = run_small(tmp_path, *one_step, name=str(number), text=text)
        finished(result)
        before, after = (load_file(r.final_path / "model.safetensors") for r in (run, tuned))
        shared = [name for name in after if name in before]
        assert len(shared) > 20
        assert all(torch.equal(before[name], after[name]) for name in shared)
        same = "tokenizer.json"
        assert (run.final_path / same).read_bytes() == (tuned.final_path / same).read_bytes()


def test_training_goes_on_from_a_folder_with_its_dropout(tmp_path: Path) -> None:
    """transformers loads models in evaluation mode."""
    run, _ = run_small(tmp_path, name="mlm", text=MLM)
    model = f"task.model={{kind: pretrained, path: {run.final_path}}}"
    recipe = small_recipe(tmp_path, model, "data.tokenizer=null", text=MLM).recipe
    data = masked_lm.load_data(recipe.task, recipe.data)
    built = masked_lm.build_model(recipe.task, data.info)
    assert all(module.training for module in built.modules())
    batch = data.train_batch(0, 0, 8)
    losses = {masked_lm.loss(recipe.task, built, batch)[0].item() for _ in range(2)}
    assert len(losses) == 2


def test_weights_that_could_execute_code_are_refused(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, name="mlm", text=MLM)
    weights = run.final_path / "model.safetensors"
    torch.save(load_file(weights), run.final_path / "pytorch_model.bin")
    weights.unlink()
    text = classification(tmp_path, f"  init_from: {run.path}", "tokenizer: null")
    recipe = small_recipe(tmp_path, text=text).recipe
    tokens = sequence_classification.load_data(recipe.task, recipe.data)
    with pytest.raises(UserError, match="no model can be had from") as caught:
        sequence_classification.build_model(recipe.task, tokens.info)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert "`model.safetensors`" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize(
    ("override", "path", "what"),
    [
        ("task.model.name=bertt-tiny", "task.model.name", "no model is called `bertt-tiny`"),
        ("task.model.values.hiden_size=8", "task.model.values.hiden_size", "no value `hiden_size`"),
        ("task.model.values.hidden_size=15", "task.model", "cannot be built"),
        ("task.model.values.vocab_size=100", "data.tokenizer", "200 entries, and the model 100"),
        ("data.sequence_length=513", "data.sequence_length", "at most 512 tokens"),
        ("task.model={kind: pretrained, path: absent}", "data.tokenizer", "no tokenizer can be"),
        (
            "task={kind: masked-lm, model: null, init_from: absent}",
            "task.init_from",
            "no trained model of text in",
        ),
    ],
)
def test_models_that_cannot_be(tmp_path: Path, override: str, path: str, what: str) -> None:
    own_tokenizer = ("data.tokenizer=null",) if "absent" in override else ()
    recipe = small_recipe(tmp_path, override, *own_tokenizer, text=MLM).recipe
    with pytest.raises(UserError, match=what) as caught:
        make_plan(recipe, CPU)
    assert caught.value.problems[0].path == path


def test_a_language_model_learns_from_one_column(tmp_path: Path) -> None:
    data = f"data={{kind: datasets, path: {rows(tmp_path)}, text_columns: [text, label]}}"
    recipe = small_recipe(tmp_path, data, text=MLM).recipe
    with pytest.raises(UserError, match="learns from one column") as caught:
        make_plan(recipe, CPU)
    assert caught.value.problems[0].path == "data.text_columns"


def test_a_language_model_learns_from_a_table(tmp_path: Path) -> None:
    folder = rows(tmp_path, 100)
    data = f"data={{kind: datasets, path: {folder}, sequence_length: 16, {TOKENIZER}}}"
    _, result = run_small(tmp_path, data, text=MLM)
    assert finished(result)["masked_accuracy"] >= 0


def test_pairs_are_classified(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        lines = [json.dumps({"a": "x", "b": "xy"[n % 2], "label": n % 2}) for n in range(32)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    text = classification(tmp_path)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").unlink()
    _, result = run_small(tmp_path, "data.text_columns=[a, b]", text=text)
    assert finished(result)["accuracy"] == 1.0


class Fixed(nn.Module):
    """Gives the same logits whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def test_metrics_of_classification_by_hand() -> None:
    guesses, truth = [0, 1, 1, 2, 2, 2], [0, 1, 0, 2, 2, 1]
    logits = nn.functional.one_hot(torch.tensor(guesses)).float()
    ids = torch.zeros(6, 1, dtype=torch.int64)
    tensors = {"input_ids": ids, "attention_mask": ids, "labels": torch.tensor(truth)}
    options: Any = None
    metrics = sequence_classification.evaluate(options, Fixed(logits), [Batch(tensors)])
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["f1"] == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    two = {**tensors, "labels": torch.tensor([0, 1, 1, 1, 0, 0])}
    logits = nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 0, 1])).float()
    metrics = sequence_classification.evaluate(options, Fixed(logits), [Batch(two)])
    assert metrics["f1"] == pytest.approx(2 / 3)


def test_metrics_of_language_models_by_hand() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 4, 5), torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    labels = torch.tensor([[1, 3], [2, IGNORED]])
    tensors = {"input_ids": ids, "positions": torch.tensor([[1, 3], [2, 0]]), "labels": labels}
    options: Any = None
    metrics = masked_lm.evaluate(options, Fixed(logits), [Batch(tensors, (2, 1))])
    chances = logits.softmax(2)
    expected = -torch.stack([chances[0, 1, 1], chances[0, 3, 3], chances[1, 2, 2]]).log().mean()
    assert metrics["loss"] == pytest.approx(expected.item())
    assert metrics["perplexity"] == pytest.approx(expected.exp().item())
    guessed = [logits[0, 1].argmax() == 1, logits[0, 3].argmax() == 3, logits[1, 2].argmax() == 2]
    assert metrics["masked_accuracy"] == pytest.approx(sum(map(int, guessed)) / 3)

    metrics = causal_lm.evaluate(options, Fixed(logits), [Batch({"input_ids": ids}, (3, 3))])
    places = itertools.product(range(2), range(3))
    expected = -torch.stack([chances[n, t, ids[n, t + 1]] for n, t in places]).log().mean()
    assert metrics["loss"] == pytest.approx(expected.item())


def test_transformers_is_imported_for_text_only() -> None:
    code = "import mpcli.trainer, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
