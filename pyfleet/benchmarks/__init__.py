"""P4, open set: what `pyfleet benchmark` measures besides links and kernels; `base` keeps ranks in step."""
