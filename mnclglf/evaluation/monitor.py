"""k-NN accuracy of the encoder while it trains (--knn-every); it changes no weight, statistic or random number."""

from __future__ import annotations

import json
import time

import torch

from mnclglf.config import KnnConfig, UsageError, require
from mnclglf.data.images import ImageSet
from mnclglf.evaluation.features import extract_features
from mnclglf.evaluation.knn import weighted_knn
from mnclglf.models.encoder import Encoder
from mnclglf.training.start import Start


class KnnMonitor:
    """Classifies held-out images by their nearest training images, with the settings of `mnclglf knn`.

    Ranks share the work on the features; rank 0 classifies, and all return its figures.

    The held-out images are those of --validation-images, else the data set's test images.

    Args:
        started: the run; its loader has the normalization.

    Attributes:
        description: what is classified by what, in words.
        evaluations: number of evaluations so far.
        seconds: seconds that they took together.

    Raises:
        ValueError: the images have no labels, one class, or none to classify.
    """

    def __init__(self, started: Start) -> None:
        data, every = started.data, started.config.engine.knn_every
        asked = f"--knn-every {every} classifies images by their labels, and {data.train.name}"
        require(
            len(data.train.classes) > 1,
            f"{asked} has {'one class' if data.train.labeled else 'no labels'}; give each class a subfolder, or leave "
            "out --knn-every: feature_std and effective_rank are logged, and mnclglf quality RUN needs no labels",
        )
        held_out = data.validation if len(data.validation) else data.test
        if held_out is None:
            raise UsageError(f"{asked} holds no images out; give --validation-images N, or subfolders train and val")
        self.train = data.train
        self.test: ImageSet = held_out
        self.started = started
        self.k = min(KnnConfig.neighbors, len(self.train))
        self.evaluations, self.seconds = 0, 0.0
        self.description = (
            f"{len(self.test):,} {self.test.split} images by {self.k} of {len(self.train):,} training images, vote "
            f"temperature {KnnConfig.vote_temperature}"
        )

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Returns the figures for metrics.jsonl: knn_top1, 0 to 1, and knn_seconds."""
        began, started = time.perf_counter(), self.started
        features = [
            extract_features(
                encoder,
                images,
                side=started.data.side,
                mean=started.loader.mean,
                std=started.loader.std,
                dtype=started.machine.dtype,
                device=started.machine.device,
                ranks=started.ranks,
            )
            for images in (self.train, self.test)
        ]

        def classify() -> bytes:
            accuracy = weighted_knn(
                features[0].to(started.machine.device),
                torch.from_numpy(self.train.labels),
                features[1],
                torch.from_numpy(self.test.labels),
                classes=len(self.train.classes),
                k=self.k,
                temperature=KnnConfig.vote_temperature,
            )
            took = time.perf_counter() - began
            return json.dumps({"knn_top1": round(accuracy.top1, 6), "knn_seconds": round(took, 3)}).encode()

        figures: dict[str, float] = json.loads(started.ranks.from_first(classify))
        self.evaluations, self.seconds = self.evaluations + 1, self.seconds + figures["knn_seconds"]
        return figures
