"""Imports what stages need, for the process that they are forked from."""

import contextlib
import gc
import importlib
import signal

from rlhf.studies.processes import FORWARDED

MODULES = (
    "rlhf.cli.rehearsal", "rlhf.cli.stage", "rlhf.evaluation.generate", "rlhf.evaluation.pairwise",
    "rlhf.evaluation.margins", "rlhf.report.report", "rlhf.synthetic.synthesize",
    # what they import when they run
    "datasets", "rlhf.report.sections", "pyarrow.parquet", "torch.utils.tensorboard", "torch._inductor.compile_fx",
    "transformers.models.gpt_neox.modeling_gpt_neox", "transformers.trainer_pt_utils",
)  # fmt: skip

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pipeline, which stops the stage
signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a signal to all processes is for the stages, which unblock it
for name in MODULES:
    with contextlib.suppress(Exception):  # a stage that needs the module will say what is wrong
        importlib.import_module(name)
gc.collect()
gc.freeze()  # else the garbage collector of every fork writes to, and so copies, all these pages
