"""The libraries that pyfleet is measured against: one adapter each, skipped with a reason where it cannot run."""
