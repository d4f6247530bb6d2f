"""Where Optuna keeps a study: a journal in a file, or a database, and what is wrong with it."""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.sweep.folder import locked

_TRIES = 10
_PACKAGES = {"psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "MySQLdb": "mysqlclient"}
_WAITING = ("psycopg2", "psycopg", "mysqldb", "pymysql")  # drivers with a `connect_timeout`
_KNOWN = "such as `postgresql://USER:PASSWORD@HOST/NAME` or `sqlite:////FOLDER/study.db`"


class _JournalLock(BaseJournalFileLock):
    """Given back by the kernel when its holder dies, so that nobody waits for a grace period.

    A row that its writer did not write to the end (it was killed, or the disk was full) is taken
    back, for the next one would be added to it.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock: BinaryIO | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock = locked(self._journal.with_name(f"{self._journal.name}.lock"), wait=True)
        with self._journal.open("r+b") as file:
            if not _ends_with_row(file):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let others write."""
        assert self._lock is not None
        self._lock.close()


def _ends_with_row(file: BinaryIO) -> bool:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    return file.read(1) in (b"", b"\n")


def journal(path: Path) -> BaseStorage:
    """A file, made where there is none.

    Args:
        path: absolute.

    Raises:
        UserError: exit 4, it is damaged.
    """
    if path.exists():
        _check_rows(path)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
    except OSError:
        raise
    except Exception as error:  # whatever made-up rows lead to
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _check_rows(path: Path) -> None:
    """Optuna finds a damaged row only when another one follows it."""
    with path.open("rb") as file:
        for number, row in enumerate(file, start=1):
            try:
                known = not row.endswith(b"\n") or "op_code" in json.loads(row)
            except (ValueError, TypeError, RecursionError):
                known = False
            if not known:
                raise _damaged(path, f"line {number} is no row of a study")


def _damaged(path: Path, why: str) -> UserError:
    hint = "move it away: finished trials are taken over as they are"
    return user_error(f"{path}: damaged: {why}", hint, exit_code=Exit.CHECKPOINT)


def database(url: str, heartbeat: int, grace: int) -> BaseStorage:
    """Of any kind that Optuna knows; its tables are made where there are none.

    Args:
        heartbeat: seconds between two.
        grace: seconds without any after which a trial is dead.

    Raises:
        UserError: exit 2, the URL says nothing; 3, the database or its driver is not there.
    """
    parsed = _parsed(url)
    if parsed.drivername == "postgresql" and not find_spec("psycopg") and find_spec("psycopg2"):
        # Which of them SQLAlchemy takes by itself depends on its version.
        parsed = parsed.set(drivername="postgresql+psycopg2")
    options: dict[str, Any] = {"pool_pre_ping": True}
    if parsed.get_backend_name() == "sqlite" and (
        parsed.database in (None, "", ":memory:") or "memory" in str(parsed.query.get("mode"))
    ):
        what = "--storage: a database in memory is not shared by the processes of a sweep"
        raise user_error(what, "name a file: `sqlite:////FOLDER/study.db`")
    try:
        driver = parsed.get_driver_name()
        if driver in _WAITING:
            options["connect_args"] = {"connect_timeout": 10}
        elif parsed.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": 30}
        engine = sqlalchemy.create_engine(parsed, **options)
        engine.connect().close()
        engine.dispose()
    except NoSuchModuleError as error:
        what = f"--storage: `{parsed.drivername}` is no kind of database"
        raise user_error(what, _KNOWN) from error
    except ImportError as error:
        module = error.name or parsed.drivername
        raise user_error(
            f"--storage: {parsed.get_backend_name()} needs {module}, which is not installed",
            f'pip install "{_PACKAGES.get(module, module)}"',
            exit_code=Exit.ENVIRONMENT,
        ) from error
    except SQLAlchemyError as error:
        raise unreachable(url, error) from error
    plain = parsed.render_as_string(hide_password=False)
    for attempt in range(1, _TRIES + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # heartbeats are called experimental
                made = RDBStorage(plain, options, heartbeat_interval=heartbeat, grace_period=grace)
            return get_storage(made)
        except (IntegrityError, OperationalError, ProgrammingError, StorageInternalError):
            # Processes that make the same tables at the same time are in each other's way.
            if attempt == _TRIES:
                raise
            time.sleep(random.uniform(0.05, 0.3))
        except RuntimeError as error:  # tables of another version of Optuna
            raise user_error(f"--storage: {error}", exit_code=Exit.ENVIRONMENT) from error
    raise AssertionError


def _parsed(url: str) -> sqlalchemy.URL:
    try:
        return sqlalchemy.make_url(url)
    except (ArgumentError, ValueError):  # which quote it, with the password
        raise user_error("--storage: this is no URL of a database", _KNOWN) from None


def unreachable(url: str, error: Exception) -> UserError:
    """Why a database cannot be used, without the secrets of its URL."""
    parsed = _parsed(url)
    cause = error.__cause__ or error if isinstance(error, StorageInternalError) else error
    told = str(getattr(cause, "orig", None) or cause).strip()
    reason, *_ = told.splitlines() or [type(cause).__name__]
    secrets = [parsed.password, *(v for v in parsed.query.values() if isinstance(v, str))]
    for secret in filter(None, secrets):
        reason = reason.replace(secret, "***")
    shown = parsed.set(query={}).render_as_string(hide_password=True)
    return user_error(
        f"--storage {shown}: {reason}",
        "see that the database runs and can be written; the same command goes on with the sweep",
        exit_code=Exit.ENVIRONMENT,
    )
