"""Processes forked off one that has imported raytorch and PyTorch, so that each begins at once."""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["raytorch.training.worker", "raytorch.session.open_or_join"])
