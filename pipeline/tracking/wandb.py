"""W&B: a run for a measurement on the command line. Choices were measured on wandb 0.31."""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.trackers import Logging
from pipeline.errors import ConfigError, TrackingError
from pipeline.tracking.protocol import Data, NullTracker

if TYPE_CHECKING:
    import wandb

STEP = "trainer/global_step"  # as in Lightning's logger
INIT_SECONDS, FINISH_SECONDS = 30, 60  # longest wait for a server that does not answer
MAX_NAME = 128


class WandbTracker(NullTracker):
    """Writes results and pictures to a run; stages and notes are MLflow's."""

    def __init__(self, run: wandb.Run) -> None:
        """The run must be open."""
        self.run = run

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:  # noqa: ARG002
        """See `Tracker.metrics`. The step is a metric too: W&B's own may not go back, and a late result's does."""
        self.run.log({**values, STEP: step})

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`. Pictures and HTML pages are shown, other files are not sent."""
        key = f"{folder}/{path.stem}" if folder else path.stem
        if path.suffix == ".png":
            log_picture(self.run, key, path, step)
        elif path.suffix == ".html":
            import wandb

            self.run.log({key: wandb.Html(str(path), inject=False), STEP: step})


def log_picture(run: Any, key: str, path: Path, step: int) -> None:
    """Shows a PNG file at a step of a run; the file may go afterwards."""
    import wandb

    run.log({key: wandb.Image(str(path)), STEP: step})


@contextmanager
def open_wandb(logging: Logging, name: str, config: Mapping[str, Any], folder: Path) -> Iterator[WandbTracker]:
    """A run of its own, beside any that the process has: nothing is printed, and nobody is asked for an account.

    Args:
        logging: mode, project, entity and tags.
        name: of the run.
        config: shown on the run's page.
        folder: where W&B makes its folder `wandb`.

    Raises:
        ConfigError: W&B is not installed, or `online` has no account to log in to.
        TrackingError: the server did not take everything in time.
    """
    run = _start(logging, name, config, folder)
    try:
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        yield WandbTracker(run)
    except BaseException:
        with suppress(Exception):  # what has happened is of more interest
            _finish(run, 1)
        raise
    _finish(run, 0)


def _start(logging: Logging, name: str, config: Mapping[str, Any], folder: Path) -> wandb.Run:
    try:
        import wandb
        from wandb.errors import AuthenticationError, UsageError
    except ImportError as error:
        raise ConfigError(f"logging.wandb: {logging.wandb} needs W&B: pip install wandb") from error
    folder.mkdir(parents=True, exist_ok=True)
    mode: Any = logging.wandb
    try:
        with _silent():
            return wandb.init(
                mode=mode,
                project=logging.project,
                entity=logging.entity,
                tags=logging.tags or None,
                name=name[:MAX_NAME],
                config=dict(config),
                dir=str(folder),
                id=secrets.token_hex(4),  # not that of WANDB_RUN_ID, which is the user's run
                resume="never",
                reinit="create_new",
                settings=_settings(),
            )
    except (AuthenticationError, UsageError) as error:
        if logging.wandb != "online":
            raise
        remedy = "run `wandb login` or set WANDB_API_KEY; or have it offline"
        raise ConfigError(f"logging.wandb: online needs an account: {error}; {remedy}") from error


def _settings() -> wandb.Settings:
    import wandb

    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "finish_timeout_raises": True,
    }
    known = wandb.Settings.model_fields  # the last two are not in all versions
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def _finish(run: wandb.Run, exit_code: int) -> None:
    try:
        with _silent():
            run.finish(exit_code=exit_code)
    except TimeoutError as error:
        folder = Path(run.settings.sync_dir)
        raise TrackingError(
            f"W&B took more than {FINISH_SECONDS} s; send the rest with: wandb sync {folder}"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """`silent` is for a run, not for the login before it. Without a terminal W&B does not ask for an account either."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
