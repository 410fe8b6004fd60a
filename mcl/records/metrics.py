"""Writes records of a run to JSON lines, log, TensorBoard, Weights & Biases and progress bar."""

import atexit
import contextlib
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Self

from tqdm.auto import tqdm
from tqdm.contrib import DummyTqdmFile

from dali_pipelines.source.files import replacing
from mcl import distributed
from mcl.config import Config, ConfigError, to_dict
from mcl.records.tensorboard import TensorBoard, charted

log = logging.getLogger("mcl")

Record = dict[str, Any]
"""Numbers, lists with a number per level, ``kind`` and ``step``."""

COLLAPSE = ("embedding_std", "target_rank")
"""Lists of a training record by which :mod:`mcl.records.collapse` detects a collapse."""

EVALUATIONS = "evaluations.jsonl"
"""File of a run folder for the records of kind ``eval``: the run's own, and those of ``mcl evaluate``."""


ENVIRONMENT = "environment.json"
"""File of a run folder with date, hardware and software of its last start."""


class RecordError(RuntimeError):
    """A record cannot be written; the message names the file and the remedy."""


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Ignores errors of a closed output, since train.log has every message."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to_console() -> None:
    """Logs messages of a run to the console; for all ranks but the first, only warnings and errors.

    Messages are also kept in memory until :func:`log_to_file` writes them, since the run folder is created later.
    """
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)
    console = _Console(DummyTqdmFile(sys.stdout))  # prints messages above the progress bar
    console.addFilter(lambda record: getattr(record, "console", True))
    console.setFormatter(logging.Formatter(f"{_who()}%(message)s"))
    log.addHandler(console)
    log.addHandler(MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1))
    logging.captureWarnings(True)
    warned = logging.getLogger("py.warnings")
    warned.handlers = log.handlers
    # Libraries give the same warnings in every rank.
    warned.setLevel(logging.WARNING if distributed.rank() == 0 else logging.ERROR)


def log_to_file(folder: Path) -> None:
    """Also logs messages to ``train.log``; for all ranks but the first, only the error that ends the run.

    Raises:
        OSError: the folder cannot be written to.
    """
    first = distributed.rank() == 0
    file = logging.FileHandler(folder / "train.log", encoding="utf-8", errors="backslashreplace", delay=not first)
    file.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {_who()}%(message)s"))
    file.addFilter(lambda record: first or record.levelno >= logging.ERROR)
    for kept in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
        kept.setTarget(file)
        kept.close()
        log.removeHandler(kept)
    log.addHandler(file)


def _who() -> str:
    return f"rank {distributed.rank()}: " if distributed.rank() else ""


@contextlib.contextmanager
def recorded_errors() -> Iterator[None]:
    """Logs the traceback of an exception that ends the run to ``train.log``; the caller prints it on the console."""
    try:
        yield
    except Exception as error:
        if any(isinstance(handler, logging.FileHandler) for handler in log.handlers):
            log.error("the run ends: %s", type(error).__name__, exc_info=True, extra={"console": False})
        raise


class Metrics:
    """Writes records of a run; used only by rank 0.

    Args:
        config: the run's configuration.
        step: number of steps already done. Records of later steps, which an interrupted run has left, are dropped.
    """

    def __init__(self, config: Config, step: int) -> None:
        check_sinks(config)
        folder = config.run_folder
        self._path, self._evaluations = folder / "metrics.jsonl", folder / EVALUATIONS
        _keep_until(self._path, step)
        _keep_until(self._evaluations, step)
        with _reporting(self._path):
            self._file = open(self._path, "a")  # noqa: SIM115  # open as long as the run
        self._tensorboard: TensorBoard | None = None
        self._wandb: Any = None
        if config.log.tensorboard and find_spec("tensorboard") is None:
            log.info("log.tensorboard: not installed, so only metrics.jsonl has the numbers; pip install tensorboard")
        elif config.log.tensorboard:
            with _needed("log.tensorboard", "set log.tensorboard=false"):
                self._tensorboard = TensorBoard(config, step)
        if config.log.wandb:
            import wandb

            with _accepted_by_wandb():
                self._wandb = wandb.init(
                    project=config.log.wandb,
                    id=_run_id(folder / "wandb_id"),
                    name=config.name,
                    dir=str(folder),
                    config=to_dict(config),
                    resume="allow",
                )

    def write(self, record: Record) -> None:
        """Appends one record to every sink.

        Raises:
            RecordError: the disk is full or not available.
        """
        if record["kind"] == "eval":
            append(self._evaluations, record)
        else:
            with _reporting(self._path):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.write(record)
        if self._wandb is not None:
            self._wandb.log(charted(record), step=record["step"])

    def close(self) -> None:
        """Closes all sinks.

        Raises:
            RecordError: the last records could not be written to the disk.
        """
        with _reporting(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_sinks(config: Config) -> None:
    """Checks that the packages for the log are installed and that W&B accepts the user, before anything is written.

    Raises:
        ConfigError: a package is missing, or W&B refuses the key or the project.
    """
    if config.log.tensorboard and find_spec("tensorboard") is not None:
        with _needed("log.tensorboard", "pip install tensorboard, or log.tensorboard=false"):
            import torch.utils.tensorboard  # noqa: F401
    if config.log.wandb:
        with _needed("log.wandb", "pip install wandb, or log.wandb="):
            import wandb
        with _accepted_by_wandb():
            wandb.Settings(project=config.log.wandb)
            if wandb.setup().settings.mode == "online":
                wandb.login()


@contextlib.contextmanager
def _needed(key: str, remedy: str) -> Iterator[None]:
    """Turns an error of another package, of whatever type, into a ConfigError of one line that names the key."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split()) or type(error).__name__}; {remedy}") from error


@contextlib.contextmanager
def _accepted_by_wandb() -> Iterator[None]:
    """If W&B refuses a run, makes the process end at once; W&B's own exit hook would wait for the network."""

    def leave() -> None:
        sys.stdout.flush()
        os._exit(2)

    try:
        with _needed("log.wandb", "wandb login, WANDB_MODE=offline, or log.wandb="):
            yield
    except Exception:
        atexit.register(leave)  # runs before W&B's hook, which was registered earlier
        raise


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be written ({error.strerror}); free disk space, and run the same command again to continue"
        ) from error


def append(path: Path, record: Record) -> None:
    """Appends a record to a file of the run folder.

    Raises:
        RecordError: the disk is full or not available.
    """
    with _reporting(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def rewrite(path: Path, text: str) -> None:
    """Replaces a file of the run folder; `path` never has partial content.

    Raises:
        RecordError: the disk is full or not available.
    """
    with _reporting(path), replacing(path) as file:
        file.write(text.encode())


def _run_id(path: Path) -> str:
    """The id under which Weights & Biases continues a run, kept in the run folder."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def read(path: Path) -> list[Record]:
    """Records of ``metrics.jsonl`` or a similar file; skips broken lines, such as one cut by a crash."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def describe(record: Record) -> str:
    """Formats a training record in one line."""
    return (
        f"step {record['step']:>6}  epoch {record['epoch']:7.2f}  loss {record['loss']:8.4f}  "
        f"{_scores(record)}  {_collapse(record)}lr {record['lr']:.2e}  {record['images_per_s']:7.1f} img/s  "
        f"wait {record['data_wait']:4.0%}  {record['peak_memory_gb']:5.1f} GB  eta {eta(record['eta_s'])}"
    )


def scores(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Scores of a training record for every level, by name."""
    others = ("loss_level", *COLLAPSE)
    return {name: value for name, value in record.items() if isinstance(value, list) and name not in others}


def _scores(record: Record) -> str:
    """Names and values of the scores per level; the two cosines are called cos +/-."""
    found = scores(record)
    levels = ["/".join(f"{value:+.2f}" for value in level) for level in zip(*found.values(), strict=True)]
    names = "/".join(found)
    return " ".join(["cos +/-" if names == "positive/negative" else names, *levels])


def _collapse(record: Record) -> str:
    """Figures of collapse, each of the level where it is smallest."""
    names = dict(zip(COLLAPSE, ("std", "rank"), strict=True))
    return "".join(f"{names[key]} {min(record[key]):.3g}  " for key in COLLAPSE if record.get(key))


def eta(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _keep_until(path: Path, step: int) -> None:
    """Drops records of steps after `step`, which a resumed run writes again."""
    if path.exists():
        rewrite(path, "".join(json.dumps(r) + "\n" for r in read(path) if r["step"] <= step))


class BadFiles:
    """``bad_files.jsonl``: lists every file that cannot be used once, with the reason.

    Args:
        path: path of the list.
        elsewhere: bad files that another process lists: those found by reading headers, which all processes know.
    """

    def __init__(self, path: Path, elsewhere: Mapping[int, str]) -> None:
        self._path, self._elsewhere = path, elsewhere
        self._known: set[int] = set()  # by index, since paths change if images are moved
        self._size = 0  # bytes of the list when this process last read or wrote it

    def __call__(self, index: int, path: str, reason: str) -> None:
        """Lists and logs a file, if it is not listed yet."""
        if index in self._elsewhere:
            return
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self._size:  # an earlier run or another process has written to it
            self._known, self._size = {record["index"] for record in read(self._path)}, size
        if index not in self._known:
            self._known.add(index)
            log.warning("bad file, replaced: %s: %s", path, reason)
            with _reporting(self._path), open(self._path, "a") as file:
                file.write(json.dumps({"index": index, "path": path, "reason": reason}) + "\n")
                self._size = file.tell()


class ProgressBar:
    """A progress bar in a terminal or a notebook; elsewhere only lines of records."""

    def __init__(self, config: Config, step: int, steps: int) -> None:
        hidden = None if config.log.progress and distributed.rank() == 0 else True  # None: hidden outside of a terminal
        self._bar = tqdm(total=steps, initial=step, disable=hidden, file=sys.stdout, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Counts a step."""
        self._bar.update()

    def show(self, record: Record) -> None:
        """Shows a training record."""
        log.info(describe(record))
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4f}, {_scores(record)}, "
            f"{record['images_per_s']:.1f} img/s, wait {record['data_wait']:.0%}"
        )
