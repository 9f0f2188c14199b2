"""Calls of a layer while it serves: dispatch, workspaces, warm-up, counters, operators for torch.compile."""
