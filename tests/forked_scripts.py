"""Run plans of run_scripts.py by one process and by several ranks: `forked_scripts.py JOBS.json MODEL`.

The jobs are a list of [number of ranks, plan, log], done at once. All are forked from this process, which has imported
everything: vLLM alone takes longer than most runs here. The ranks are those of torchrun's own launcher.
"""

import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_scripts
from kill_and_resume import TORCHRUN
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from plainrl import cli, engine, startup


def run_job(num_ranks, plan, log):
    """Run a plan, and add what it prints to a file. Without ranks it runs in this process."""
    startup.end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    sys.argv = [run_scripts.__file__, plan]
    if num_ranks == 0:
        cli.run_main(run_scripts.main)
        return
    options = [*TORCHRUN[2:], "--nproc-per-node", str(num_ranks), "--start-method", "fork"]
    config, *_ = config_from_args(parse_args([*options, run_scripts.__file__]))
    elastic_launch(config, run_rank)()


def run_rank():
    """Be a rank. cli.py reads a rank's number at its import, so that it is imported again."""
    importlib.reload(cli)
    cli.run_main(run_scripts.main)


def main(path, model):
    jobs = json.loads(Path(path).read_text())
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}  # before vLLM is imported
    run_scripts.share_engines()
    for module in {module for _, plan, _ in jobs for module, _ in json.loads(Path(plan).read_text())}:
        importlib.import_module(module)
    engine.register_model_class(model)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_job, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))


if __name__ == "__main__":
    main(*sys.argv[1:])
