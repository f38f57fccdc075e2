"""One line of JSON per case of the GPU check, where GPU_CHECK_JSONL names a file."""

import json
import os


def pytest_runtest_logreport(report):
    """Write how a case ended as soon as it has ended, with what it recorded."""
    path = os.environ.get("GPU_CHECK_JSONL")
    if not path or (report.when != "call" and report.outcome == "passed"):
        return
    row = {"case": report.nodeid.rpartition("::")[2], "outcome": report.outcome, "seconds": report.duration}
    row |= dict(report.user_properties)
    if report.outcome == "skipped":
        row["why"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.outcome == "failed":
        row["why"] = report.longreprtext[-600:]
    with open(path, "a") as file:
        print(json.dumps(row, default=str), file=file)
