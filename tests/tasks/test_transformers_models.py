"""Models of transformers: what comes of a recipe's names and values, and of folders with models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.text.labelled import LabelledText
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.task import TEXT_MODELS
from mpcli.tasks import causal_lm, masked_lm, sequence_classification
from tests.small import CPU, run_small, small_recipe
from tests.tasks.test_text import GPT, MLM, classification, finished

WIDTHS = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32"


GPT2 = "n_embd: 16, n_layer: 1, n_head: 2"
XLNET = "d_model: 16, n_layer: 1, n_head: 2, d_inner: 32"


def with_model(text: str, name: str, values: str = WIDTHS) -> str:
    """A recipe with another model."""
    start, end = text.index("  model:"), text.index("data:")
    model = f"  model: {{kind: config, name: {name}, values: {{{values}}}}}\n"
    return text[:start] + model + text[end:]


def refused(folder: Path, *overrides: str, text: str) -> UserError:
    """How the plan refuses a recipe."""
    with pytest.raises(UserError) as caught:
        make_plan(small_recipe(folder, *overrides, text=text).recipe, CPU)
    return caught.value


def built(folder: Path, *overrides: str, task: Any, text: str) -> tuple[Any, nn.Module]:
    """A data set and a model in evaluation mode."""
    recipe = small_recipe(folder, *overrides, text=text).recipe
    data = task.load_data(recipe.task, recipe.data)
    torch.manual_seed(0)
    model: nn.Module = task.build_model(recipe.task, data.info)
    return data, model.eval()


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


# Causal models


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "gpt2", "llama"])
def test_what_comes_later_changes_no_earlier_logits(tmp_path: Path, name: str) -> None:
    text = with_model(GPT, name, GPT2 if name == "gpt2" else WIDTHS)
    data, model = built(tmp_path, task=causal_lm, text=text)
    tokens = data.train_batch(0, 0, 4)["input_ids"]
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 100
    before, after = logits(model, input_ids=tokens), logits(model, input_ids=other)
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=1e-6)
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-3


def test_an_encoder_that_was_trained_becomes_causal_and_back(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, name="mlm", text=MLM)
    recipe = "task={{kind: {}, model: null, init_from: {}}}"
    causal = recipe.format("causal-lm", run.path)
    own = "data.tokenizer=null"
    run, result = run_small(tmp_path, causal, own, name="causal", text=MLM)
    finished(result)
    assert json.loads((run.final_path / "config.json").read_text())["is_decoder"] is True
    masked = recipe.format("masked-lm", run.path)
    _, model = built(tmp_path, masked, own, task=masked_lm, text=MLM)
    one = torch.arange(8)[None]
    changed = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 9]])
    difference = logits(model, input_ids=one) - logits(model, input_ids=changed)
    assert difference[:, 0].abs().max() > 1e-4


def test_a_model_that_cannot_be_made_causal_is_refused(tmp_path: Path) -> None:
    text = with_model(GPT, "xlnet", XLNET)
    _, result = run_small(tmp_path, "task.attention=eager", text=text)
    assert (result.status, result.exit_code) == ("failed", Exit.USAGE)
    assert "sees the tokens that it has to guess" in str(result.reason)
    assert result.problems[0]["path"] == "task.model"


# Values of a config


def test_names_of_models_are_those_of_the_schema(tmp_path: Path) -> None:
    for name in TEXT_MODELS:
        text, task = (GPT, causal_lm) if name.startswith("gpt2") else (MLM, masked_lm)
        recipe = small_recipe(tmp_path, f"task.model={{kind: config, name: {name}}}", text=text)
        data = task.load_data(recipe.recipe.task, recipe.recipe.data)
        with torch.device("meta"):
            task.build_model(recipe.recipe.task, data.info)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("dtype", "bfloat16"), ("torch_dtype", "float16"), ("is_decoder", "true")),
        *(("return_dict", "false"), ("output_attentions", "true"), ("use_cache", "false")),
    ],
)
def test_values_that_are_not_the_model_are_refused(tmp_path: Path, name: str, value: str) -> None:
    error = refused(tmp_path, f"task.model.values.{name}={value}", text=MLM)
    assert error.exit_code == Exit.USAGE
    assert error.problems[0].path == f"task.model.values.{name}"
    assert error.problems[0].what.startswith(f"`{name}` cannot be set: ")


@pytest.mark.parametrize("value", ["type_vocab_size=0", "vocab_size=200.5"])
def test_values_that_no_model_can_have_are_refused(tmp_path: Path, value: str) -> None:
    error = refused(tmp_path, f"task.model.values.{value}", text=MLM)
    assert (error.exit_code, error.problems[0].path) == (Exit.USAGE, "task.model")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bertt-tiny", "did you mean `bert-tiny`?"),
        ("gpt2-small", f"such as {', '.join(f'`{n}`' for n in list(TEXT_MODELS)[:-1])} or"),
    ],
)
def test_hints_to_names_are_few(tmp_path: Path, name: str, hint: str) -> None:
    error = refused(tmp_path, f"task.model.name={name}", text=MLM)
    assert str(error.problems[0].hint).startswith(hint)


@pytest.mark.parametrize("name", ["zzz", "_name_or_path"])
def test_hints_to_values_do_not_list_them(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path, f"task.model.values.{name}=1", text=MLM)
    assert error.problems[0].what == f"the config of `bert` has no value `{name}`"
    assert error.problems[0].hint is None


def test_a_model_that_needs_more_than_a_text_is_refused(tmp_path: Path) -> None:
    values = "d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32, d_kv: 8"
    error = refused(tmp_path, text=with_model(classification(tmp_path), "t5", values))
    assert (error.exit_code, error.problems[0].path) == (Exit.USAGE, "task.model")
    assert "cannot learn from a batch of" in error.problems[0].what


def test_positions_that_begin_after_the_padding_are_counted(tmp_path: Path) -> None:
    def roberta(longest: int) -> str:
        return with_model(MLM, "roberta", f"{WIDTHS}, max_position_embeddings: {longest}")

    error = refused(tmp_path, text=roberta(16))
    assert error.problems[0].path == "data.sequence_length"
    assert error.problems[0].what == "the model takes at most 15 tokens"
    assert "`max_position_embeddings: 17`" in str(error.problems[0].hint)
    finished(run_small(tmp_path, text=roberta(17))[1])


def test_models_without_a_longest_text_take_any(tmp_path: Path) -> None:
    text = with_model(classification(tmp_path), "xlnet", XLNET)
    recipe = small_recipe(tmp_path, "task.attention=eager", text=text).recipe
    assert make_plan(recipe, CPU).parameters > 0


def test_models_without_fused_attention_say_so(tmp_path: Path) -> None:
    error = refused(tmp_path, text=with_model(MLM, "mpnet"))
    assert error.problems[0].path == "task.attention"
    assert error.problems[0].hint == "use `attention: eager`"


# Folders with models


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a masked language model."""
    run, _ = run_small(tmp_path, name="mlm", text=MLM)
    return run.final_path


def loaded(folder: Path) -> tuple[str, str]:
    return f"task.model={{kind: pretrained, path: {folder}}}", "data.tokenizer=null"


def change(folder: Path, **values: Any) -> None:
    """Change values of a model's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_type_that_a_folder_names_is_that_of_its_weights_alone(
    tmp_path: Path, trained: Path
) -> None:
    change(trained, dtype="bfloat16")
    recipe = small_recipe(tmp_path, *loaded(trained), text=MLM).recipe
    assert {row.stored for row in make_plan(recipe, CPU).modules} <= {"fp32", "-"}
    run, result = run_small(tmp_path, *loaded(trained), text=MLM)
    finished(result)
    assert {t.dtype for t in load_file(run.final_path / "model.safetensors").values()} == {
        torch.float32
    }


def test_what_a_folder_says_of_outputs_cannot_spoil_a_run(tmp_path: Path, trained: Path) -> None:
    change(trained, return_dict=False, output_attentions=True, output_hidden_states=True)
    finished(run_small(tmp_path, *loaded(trained), text=MLM)[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loaded_models_have_the_attention_that_is_asked_for(
    tmp_path: Path, trained: Path, attention: str
) -> None:
    override = f"task.attention={attention}"
    _, model = built(tmp_path, *loaded(trained), override, task=masked_lm, text=MLM)
    of_the_model: Any = model.config
    assert of_the_model._attn_implementation == attention


def test_weights_keep_their_own_tokenizer(tmp_path: Path, trained: Path) -> None:
    place = loaded(trained)[0]
    finished(run_small(tmp_path, place, name="same", text=MLM)[1])  # learnt anew from the same text
    for other in ("vocab_size=199", "lowercase=false"):
        error = refused(tmp_path, place, f"data.tokenizer.{other}", text=MLM)
        assert (error.exit_code, error.problems[0].path) == (Exit.USAGE, "data.tokenizer")
        assert error.problems[0].hint == "use the model's own: `data.tokenizer: null`"


def test_weights_without_a_tokenizer_take_one_of_their_size(tmp_path: Path, trained: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (trained / name).unlink()
    finished(run_small(tmp_path, loaded(trained)[0], text=MLM)[1])


def test_a_classifier_of_other_labels_is_refused(tmp_path: Path) -> None:
    text = classification(tmp_path)
    run, _ = run_small(tmp_path, "train.steps=1", text=text)
    for split in ("train", "validation"):
        file = tmp_path / f"{split}.csv"
        file.write_text(file.read_text() + "a fine film,2\n")
    begun = text.replace(text[text.index("  model:") : text.index("data:")], "  init_from: RUN\n")
    error = refused(tmp_path, "data.tokenizer=null", text=begun.replace("RUN", str(run.path)))
    assert (error.exit_code, error.problems[0].path) == (Exit.USAGE, "task.init_from")
    assert "tells 2 labels apart, and the data has 3" in error.problems[0].what


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, trained: Path) -> None:
    touched = tmp_path / "touched"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (trained / f"{name}.py").write_text(f"open({str(touched)!r}, 'w').close()\n")
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForMaskedLM": "modeling_own.OwnModel",
    }
    change(trained, auto_map=auto_map)
    tokenizer = trained / "tokenizer_config.json"
    of_tokens = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | of_tokens))
    finished(run_small(tmp_path, *loaded(trained), text=MLM)[1])
    change(trained, model_type="own")
    assert refused(tmp_path, *loaded(trained), text=MLM).exit_code == Exit.ENVIRONMENT
    assert not touched.exists()


# Classification


def pairs(folder: Path) -> str:
    """A recipe for pairs of texts of different lengths."""
    text = classification(folder)
    for split in ("train", "validation"):
        lines = ["a,b,label", *(f"{'good ' * n}film,bad film,{n % 2}" for n in range(1, 6))]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return text


def task_logits(model: nn.Module, batch: Batch) -> Tensor:
    """What the task learns from."""
    with torch.no_grad():
        return sequence_classification._logits(model, batch)


def classified(
    folder: Path, *overrides: str, model: tuple[str, str] = ("bert", WIDTHS)
) -> tuple[LabelledText, nn.Module]:
    columns, text = "data.text_columns=[a, b]", with_model(pairs(folder), *model)
    found: tuple[LabelledText, nn.Module] = built(
        folder, columns, *overrides, task=sequence_classification, text=text
    )
    return found


def test_padding_changes_no_logits(tmp_path: Path) -> None:
    data, model = classified(tmp_path)
    (batch,) = data.eval_batches(5)
    assert not batch["attention_mask"].all()
    alone = torch.cat([task_logits(model, part) for part in data.eval_batches(1)])
    shorter = next(data.eval_batches(1))["input_ids"]
    assert shorter.shape[1] < batch["input_ids"].shape[1]
    torch.testing.assert_close(task_logits(model, batch), alone, rtol=0, atol=1e-6)


def test_the_second_text_is_told_from_the_first(tmp_path: Path) -> None:
    data, model = classified(tmp_path)
    (batch,) = data.eval_batches(5)
    of_one_type = Batch({**batch.tensors, "token_type_ids": batch["token_type_ids"] * 0})
    difference = task_logits(model, batch) - task_logits(model, of_one_type)
    assert difference.abs().max() > 1e-5


@pytest.mark.parametrize(
    ("name", "values"), [("roberta", f"{WIDTHS}, type_vocab_size: 1"), ("gpt2", GPT2)]
)
def test_types_are_kept_from_models_that_do_not_know_them(
    tmp_path: Path, name: str, values: str
) -> None:
    data, network = classified(tmp_path, model=(name, values))
    (batch,) = data.eval_batches(5)
    plain = logits(network, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(task_logits(network, batch), plain)


def test_a_gpt_without_padding_classifies_by_the_last_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run, _ = run_small(tmp_path, name="gpt", text=GPT)
    folder = tmp_path / "plain"
    shutil.copytree(run.final_path, folder)
    change(folder, pad_token_id=None)
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    data, model = classified(tmp_path, *loaded(folder))
    assert data.info.tokenizer.pad_token_id is None
    (batch,) = data.eval_batches(5)
    alone = torch.cat([task_logits(model, part) for part in data.eval_batches(1)])
    torch.testing.assert_close(task_logits(model, batch), alone, rtol=0, atol=1e-6)
    finished(
        run_small(
            tmp_path,
            *loaded(folder),
            "data.text_columns=[a, b]",
            name="tuned",
            text=pairs(tmp_path).replace("global_batch_size: 16", "global_batch_size: 4"),
        )[1]
    )
