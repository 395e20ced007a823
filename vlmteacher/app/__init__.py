"""The web page of `vlmteacher ui`: tasks, runs and the reports of sweeps, on the models of one process."""
