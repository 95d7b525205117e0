"""Verdicts on samples while others are still written; those that an earlier run wrote down are not formed again.

    sample ──submit──▶ Job ──Sandbox──▶ Judgement ──▶ verdicts.jsonl

What timed out, or failed by the sandbox's own fault, is judged once more, alone, before it counts and is written down.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future

from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Job, Judgement, Sandbox, Script
from puna.log import Log
from puna.progress import Progress

#: Most jobs that wait for a judgement; some hold thousands of inputs.
BACKLOG = 1000


class Judge:
    """Judges samples, equal ones once.

    Args:
        job_of: a sample as the sandbox takes it.
        sandbox: where it runs.
        log: of verdicts, which is read first and then added to.
    """

    def __init__(self, job_of: Callable[[Sample], Job | Script], sandbox: Sandbox, log: Log) -> None:
        self._job_of, self._sandbox, self._log = job_of, sandbox, log
        self._known = {
            (line["task_id"], line["answer"]): Judgement(
                line["verdict"], line["detail"], line["seconds"], line.get("printed", "")
            )
            for line in log.lines
            if line["verdict"] != "sandbox"  # which is no fault of the program's, and may go well this time
        }
        self._running: dict[Sample, Future[Judgement]] = {}
        self._judged: dict[Sample, Judgement] = {}

    def submit(self, sample: Sample) -> None:
        """Has a sample judged, by and by."""
        if sample in self._judged or sample in self._running:
            return
        if known := self._known.get((sample.task_id, _checksum(sample))):
            self._judged[sample] = known
            return
        self._running[sample] = self._sandbox.submit(self._job_of(sample))
        while self._running and (len(self._running) > BACKLOG or next(iter(self._running.values())).done()):
            self._collect_first()

    def finish(self) -> dict[Sample, Judgement]:
        """All judgements, once they are there; what timed out is judged again, alone."""
        with Progress("judging", len(self._running), "samples") as progress:
            while self._running:
                self._collect_first()
                progress.advance()
            for sample in [sample for sample, judgement in self._judged.items() if judgement.is_doubtful]:
                if (sample.task_id, _checksum(sample)) not in self._known:
                    self._keep(sample, self._sandbox.judge(self._job_of(sample)))
        return self._judged

    def _collect_first(self) -> None:
        """Waits for the judgement that was submitted first."""
        sample, future = next(iter(self._running.items()))
        judgement = future.result()
        del self._running[sample]
        if judgement.is_doubtful:
            self._judged[sample] = judgement  # and not in the log: it does not count yet
        else:
            self._keep(sample, judgement)

    def _keep(self, sample: Sample, judgement: Judgement) -> None:
        self._judged[sample] = judgement
        self._log.append({"task_id": sample.task_id, "answer": _checksum(sample), **judgement.record()})


def _checksum(sample: Sample) -> str:
    text = f"{sample.is_whole}\0{sample.text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=12).hexdigest()
