"""Write the parts of the documentation that follow from the code (`make docs`)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import torch

from mpcli.engines import mode_problems
from mpcli.precision.formats import dtype_name
from mpcli.precision.numerics import numerics
from mpcli.recipe.errors import UserError
from mpcli.recipe.fields import kind_of, kinds
from mpcli.recipe.load import load_recipe
from mpcli.recipe.precision import Mode
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.reference import json_schema, recipe_reference
from mpcli.recipe.render import render_problem, visible

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = ROOT / "tests" / "recipe" / "mistakes"


def main() -> None:
    for name, text in GENERATED.items():
        (ROOT / name).write_text(text(), encoding="utf-8")
        print(f"wrote {name}")


def schema() -> str:
    """The JSON schema that the shipped recipes name in their modeline."""
    return json.dumps(json_schema(), indent=2) + "\n"


def readme() -> str:
    """The README with the plug-in's example and the recipe reference between their markers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    plugin = (ROOT / "recipes" / "plugin" / "plugin.py").read_text(encoding="utf-8")
    text = between(text, "plug-in", f"```python\n{plugin}```\n")
    return between(text, "recipe reference", recipe_reference())


def precision() -> str:
    """The page on precision with the tables that follow from the modes' definitions."""
    text = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    for name, table in (
        ("formats", formats_table()),
        ("modes", modes_table()),
        ("bytes", bytes_table()),
        ("engines", engines_table()),
    ):
        text = between(text, name, table)
    return text


def between(text: str, name: str, content: str, by: str = "make docs") -> str:
    """`text` with `content` between the markers of `name`, which say what writes it."""
    begin, end = f"<!-- {name}: begin ({by}) -->", f"<!-- {name}: end -->"
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise ValueError(f"the line `{begin}` or `{end}` is missing")
    return f"{before}{begin}\n\n{content}\n{end}{after}"


def table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def formats_table() -> str:
    """Limits of each number format; TF32 has fp32's exponent and fp16's mantissa."""
    rows = []
    for name, dtype in (
        ("fp32", torch.float32),
        ("tf32", None),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
    ):
        info = torch.finfo(dtype or torch.float32)
        mantissa = 10 if dtype is None else round(-math.log2(info.eps))
        largest = (2 - 2.0**-mantissa) * 2.0 ** math.floor(math.log2(info.max / 1.0000001))
        smallest = round(math.log2(info.tiny))
        rows.append(
            (
                f"`{name}`",
                32 if dtype is None else info.bits,
                mantissa,
                f"2^-{mantissa}",
                f"{largest:.5g}",
                f"2^{smallest}",
                f"2^{smallest - mantissa}",
            )
        )
    head = ("format", "bits", "of mantissa", "step at 1", "largest", "smallest normal", "smallest")
    return table(head, rows)


def modes_table() -> str:
    """What a mode stores and computes."""
    rows = []
    for mode in get_args(Mode):
        meaning = numerics(mode)
        half = meaning.compute_name
        compute = f"{half} where it is safe" if meaning.autocast else half
        if meaning.masters:
            masters = "fp32 copy, stepped by the optimizer"
        else:
            masters = "the weights" if meaning.autocast else "-"
        stored = dtype_name(meaning.weights)
        weights = f"{stored}, norms fp32" if meaning.masters else stored
        gradients = f"{stored}, accumulated in fp32" if meaning.masters else stored
        state = "fp32" if meaning.masters else stored
        rows.append((f"`{mode}`", weights, compute, gradients, masters, state))
    head = ("mode", "weights", "compute", "gradients", "master weights", "optimizer state")
    return table(head, rows)


def bytes_table() -> str:
    """Bytes that a parameter costs, and the optimizer's share."""
    rows = []
    for mode in get_args(Mode):
        meaning = numerics(mode)
        stored = meaning.weights.itemsize
        masters = 4 if meaning.masters else 0
        gradient = 4 if meaning.masters else stored
        adam = 2 * (4 if meaning.masters else stored)
        transient = 2 if meaning.masters or meaning.autocast else 4 if stored == 2 else 0
        total = stored + masters + gradient + adam
        rows.append(
            (f"`{mode}`", stored, masters, gradient, adam, f"**{total}**", transient or "-")
        )
    head = ("mode", "weight", "master", "gradient", "Adam's state", "together", "for a while")
    return table(head, rows)


def engines_table() -> str:
    """Mode x engine, from the engines' own refusals."""
    engines = list(kinds(Recipe.model_fields["engine"]).values())
    rows = []
    for mode in get_args(Mode):
        refusals = [
            mode_problems(engine(kind=kind_of(engine)), numerics(mode)) for engine in engines
        ]
        rows.append((f"`{mode}`", *("; ".join(found) or "yes" for found in refusals)))
    return table(("mode", *(f"`{kind_of(engine)}`" for engine in engines)), rows)


def recipe_errors() -> str:
    """Every seeded recipe mistake with the message it gives."""
    blocks = [
        "# What `mptrain check` says about recipe mistakes",
        "Each recipe is a file of `tests/recipe/mistakes`; `make docs` writes this page and a test "
        "holds every message to it. A first line `# --set ...` stands for command-line options.",
    ]
    for path in sorted(MISTAKES.glob("*.yaml")):
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
        shown = "\n".join(visible(line) for line in re.split(r"\r\n|\r|\n", text.rstrip()))
        title = path.stem.replace("-", " ")
        blocks += [f"## {title}", f"```yaml\n{shown}\n```", f"```text\n{message(path)}\n```"]
    return "\n\n".join(blocks) + "\n"


def message(path: Path) -> str:
    """What is said about a recipe with mistakes."""
    first = path.read_bytes().partition(b"\n")[0].decode(errors="replace")
    overrides = re.findall(r"--set (\S+)", first) if first.startswith("#") else []
    before = Path.cwd()
    os.chdir(path.parent)  # messages name files as they were typed
    try:
        load_recipe(path.name, overrides)
    except UserError as error:
        return "\n".join(render_problem(problem) for problem in error.problems)
    finally:
        os.chdir(before)
    raise ValueError(f"{path.name} holds no mistake")


GENERATED = {
    "recipes/mptrain.schema.json": schema,
    "docs/recipe-errors.md": recipe_errors,
    "README.md": readme,
    "docs/precision.md": precision,
}


if __name__ == "__main__":
    main()
