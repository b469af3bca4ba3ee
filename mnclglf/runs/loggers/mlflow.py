"""MLflow: a SQLite store beside the run directories, mlflow.db, unless MLFLOW_TRACKING_URI names another."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # sends nothing anywhere unless it is asked to
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import alembic
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from mnclglf.runs.files import check_writable
from mnclglf.runs.loggers import Opening

EXPERIMENT = "mnclglf"
MOST_TEXT = 500  # characters of a value, of the oldest store


class Mlflow:
    """Writes one MLflow run, which a resumed run goes on with; steps that a killed process has written are left out."""

    def __init__(self, opening: Opening) -> None:
        logging.getLogger(alembic.__name__).setLevel(logging.WARNING)  # it names each table that it makes
        folder, uri = opening.folder.parent, os.environ.get("MLFLOW_TRACKING_URI")
        place = None  # of the images; a server has its own
        if uri is None:
            check_writable(folder, "set MLFLOW_TRACKING_URI")  # SQLite would try for minutes
            # % and ? have a meaning in the name of a store.
            uri = f"sqlite:///{str(folder / 'mlflow.db').replace('%', '%25').replace('?', '%3F')}"
            place = (folder / "mlflow-files").as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        self.written = opening.written
        self.ends = opening.start is not None
        known = opening.known_id("mlflow")
        self.run = (None if known is None else self._known(known)) or self._new(opening, place)
        if self.ends:
            self.client.update_run(self.run, status="RUNNING")

    def _new(self, opening: Opening, place: str | None) -> str:
        run = self.client.create_run(self._experiment(place), run_name=opening.folder.name).info.run_id
        params = [Param(name, str(value)[:MOST_TEXT]) for name, value in opening.settings.items()]
        self.client.log_batch(run, params=params)
        opening.keep_id("mlflow", run)
        return run

    def _experiment(self, place: str | None) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return found.experiment_id
        try:
            return self.client.create_experiment(EXPERIMENT, artifact_location=place)
        except MlflowException:  # another run has made it meanwhile
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return found.experiment_id

    def _known(self, run: str) -> str | None:
        try:
            return self.client.get_run(run).info.run_id
        except (MlflowException, SQLAlchemyError):  # the run directory came here from beside another store
            return None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        if step > self.written or any(name.startswith("top1/") for name in values):
            metrics = [Metric(name, value, now, step) for name, value in values.items()]
            self.client.log_batch(self.run, metrics=metrics)

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        for number, image in enumerate(images):
            self.client.log_image(self.run, image, artifact_file=f"{name}/{number}.png")

    def close(self) -> None:
        if self.ends:
            self.client.set_terminated(self.run)
