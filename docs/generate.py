"""Write the parts of the documentation that follow from the code (`make docs`)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from mpcli.recipe.errors import UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.reference import json_schema, recipe_reference
from mpcli.recipe.render import render_problem, visible

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = ROOT / "tests" / "recipe" / "mistakes"
BEGIN = "<!-- recipe reference: begin (make docs) -->"
END = "<!-- recipe reference: end -->"


def main() -> None:
    for name, text in GENERATED.items():
        (ROOT / name).write_text(text(), encoding="utf-8")
        print(f"wrote {name}")


def schema() -> str:
    """The JSON schema that the shipped recipes name in their modeline."""
    return json.dumps(json_schema(), indent=2) + "\n"


def readme() -> str:
    """The README with the recipe reference between its markers."""
    before, begin, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the line `{BEGIN}` or `{END}`")
    return f"{before}{begin}\n\n{recipe_reference()}\n{end}{after}"


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
}


if __name__ == "__main__":
    main()
