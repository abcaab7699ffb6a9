"""What is measured of a model before it is pruned and after, for the report: does the plan pay, and where does it cost."""

from __future__ import annotations

from typing import Any

from ..evaluation.by_source import SourceScores
from ..evaluation.certificate import CertificateScore
from ..planning.transfer import revalidate
from ..records import SourceScore
from .preparation import PruningJob


class Evidence:
    """Sees the dense model when it is made; `measure_pruned` scores the pruned one on the same text.

    `revalidation`: of a plan that was made on other weights, what `planning/transfer.py` found. After `measure_pruned`,
    `certificate`: the pruned model's score on the certificate's text; `sources`: of a calibration mix, by source.
    """

    def __init__(self, job: PruningJob):
        run = job.run
        self.revalidation: dict[str, Any] | None = _revalidate(job) if job.has_travelled else None
        self.certificate: dict[str, Any] | None = None
        self.sources: dict[str, SourceScore] = {}
        self._certificate = CertificateScore(run.model, run.model_layers, job.certificate) if job.certificate else None
        self._sources = SourceScores(run.model, run.model_layers, job.held_out) if job.held_out else None

    def measure_pruned(self) -> None:
        """Scores the model as it is now."""
        self.certificate = self._certificate.report() if self._certificate else None
        self.sources = self._sources.report() if self._sources else {}


def _revalidate(job: PruningJob) -> dict[str, Any] | None:
    """Each process computes it alone, and the main one's result counts; an interrupted run remembers it."""
    run, journal = job.run, job.run.journal
    result: dict[str, Any] | None = journal.recall("revalidation") if journal else None
    if result is None:
        folder = journal.folder if journal else None
        alone = revalidate(run.model, run.model_layers, job.plan, job.pruner, job.all_batches, folder)
        result = run.processes.gather(alone)[0]
        if journal and result:
            journal.remember("revalidation", "", result)
    return result
