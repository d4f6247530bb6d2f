"""What holds for every command: help, usage errors, exit codes, no torch on import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from mpcli import __version__
from mpcli.cli import check as check_command
from mpcli.cli.errors import guarded
from mpcli.recipe.errors import Exit, UserError, user_error

COMMANDS = ("run", "check", "plan", "init", "schema", "env")


def test_importing_the_command_line_loads_neither_torch_nor_the_recipe_reader():
    code = (
        "import sys, mpcli.cli.app; "
        "print({'torch', 'torchvision', 'numpy', 'yaml', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "arguments", ["--help", "init", "schema", "check recipe.yaml", "chekc", "check missing.yaml"]
)
def test_light_commands_never_import_torch(arguments, recipe):
    recipe.rename(recipe.with_name("recipe.yaml"))
    code = (
        "import sys; from mpcli.cli.app import main; "
        f"main({arguments.split()!r}); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr


def test_without_arguments_it_prints_the_help(mptrain):
    outcome = mptrain()
    assert outcome.code == 0
    assert all(f"\n  {command} " in outcome.out for command in COMMANDS)
    assert "..." not in outcome.out.partition("Commands:")[2]


def test_version(mptrain):
    assert mptrain("--version").out == f"mptrain {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("chekc", "unknown command `chekc`", "did you mean `check`?"),
        ("check x.yaml --jsno", "unknown option `--jsno`", "did you mean `--json`?"),
        ("check", "missing argument `RECIPE`", "`mptrain check --help` shows the usage"),
        ("check x.yaml --set", "option `--set` requires an argument", "`mptrain check --help`"),
        ("run", "missing argument `RECIPE`", "`mptrain run --help` shows the usage"),
        ("run x.yaml --resume x", "`--resume` and a recipe are both given", "a run has its own"),
        ("run --output y --resume x", "`--resume` and `--output` are both given", "a run has its"),
        ("run --resume missing", "--resume missing: no such folder", "a run directory is named"),
        ("schema --json", "unknown option `--json`", "`mptrain schema` prints JSON as it is"),
        ("--json check x", "unknown option `--json`", "it belongs after the command"),
        ("check a b", "got unexpected extra argument", "`mptrain check --help` shows"),
        ("run r.yaml --set", "option `--set` requires an argument", "`mptrain"),
        ("--verison", "unknown option `--verison`", "did you mean `--version`?"),
    ],
)
def test_usage_errors_exit_2_in_the_voice_of_all_errors(mptrain, arguments, message, hint):
    outcome = mptrain(*arguments.split())
    assert outcome.code == Exit.USAGE
    assert ("--json" in arguments) == bool(outcome.out)
    assert outcome.err.lower().startswith(f"error: {message.lower()}")
    assert f"\n  help: {hint}" in outcome.err


def test_usage_errors_are_json_too(mptrain):
    outcome = mptrain("check", "--json")
    assert outcome.json["status"] == "failed"
    assert outcome.json["exit_code"] == outcome.code == 2
    assert [p["message"] for p in outcome.json["problems"]] == ["missing argument `RECIPE`"]


def test_check_says_ok_or_every_problem(mptrain, recipe):
    assert mptrain("check", recipe).out == f"{recipe}: ok\n"
    recipe.write_text(recipe.read_text().replace("lr:", "lrr:").replace("fp16", "fp17"))
    text, as_json = mptrain("check", recipe), mptrain("check", recipe, "--json")
    assert text.code == as_json.code == 2
    assert text.out == ""
    assert [p["line"] for p in as_json.json["problems"]] == [4, 5]
    assert f"{recipe}:5:20: optim.lrr: unknown field" in text.err


def test_check_applies_overrides(mptrain, recipe):
    assert mptrain("check", recipe, "--set", "optim.lr=1e-4", "--set", "train.seed=3").code == 0
    assert mptrain("check", recipe, "--set", "optim.lr=fast").code == 2


def test_schema_is_a_json_schema_with_every_section(mptrain):
    schema = mptrain("schema").json
    assert set(schema["properties"]) >= {"use", "name", "task", "data", "precision", "optim"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (user_error("no data", exit_code=Exit.ENVIRONMENT), 3),
        (user_error("disk full", exit_code=Exit.STORAGE), 7),
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
        (RuntimeError("a bug"), 1),
    ],
)
def test_exit_codes(error, code, capsys):
    def command():
        raise error

    assert guarded(command, as_json=False) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("Traceback" in captured.err) == (code == 1)


def test_a_bug_shows_its_traceback_and_still_one_json_object(mptrain, monkeypatch, recipe):
    monkeypatch.setattr(check_command, "write_json", lambda value: 1 / 0)
    outcome = mptrain("check", recipe, "--json")
    assert outcome.code == outcome.json["exit_code"] == 1
    assert outcome.json["problems"][0]["message"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in outcome.err


def test_ctrl_c_in_a_command_is_reported_as_such(mptrain, monkeypatch, recipe):
    def interrupt(value):
        raise KeyboardInterrupt

    monkeypatch.setattr(check_command, "write_json", interrupt)
    outcome = mptrain("check", recipe, "--json")
    assert outcome.code == outcome.json["exit_code"] == 130
    assert outcome.json["status"] == "interrupted"
    assert outcome.err == "error: interrupted\n"


def test_a_user_error_shows_all_of_its_problems(capsys):
    def command():
        raise UserError(*user_error("one").problems, *user_error("two", "do this").problems)

    guarded(command, as_json=False)
    assert capsys.readouterr().err == "error: one\nerror: two\n  help: do this\n"
